"""Running statistics of batch normalisation that do not depend on the number of workers.

Formula:  running ← (1 − m)·running + m·batch, once for each use of the layer, in the order of the
          step's micro-batches. This is linear, so the running statistics are the sum over ranks of
          partial statistics P: before training, P is the buffers on rank 0 and zero on the other
          ranks. In a step each rank starts from zero and accumulates the contribution A of its own
          micro-batches. With u uses of the layer in the step, a of them after this rank's
          micro-batches,  P ← (1 − m)^u · P + (1 − m)^a · A.
Source:   docs/design.md.
Contract: a step needs no communication if each layer is used once per micro-batch; otherwise (a
          layer used twice, recomputed or skipped) the ranks gather their counts. Every rank calls
          `all_reduce` together before the buffers are read, and `to_partial` before training
          continues. Layers in evaluation mode keep their statistics. Layers must not read their
          running statistics during training, which preflight/rehearsal.py checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hvdlarge.models.state import Modules, named_modules
from hvdlarge.schedule.batch import BatchLayout

_BatchNorm = nn.modules.batchnorm._BatchNorm
# (tensor, name) -> every rank's tensor, stacked in the order of the ranks
GatherRanks = Callable[[torch.Tensor, str], torch.Tensor]


class NormLayer(NamedTuple):
    """A batch normalisation layer with running statistics."""

    name: str
    module: _BatchNorm
    momentum: float

    @property
    def averages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Running mean and variance, shape (features,) each."""
        assert self.module.running_mean is not None  # ensured by tracking_layers
        assert self.module.running_var is not None
        return self.module.running_mean, self.module.running_var

    @property
    def uses(self) -> torch.Tensor:
        """Number of forward passes in training mode, shape (), int64."""
        assert self.module.num_batches_tracked is not None  # likewise
        return self.module.num_batches_tracked


class ModeChangedError(ValueError):
    """A layer switched between training and evaluation mode in a forward pass; raised on every
    rank.
    """


class Snapshot(NamedTuple):
    """A state of RunningStatistics, see `RunningStatistics.snapshot`."""

    local_stats: torch.Tensor
    counts: list[int]
    partial: bool


def tracking_layers(modules: Modules) -> list[NormLayer]:
    """Every layer with running statistics, in training mode or not.

    Raises:
        ValueError: for an unsupported layer: momentum=None (its cumulative average depends on the
            counts of all ranks), no num_batches_tracked, statistics shared with another layer, or
            instance normalisation.
    """
    layers: list[NormLayer] = []
    owners: dict[int, str] = {}
    for name, module in named_modules(modules):
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            if module.momentum is None:
                raise ValueError(
                    f"batch normalisation {name!r} has momentum=None; give it a number such as 0.1"
                )
            if module.num_batches_tracked is None:
                raise ValueError(f"batch normalisation {name!r} does not count its batches")
            layer = NormLayer(name, module, module.momentum)
            layers.append(layer)
            for buffer in (*layer.averages, layer.uses):
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
    return layers


