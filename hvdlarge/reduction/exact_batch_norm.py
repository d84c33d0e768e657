"""Running statistics of batch normalisation, bit for bit the same on 1, 2, 4, … workers.

Formula:  running ← (1 − m)·running + m·batch for each use of a layer, in the order of the step's
          micro-batches, on every worker
Contract: the statistics of each use are gathered at the end of a step and followed by all workers
          in one order, at the price of two messages for each step. The fast form, and what it
          promises, is in batch_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvdlarge.models.state import Modules
from hvdlarge.reduction.batch_norm import GatherRanks, RunningStatistics
from hvdlarge.schedule.batch import BatchLayout


class ExactStatistics(RunningStatistics):
    """As RunningStatistics, with the same calls; every rank has the whole statistics always, so
    `all_reduce` only adds up counts.
    """

    def __init__(
        self, modules: Modules, rank: int, world_size: int, gather_ranks: GatherRanks
    ) -> None:
        super().__init__(modules, rank, world_size, gather_ranks)
        # The statistics of each use in the step, by layer: mean and variance in one
        self._seen: list[list[torch.Tensor]] = []
        self._hooks: list[Any] = []

    def partial_buffers(self) -> set[int]:
        """Only the counts differ."""
        return {id(layer.uses) for layer in self._layers} if self._world_size > 1 else set()

    def to_partial(self) -> None:
        """Before training: see which layers train."""
        self._choose_layers()
        self._partial = True

    def begin_step(self) -> None:
        """Keep the running statistics and let each use write the batch's own in their place."""
        self._parts = [buffer.clone() for buffer in self._buffers()]
        self._seen = [[] for _ in self._layers]
        for number, layer in enumerate(self._layers):
            # running ← 0·running + 1·batch: the batch's statistics as they are
            layer.module.momentum = 1.0
            self._hooks.append(layer.module.register_forward_hook(self._note(number)))

    def _note(self, number: int) -> Callable[..., None]:
        def note(module: Any, *_: Any) -> None:
            if module.training:
                self._seen[number].append(torch.cat(self._layers[number].averages))

        return note

    def end_step(self, layout: BatchLayout, uneven: bool) -> None:
        """Follow all uses of the step in their order. Every rank calls this together."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self._layers:
            layer.module.momentum = layer.momentum
        if uneven:
            self._refuse_changed_modes()
        if not self._layers:
            return
        own = torch.tensor([len(seen) for seen in self._seen])
        uses = self._gather_ranks(own, "statistics_uses")  # (ranks, layers)
        most = int(uses.max())
        rows = [self._rows(number, most) for number in range(len(self._layers))]
        gathered = self._gather_ranks(torch.cat(rows, dim=1), "statistics")  # (ranks, most, values)
        gathered = gathered.split([row.shape[1] for row in rows], dim=2)
        for number, layer in enumerate(self._layers):
            running = torch.cat(self._parts[2 * number : 2 * number + 2])
            m = torch.full_like(running, layer.momentum)
            for rank, times in enumerate(uses[:, number].tolist()):
                for use in range(times):
                    running = (1 - m) * running + m * gathered[number][rank, use]
            for buffer, part in zip(layer.averages, running.chunk(2), strict=True):
                buffer.copy_(part)

    def _rows(self, number: int, most: int) -> torch.Tensor:
        """The statistics of a layer's uses on this rank, filled up with zeros, shape (most, 2 ·
        features).
        """
        mean, _ = self._layers[number].averages
        rows = mean.new_zeros(most, 2 * mean.numel())
        for use, seen in enumerate(self._seen[number]):
            rows[use] = seen
        return rows

    def all_reduce(self, total: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        """Add up the counts; the statistics themselves are everywhere. Every rank calls this
        together.
        """
        if self._partial and self._layers and self._world_size > 1:
            self._gather_counts(total)
        self._partial = False
