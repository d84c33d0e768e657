"""Running statistics of batch normalisation, bit-identical on 1, 2, 4, … workers.

Formula:  running ← (1 − m)·running + m·batch for each use of a layer, in the order of the step's
          micro-batches, on every worker
Contract: the batch statistics of each use are gathered at the end of a step, and every worker
          applies them in the same order. This costs two gathers per step; the fast form is in
          batch_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvdlarge.models.state import Modules
from hvdlarge.reduction.batch_norm import GatherRanks, RunningStatistics
from hvdlarge.schedule.batch import BatchLayout


class ExactStatistics(RunningStatistics):
    """RunningStatistics of which every rank holds the full values; `all_reduce` sums only the
    counts.
    """

    def __init__(
        self, modules: Modules, rank: int, world_size: int, gather_ranks: GatherRanks
    ) -> None:
        super().__init__(modules, rank, world_size, gather_ranks)
        # Of each layer, the batch statistics of its uses: mean and variance, shape (2 · features,)
        self._batch_stats: list[list[torch.Tensor]] = []
        self._hooks: list[Any] = []

    def partial_buffers(self) -> set[int]:
        """The ids of the counts, the only buffers that differ between ranks during training."""
        return {id(layer.uses) for layer in self._layers} if self._world_size > 1 else set()

    def to_partial(self) -> None:
        """Record which layers are in training mode; the buffers are full on every rank."""
        self._record_modes()
        self._partial = True

    def begin_step(self) -> None:
        """Set the running statistics aside, and record the batch statistics of each use."""
        self._parts = [buffer.clone() for buffer in self._buffers()]
        self._batch_stats = [[] for _ in self._layers]
        for number, layer in enumerate(self._layers):
            layer.module.momentum = 1.0  # the buffers then hold the batch statistics
            self._hooks.append(layer.module.register_forward_hook(self._recorder(number)))

    def _recorder(self, number: int) -> Callable[..., None]:
        def record(module: Any, *_: Any) -> None:
            if module.training:
                self._batch_stats[number].append(torch.cat(self._layers[number].averages))

        return record

    def end_step(self, layout: BatchLayout, uneven: bool) -> None:
        """Apply the batch statistics of all uses in the step, in their order. Every rank calls this
        together.

        Args:
            layout: of the step.
            uneven: see RunningStatistics.

        Raises:
            ModeChangedError: see RunningStatistics.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self._layers:
            layer.module.momentum = layer.momentum
        if uneven:
            self._refuse_changed_modes()
        if not self._layers:
            return
        local_uses = torch.tensor([len(recorded) for recorded in self._batch_stats])
        uses = self._gather_ranks(local_uses, "statistics_uses")  # (ranks, layers)
        max_uses = int(uses.max())
        rows = [self._padded(number, max_uses) for number in range(len(self._layers))]
        # (ranks, max_uses, values), split by layer
        gathered = self._gather_ranks(torch.cat(rows, dim=1), "statistics").split(
            [row.shape[1] for row in rows], dim=2
        )
        for number, layer in enumerate(self._layers):
            running = torch.cat(self._parts[2 * number : 2 * number + 2])
            m = torch.full_like(running, layer.momentum)
            for rank, count in enumerate(uses[:, number].tolist()):
                for use in range(count):
                    running = (1 - m) * running + m * gathered[number][rank, use]
            for buffer, value in zip(layer.averages, running.chunk(2), strict=True):
                buffer.copy_(value)

    def _padded(self, number: int, max_uses: int) -> torch.Tensor:
        """A layer's batch statistics on this rank, padded with zeros, shape (max_uses, 2 ·
        features).
        """
        mean, _ = self._layers[number].averages
        rows = mean.new_zeros(max_uses, 2 * mean.numel())
        for use, recorded in enumerate(self._batch_stats[number]):
            rows[use] = recorded
        return rows

    def all_reduce(self, sum_ranks: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        """Sum the counts over ranks; the statistics are complete on every rank. Every rank calls
        this together.
        """
        if self._partial and self._layers and self._world_size > 1:
            self._sum_counts(sum_ranks)
        self._partial = False