class RunningStatistics:
    """The running means and variances of batch normalisation layers.

    Args:
        modules: the trained modules, whose buffers are changed in place; must be in training mode
            when `to_partial` is called.
        rank: of this worker.
        world_size: number of workers.
        gather_ranks: see GatherRanks.

    Raises:
        ValueError: see `tracking_layers`.
    """

    def __init__(
        self, modules: Modules, rank: int, world_size: int, gather_ranks: GatherRanks
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._gather_ranks = gather_ranks
        self._tracking = tracking_layers(modules)
        self._layers: list[NormLayer] = []  # those of _tracking that are in training mode
        self._partial = False  # whether the buffers hold this rank's partial statistics
        self._parts: list[torch.Tensor] = []  # P of each buffer, during a step
        self._counts: list[int] = []  # uses of each layer at the start of the step
        self._used: list[int] = []  # uses of each layer in the step, on this rank
        self._modes: list[bool] = []  # training mode of each of _tracking, at to_partial
        self._first_counts: list[int] = []  # uses of each layer, at to_partial

    def partial_buffers(self) -> set[int]:
        """The ids of the buffers that differ between ranks during training."""
        return self.followed_buffers() if self._world_size > 1 else set()

    def followed_buffers(self) -> set[int]:
        """The ids of the buffers that change during training."""
        return {id(buffer) for layer in self._layers for buffer in (*layer.averages, layer.uses)}

    # --- in a step

    def begin_step(self) -> None:
        """Set the buffers to zero, keeping this rank's partial statistics aside."""
        if self._world_size > 1 and self._layers:
            buffers = self._buffers()
            self._parts = [buffer.clone() for buffer in buffers]
            torch._foreach_zero_(buffers)

    def count_uses(self, micro_batches: int) -> bool:
        """Count the uses of each layer in the step on this rank.

        Synchronises with the GPU, as does the all-reduce that follows.

        Returns:
            Whether a layer was not used once per micro-batch, or changed its mode.
        """
        if not self._tracking:
            return False
        if self._world_size > 1 and self._layers:
            counts = self._read_counts()
            self._used = [
                count - before for count, before in zip(counts, self._counts, strict=True)
            ]
            self._counts = counts
        changed = [layer.module.training for layer in self._tracking] != self._modes
        return changed or any(used != micro_batches for used in self._used)

    def end_step(self, layout: BatchLayout, uneven: bool) -> None:
        """Update this rank's partial statistics for the whole step. Every rank calls this together,
        after `count_uses`.

        Args:
            layout: of the step.
            uneven: whether `count_uses` returned True on any rank.

        Raises:
            ModeChangedError: on every rank, if a layer has changed its mode on any rank since
                `to_partial`.
        """
        if uneven:
            self._refuse_changed_modes()
        if self._world_size == 1 or not self._layers:
            return
        after, total = self._uses_in_step(layout, uneven)
        for number, layer in enumerate(self._layers):
            parts = self._parts[2 * number : 2 * number + 2]
            for buffer, part in zip(layer.averages, parts, strict=True):
                buffer.mul_((1 - layer.momentum) ** after[number])
                buffer.add_(part, alpha=(1 - layer.momentum) ** total[number])

    def _refuse_changed_modes(self) -> None:
        modes = torch.tensor([layer.module.training for layer in self._tracking])
        changed = (modes != torch.tensor(self._modes)).long()
        changes = self._gather_ranks(changed, "running_statistics.modes").sum(dim=0)
        if changes.any():
            layer = self._tracking[int(changes.nonzero()[0])]
            raise ModeChangedError(
                f"batch normalisation {layer.name!r} changed between training and evaluation mode "
                "in a forward pass; its mode may change only in the model's "
                "train(), which is called before training and after evaluations"
            )

    def _uses_in_step(self, layout: BatchLayout, uneven: bool) -> tuple[list[int], list[int]]:
        """Uses of each layer after this rank's micro-batches, and in the whole step."""
        if uneven:
            uses = self._gather_ranks(
                torch.tensor(self._used, dtype=torch.int64), "running_statistics.uses"
            )
            return uses[self._rank + 1 :].sum(dim=0).tolist(), uses.sum(dim=0).tolist()
        after = layout.num_micro_batches - layout.numbers_of_rank(self._rank).stop
        return [after] * len(self._layers), [layout.num_micro_batches] * len(self._layers)

    # --- between steps

    def to_partial(self) -> None:
        """Before training: rank 0 keeps the running statistics, other ranks set them to zero."""
        self._record_modes()
        if self._rank != 0:
            for buffer in self._buffers():
                buffer.zero_()
        self._partial = True

    def _record_modes(self) -> None:
        self._modes = [layer.module.training for layer in self._tracking]
        self._layers = [layer for layer in self._tracking if layer.module.training]
        self._first_counts = self._counts = self._read_counts()

    def local_stats(self) -> torch.Tensor:
        """A copy of this rank's partial statistics, concatenated, shape (values,)."""
        return (
            torch.cat([buffer.reshape(-1) for buffer in self._buffers()])
            if self._layers
            else torch.empty(0)
        )

    def restore_local_stats(self, local_stats: torch.Tensor) -> None:
        """Copy what `local_stats` returned back into the buffers."""
        parts = (
            local_stats.split([buffer.numel() for buffer in self._buffers()])
            if self._layers
            else ()
        )
        for buffer, part in zip(self._buffers(), parts, strict=True):
            buffer.copy_(part)

    def snapshot(self) -> Snapshot:
        """A copy of everything that changes in a step, for `restore`."""
        return Snapshot(self.local_stats(), self._read_counts(), self._partial)

    def restore(self, snapshot: Snapshot) -> None:
        """Return to the state of `snapshot`."""
        self.restore_local_stats(snapshot.local_stats)
        self._set_counts(snapshot.counts)
        self._partial = snapshot.partial

    def all_reduce(self, sum_ranks: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        """Give every rank the full running statistics. Every rank calls this together.

        Args:
            sum_ranks: (tensor, name) -> the sum of the tensor over all ranks.
        """
        if not self._partial:
            return
        self._partial = False
        if not self._layers or self._world_size == 1:
            return
        self._sum_counts(sum_ranks)
        for number, buffer in enumerate(self._buffers()):
            buffer.copy_(sum_ranks(buffer, f"running_statistics.{number}"))

    def _sum_counts(self, sum_ranks: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        first = torch.tensor(self._first_counts, dtype=torch.int64)
        local_uses = torch.tensor(self._read_counts(), dtype=torch.int64) - first
        self._set_counts((first + sum_ranks(local_uses, "running_statistics.used")).tolist())

    def _read_counts(self) -> list[int]:
        """The uses of each layer so far; synchronises with the GPU once."""
        return torch.stack([layer.uses for layer in self._layers]).tolist() if self._layers else []

    def _set_counts(self, counts: Sequence[int]) -> None:
        for layer, count in zip(self._layers, counts, strict=True):
            layer.uses.fill_(count)
        self._counts = list(counts)

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for layer in self._layers for buffer in layer.averages]
