"""Running statistics of batch normalisation, bit for bit the same on 1, 2, 4, … workers.

Formula:  running ← (1 − m)·running + m·batch for each micro-batch of a step, in the order of the step, on every worker alike
Contract: the statistics of each micro-batch are gathered at the end of a step and followed by all workers in one order, at the
          price of a message for each step. The fast form, and what it promises, is in running_statistics.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hvdlarge.models.running_statistics import RunningStatistics


class ExactStatistics(RunningStatistics):
    """As RunningStatistics, with the same calls; `gather` finds nothing to do, since every rank has everything always.

    Args:
        model: the model; its buffers are changed in place.
        rank: this worker.
        gather_ranks: every worker's tensor, stacked in the order of the ranks, given a name for it.
    """

    def __init__(self, model: nn.Module, rank: int, gather_ranks: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        super().__init__(model, rank)
        self._gather_ranks = gather_ranks
        self._seen: list[torch.Tensor] = []
        self._kept = torch.empty(0)

    def scatter(self) -> None:
        """Before training: see which layers train."""
        self._choose_layers()
        self._scattered = True

    def begin_step(self, others_before: int) -> None:
        """Keep the running statistics and let each pass write the batch's own in their place."""
        self._seen = []
        self._kept = self.partials()
        for _, layer, _ in self._layers:
            layer.momentum = 1.0  # running ← 0·running + 1·batch: the batch's statistics as they are

    def end_pass(self) -> None:
        """Note the statistics of the micro-batch that has passed."""
        if self._layers:
            self._seen.append(self.partials())

    def end_step(self, others_behind: int, num_micro_batches: int) -> None:
        """Follow all micro-batches of the step in their order. Every rank calls this together."""
        for _, layer, momentum in self._layers:
            layer.momentum = momentum
        self._micro_batches += num_micro_batches
        if not self._layers:
            return
        rows = torch.zeros(num_micro_batches, self._kept.numel(), dtype=self._kept.dtype, device=self._kept.device)
        first = num_micro_batches - others_behind - len(self._seen)
        for number, seen in enumerate(self._seen):
            rows[first + number] = seen
        gathered = self._gather_ranks(rows, "statistics")  # (ranks, micro-batches, values); each row is one rank's
        owners = self._gather_ranks(torch.tensor([first, len(self._seen)]), "statistics_owners").tolist()
        running = self._kept
        momenta = torch.cat([torch.full((2 * _size(layer),), m, dtype=running.dtype) for _, layer, m in self._layers])
        momenta = momenta.to(running.device)
        for rank, (start, count) in enumerate(owners):
            for number in range(start, start + count):
                running = (1 - momenta) * running + momenta * gathered[rank, number]
        self.restore_partials(running)

    def gather(self, total: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        """Hold the counts against each other; the statistics themselves are everywhere. Every rank calls this together."""
        if self._scattered and self._layers:
            self._gather_counts(total)
        self._scattered = False


def _size(layer: nn.modules.batchnorm._BatchNorm) -> int:
    return layer.num_features
