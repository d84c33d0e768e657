"""Running statistics of batch normalisation, the same on any number of workers.

Formula:  running ← (1 − m)·running + m·batch, once for each micro-batch of a step, in the order of the step.
          This is linear. So with rank 0 starting from the running buffers and the other ranks from zero, each rank updates
          with its own block of micro-batches and multiplies by (1 − m)^(others before it), (1 − m)^(others behind it); the
          sum over ranks is exactly what one worker would have.
Source:   DESIGN of this project, section 5.
Contract: costs no message in a step; `gather` (a sum over ranks) is called by every rank together, whenever somebody wants
          to read the buffers, and `scatter` before training goes on. Layers in evaluation mode keep their statistics. Each
          training layer must be used once in each forward pass: `gather` holds the counts of all ranks against that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

_BatchNorm = nn.modules.batchnorm._BatchNorm


class Kept(NamedTuple):
    """What RunningStatistics can go back to."""

    partials: torch.Tensor
    counts: list[torch.Tensor]
    micro_batches: int
    scattered: bool


class RunningStatistics:
    """The running means and variances of a model's batch normalisation layers.

    Args:
        model: the model; its buffers are changed in place.
        rank: this worker.

    Raises:
        ValueError: for a layer with momentum=None, whose cumulative average depends on counts that one worker lacks.
    """

    def __init__(self, model: nn.Module, rank: int) -> None:
        self._rank = rank
        self._tracking: list[tuple[str, _BatchNorm, float]] = []
        self._layers: list[tuple[str, _BatchNorm, float]] = []  # of those, the ones that train
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                if module.momentum is None:
                    raise ValueError(f"batch normalisation {name!r} has momentum=None; give it a number such as 0.1")
                if module.num_batches_tracked is None:
                    raise ValueError(f"batch normalisation {name!r} does not count its batches")
                self._tracking.append((name, module, module.momentum))
            elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
                raise ValueError(f"{name!r}: instance normalisation with running statistics is not supported")
        self._scattered = False
        self._micro_batches = 0  # of all workers, since the last scatter

    def partial_buffers(self) -> set[str]:
        """Names of the buffers of which each rank holds a part of its own while a run trains."""
        return {
            f"{name}.{buffer}" if name else buffer for name, layer, _ in self._tracking for buffer, _ in layer.named_buffers()
        }

    def begin_step(self, others_before: int) -> None:
        """Make room for the micro-batches that other workers process before this worker's block."""
        self._decay(others_before)

    def end_step(self, others_behind: int, num_micro_batches: int) -> None:
        """Make room for those behind this worker's block; the step had `num_micro_batches` in all."""
        self._decay(others_behind)
        self._micro_batches += num_micro_batches

    def end_pass(self) -> None:
        """Nothing to do: the layers have followed the micro-batch themselves."""

    def scatter(self) -> None:
        """Before training: rank 0 keeps the running statistics, the others go on from zero."""
        self._choose_layers()
        if self._rank != 0:
            for buffer in self._buffers():
                buffer.zero_()
        self._scattered = True

    def partials(self) -> torch.Tensor:
        """A copy of this rank's part of the running statistics, as one vector."""
        return torch.cat([buffer.reshape(-1) for buffer in self._buffers()]) if self._layers else torch.empty(0)

    def restore_partials(self, partials: torch.Tensor) -> None:
        """Put `partials`, of an earlier moment, back in place."""
        parts = partials.split([buffer.numel() for buffer in self._buffers()]) if self._layers else ()
        for buffer, part in zip(self._buffers(), parts, strict=True):
            buffer.copy_(part)

    def keep(self) -> Kept:
        """All that changes in a step, to come back to with `restore`."""
        counts = [layer.num_batches_tracked.clone() for _, layer, _ in self._layers]  # type: ignore[union-attr]
        return Kept(self.partials(), counts, self._micro_batches, self._scattered)

    def restore(self, kept: Kept) -> None:
        """Go back to what `keep` has kept."""
        self.restore_partials(kept.partials)
        for (_, layer, _), count in zip(self._layers, kept.counts, strict=True):
            layer.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
        self._micro_batches, self._scattered = kept.micro_batches, kept.scattered

    def gather(self, total: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        """Give every rank the full running statistics. Every rank calls this together.

        Args:
            total: the sum of a tensor over all ranks, given a name for it.

        Raises:
            ValueError: on every rank alike, if a layer was not used exactly once for each micro-batch.
        """
        if not self._scattered:
            return
        self._scattered = False
        if not self._layers:
            return
        self._gather_counts(total)
        for number, buffer in enumerate(self._buffers()):
            buffer.copy_(total(buffer, f"running_statistics.{number}"))

    def _choose_layers(self) -> None:
        self._layers = [(name, layer, momentum) for name, layer, momentum in self._tracking if layer.training]
        self._start_counts = [_count(layer) for _, layer, _ in self._layers]
        self._micro_batches = 0

    def _gather_counts(self, total: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        counted = [_count(layer) - start for (_, layer, _), start in zip(self._layers, self._start_counts, strict=True)]
        used = total(torch.tensor(counted, dtype=torch.int64), "running_statistics.used").tolist()
        for (name, layer, _), times, start in zip(self._layers, used, self._start_counts, strict=True):
            if times != self._micro_batches:
                raise ValueError(
                    f"batch normalisation {name!r} was used {times} times for {self._micro_batches} micro-batches; with "
                    "running statistics it must be used once in each forward pass, and its mode must not change"
                )
            layer.num_batches_tracked.fill_(start + self._micro_batches)  # type: ignore[union-attr]

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for _, layer, _ in self._layers for buffer in _averages(layer)]

    def _decay(self, micro_batches: int) -> None:
        if micro_batches == 0:
            return
        for _, layer, momentum in self._layers:
            kept = (1 - momentum) ** micro_batches
            for buffer in _averages(layer):
                buffer.mul_(kept)


def _averages(layer: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.running_mean is not None  # RunningStatistics takes layers that track them
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _count(layer: _BatchNorm) -> int:
    assert layer.num_batches_tracked is not None  # likewise
    return int(layer.num_batches_tracked)
