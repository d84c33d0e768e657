"""Running statistics of batch normalisation, the same on any number of workers.

Formula:  running ← (1 − m)·running + m·batch, once for each use of the layer, in the order of the
          step's micro-batches. This is linear. So with rank 0 holding the running buffers as its
          part P and the other ranks zero, each rank starts a step from zero and finds the
          contribution A of its own block of micro-batches; with u uses of the layer in the
          step, of which a come after the block,  P ← (1 − m)^u · P + (1 − m)^a · A.  The sum over
          ranks is exactly what one worker would have.
Source:   docs/design.md.
Contract: costs no message in a step in which each layer is used once for each micro-batch; where
          one is used more or less often (a layer used twice, recomputed, or skipped by chance) the
          ranks tell each other their counts. `all_reduce` (a sum over ranks) is called by every
          rank together, whenever somebody wants to read the buffers, and `to_partial` before
          training goes on. Layers in evaluation mode keep their statistics. That no layer reads its
          running statistics while it trains is checked before the first step
          (preflight/rehearsal.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hvdlarge.models.state import Modules, named_modules
from hvdlarge.schedule.batch import BatchLayout

_BatchNorm = nn.modules.batchnorm._BatchNorm
# Every worker's tensor, stacked in the order of the ranks
GatherRanks = Callable[[torch.Tensor, str], torch.Tensor]


class NormLayer(NamedTuple):
    """A layer that keeps running statistics."""

    name: str
    module: _BatchNorm
    momentum: float

    @property
    def averages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Running mean and variance, shape (features,) each."""
        assert self.module.running_mean is not None  # tracking_layers takes layers that track them
        assert self.module.running_var is not None
        return self.module.running_mean, self.module.running_var

    @property
    def uses(self) -> torch.Tensor:
        """How often it was used in training mode, shape ()."""
        assert self.module.num_batches_tracked is not None  # likewise
        return self.module.num_batches_tracked


class ModeChangedError(ValueError):
    """A layer went from training to evaluation mode, or back, where nobody looked; raised on every
    rank.
    """


class Snapshot(NamedTuple):
    """What RunningStatistics can go back to."""

    local_stats: torch.Tensor
    counts: list[int]
    scattered: bool


def tracking_layers(modules: Modules) -> list[NormLayer]:
    """Every layer that keeps running statistics, in training mode or not.

    Raises:
        ValueError: for a layer whose statistics the engine cannot keep: with momentum=None, whose
            cumulative average depends on counts that one worker lacks; without a count; that shares
            its statistics with another; instance normalisation.
    """
    found: list[NormLayer] = []
    owners: dict[int, str] = {}
    for name, module in named_modules(modules):
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            if module.momentum is None:
                raise ValueError(
                    f"batch normalisation {name!r} has momentum=None; give it a number such as 0.1"
                )
            if module.num_batches_tracked is None:
                raise ValueError(f"batch normalisation {name!r} does not count its batches")
            found.append(NormLayer(name, module, module.momentum))
            for buffer in (*found[-1].averages, found[-1].uses):
                if owners.setdefault(id(buffer), name) != name:
                    raise ValueError(
                        f"batch normalisation {owners[id(buffer)]!r} and {name!r} share their "
                        "running statistics"
                    )
        elif (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        ):
            raise ValueError(
                f"{name!r}: instance normalisation with running statistics is not supported"
            )
    return found


class RunningStatistics:
    """The running means and variances of batch normalisation layers.

    Args:
        modules: what learns; its buffers are changed in place. In the mode in which it trains when
            `to_partial` is called.
        rank: this worker.
        world_size: workers.
        gather_ranks: see GatherRanks.

    Raises:
        ValueError: as `tracking_layers`.
    """

    def __init__(
        self, modules: Modules, rank: int, world_size: int, gather_ranks: GatherRanks
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._gather_ranks = gather_ranks
        self._tracking = tracking_layers(modules)
        self._layers: list[NormLayer] = []  # of those, the ones that train
        self._partial = False
        self._parts: list[torch.Tensor] = []  # P of each buffer, while a step is under way
        self._counts: list[int] = []  # uses of each layer when the step began
        self._used: list[int] = []  # in the step, on this rank
        # Whether each of _tracking trains, when the statistics were scattered
        self._modes: list[bool] = []
        self._first_counts: list[int] = []  # when the statistics were scattered

    def partial_buffers(self) -> set[int]:
        """The identities of the buffers of which each rank holds a part of its own while a run
        trains.
        """
        return self.followed_buffers() if self._world_size > 1 else set()

    def followed_buffers(self) -> set[int]:
        """The identities of the buffers that change while a run trains."""
        return {id(buffer) for layer in self._layers for buffer in (*layer.averages, layer.uses)}

    # --- in a step

    def begin_step(self) -> None:
        """Let the layers begin the step from zero."""
        if self._world_size > 1 and self._layers:
            buffers = self._buffers()
            self._parts = [buffer.clone() for buffer in buffers]
            torch._foreach_zero_(buffers)

    def count_uses(self, micro_batches: int) -> bool:
        """Look up how often each layer was used in this rank's part of the step; whether that was
        not once for each micro-batch.

        Waits for a GPU, which the sum over workers that follows does too.
        """
        if not self._tracking:
            return False
        if self._world_size > 1 and self._layers:
            counts = self._read_counts()
            self._used = [now - before for now, before in zip(counts, self._counts, strict=True)]
            self._counts = counts
        changed = [layer.module.training for layer in self._tracking] != self._modes
        return changed or any(used != micro_batches for used in self._used)

    def end_step(self, layout: BatchLayout, uneven: bool) -> None:
        """Make this rank's part follow the whole step. Every rank calls this together, after
        `count_uses`.

        Args:
            layout: of the step.
            uneven: whether `count_uses` returned True on any rank.

        Raises:
            ModeChangedError: on every rank, if a layer has changed its mode on any since the
                statistics were scattered.
        """
        if uneven:
            self._refuse_changed_modes()
        if self._world_size == 1 or not self._layers:
            return
        after, everyone = self._uses_in_step(layout, uneven)
        for number, layer in enumerate(self._layers):
            kept, before = (
                (1 - layer.momentum) ** after[number],
                (1 - layer.momentum) ** everyone[number],
            )
            for buffer, part in zip(
                layer.averages, self._parts[2 * number : 2 * number + 2], strict=True
            ):
                buffer.mul_(kept).add_(part, alpha=before)

    def _refuse_changed_modes(self) -> None:
        changed = torch.tensor([layer.module.training for layer in self._tracking]) != torch.tensor(
            self._modes
        )
        numbers = (
            self._gather_ranks(changed.long(), "running_statistics.modes")
            .sum(dim=0)
            .nonzero()
            .flatten()
            .tolist()
        )
        if numbers:
            raise ModeChangedError(
                f"batch normalisation {self._tracking[numbers[0]].name!r} changed between training "
                "and evaluation mode in a forward pass; its mode may change only in the model's "
                "own train(), which is called before training and after evaluations"
            )

    def _uses_in_step(self, layout: BatchLayout, uneven: bool) -> tuple[list[int], list[int]]:
        """How often each layer was used after this rank's block of micro-batches, and in all of the
        step.
        """
        if uneven:
            uses = self._gather_ranks(
                torch.tensor(self._used, dtype=torch.int64), "running_statistics.uses"
            )
            return uses[self._rank + 1 :].sum(dim=0).tolist(), uses.sum(dim=0).tolist()
        after = layout.num_micro_batches - layout.numbers_of_rank(self._rank).stop
        return [after] * len(self._layers), [layout.num_micro_batches] * len(self._layers)

    # --- between steps

    def to_partial(self) -> None:
        """Before training: rank 0 keeps the running statistics, the others go on from zero."""
        self._choose_layers()
        if self._rank != 0:
            for buffer in self._buffers():
                buffer.zero_()
        self._partial = True

    def _choose_layers(self) -> None:
        self._modes = [layer.module.training for layer in self._tracking]
        self._layers = [layer for layer in self._tracking if layer.module.training]
        self._first_counts = self._counts = self._read_counts()

    def local_stats(self) -> torch.Tensor:
        """A copy of this rank's part of the running statistics, as one vector."""
        return (
            torch.cat([buffer.reshape(-1) for buffer in self._buffers()])
            if self._layers
            else torch.empty(0)
        )

    def restore_local_stats(self, local_stats: torch.Tensor) -> None:
        """Put `local_stats`, of an earlier moment, back in place."""
        parts = (
            local_stats.split([buffer.numel() for buffer in self._buffers()])
            if self._layers
            else ()
        )
        for buffer, part in zip(self._buffers(), parts, strict=True):
            buffer.copy_(part)

    def snapshot(self) -> Snapshot:
        """All that changes in a step, to come back to with `restore`."""
        return Snapshot(self.local_stats(), self._read_counts(), self._partial)

    def restore(self, kept: Snapshot) -> None:
        """Go back to what `snapshot` has kept."""
        self.restore_local_stats(kept.local_stats)
        self._set_counts(kept.counts)
        self._partial = kept.scattered

    def all_reduce(self, total: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        """Give every rank the full running statistics. Every rank calls this together.

        Args:
            total: the sum of a tensor over all ranks, given a name for it.
        """
        if not self._partial:
            return
        self._partial = False
        if not self._layers or self._world_size == 1:
            return
        self._gather_counts(total)
        for number, buffer in enumerate(self._buffers()):
            buffer.copy_(total(buffer, f"running_statistics.{number}"))

    def _gather_counts(self, total: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        own = [
            now - first for now, first in zip(self._read_counts(), self._first_counts, strict=True)
        ]
        used = total(torch.tensor(own, dtype=torch.int64), "running_statistics.used").tolist()
        self._set_counts(
            [first + times for first, times in zip(self._first_counts, used, strict=True)]
        )

    def _read_counts(self) -> list[int]:
        """The uses of each layer so far: one wait for a GPU in all."""
        return torch.stack([layer.uses for layer in self._layers]).tolist() if self._layers else []

    def _set_counts(self, counts: Sequence[int]) -> None:
        for layer, count in zip(self._layers, counts, strict=True):
            layer.uses.fill_(count)
        self._counts = list(counts)

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for layer in self._layers for buffer in layer.averages]
