"""The state that a recurrent model carries along the lanes of a text, from one sample to the next.

Formula:  the pass of sample s begins with the state that the pass of sample s − K has left, K being
          the number of lanes, and with zeros where s is the first sample of its lane in its epoch
Source:   truncated back-propagation through time: no gradient flows into an earlier sample.
Contract: the states belong to the lanes, not to the workers: their values do not depend on who has
          computed them. Each worker has room for every lane. A lane's newest state is on the
          worker that processed the lane's latest sample, which every rank knows from the layouts
          of the steps alone. All states are shared, bit for bit, before a checkpoint and before a
          step in which some worker needs one that another has: never while a constant batch
          divides K, at worst before every step. A skipped step leaves the states as they were
          before it, except that lanes which began in it begin with zeros again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hvdlarge.data.batches import changed_leaves, leaves, twofold
from hvdlarge.data.lanes import Lanes, Positions
from hvdlarge.exits import JobError, PartError
from hvdlarge.schedule.batch import BatchLayout, MicroBatch

_EVERYONE = -1  # in place of a rank: all have the newest state of a lane
# Types of the same size whose sums are exact
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class StateError(PartError):
    """The state of a model cannot be carried."""

    origin = "the model"

    def __init__(self, message: str) -> None:
        super().__init__(
            f"model.name: for data.lanes, advance() must return (outputs, state): {message}"
        )


@dataclass(frozen=True)
class _Leaf:
    """The form of a tensor in a model's state."""

    shape: tuple[int, ...]  # of one sample's part
    dim: int  # of the samples
    dtype: torch.dtype  # in which it is kept: at least 32 bits
    device: torch.device

    def rows(self, tensor: torch.Tensor, size: int) -> torch.Tensor:
        """A copy of a state of `size` samples, shape (size, *shape).

        Raises:
            StateError: for any other shape or device.
        """
        expected = (*self.shape[: self.dim], size, *self.shape[self.dim :])
        if not isinstance(tensor, torch.Tensor) or tensor.shape != expected:
            found = tuple(getattr(tensor, "shape", ())) or type(tensor).__name__
            raise StateError(f"the state of {size} samples was {expected} before, and is {found}")
        if tensor.device != self.device:
            raise StateError(f"the state was on {self.device} before, and is on {tensor.device}")
        # A copy: the model may use the same memory again, or return a part of something larger
        return tensor.detach().movedim(self.dim, 0).to(self.dtype, copy=True)


@dataclass(frozen=True)
class StateForm:
    """The form of a model's state: tensors, or nested lists, tuples and dicts of tensors, of which
    each has one dimension of the size of the micro-batch.
    """

    nested: Any  # with a _Leaf in the place of each tensor

    @classmethod
    def of(cls, state: Any, twice: Any, size: int) -> StateForm:
        """The form of the state of `size` samples, given also that of the same samples twice.

        Raises:
            StateError: for a state of another form.
        """
        found, doubled = leaves(state), leaves(twice)
        if not found:
            raise StateError("this state is empty")
        if len(found) != len(doubled):
            raise StateError(
                f"the state of {size} samples has {len(found)} tensors, of {2 * size} samples "
                f"{len(doubled)}"
            )
        forms = iter([_leaf(one, two, size) for one, two in zip(found, doubled, strict=True)])
        return cls(changed_leaves(state, lambda _: next(forms)))

    @property
    def leaves(self) -> list[_Leaf]:
        """The forms of the tensors, in order."""
        return leaves(self.nested)

    def zeros(self, size: int) -> Any:
        """The state with which `size` samples begin that have none before them."""
        return self.state(
            [
                torch.zeros(size, *leaf.shape, dtype=leaf.dtype, device=leaf.device)
                for leaf in self.leaves
            ]
        )

    def state(self, rows: list[torch.Tensor]) -> Any:
        """The state whose tensors have these values, each of shape (n, *shape)."""
        parts = iter(
            [
                value.movedim(0, leaf.dim).contiguous()
                for value, leaf in zip(rows, self.leaves, strict=True)
            ]
        )
        return changed_leaves(self.nested, lambda _: next(parts))

    def rows(self, state: Any, size: int) -> list[torch.Tensor]:
        """The inverse of `state`.

        Raises:
            StateError: for a state of another form.
        """
        found, expected = leaves(state), self.leaves
        if len(found) != len(expected):
            raise StateError(f"the state had {len(expected)} tensors before, and has {len(found)}")
        return [leaf.rows(value, size) for value, leaf in zip(found, expected, strict=True)]


def _leaf(one: Any, two: Any, size: int) -> _Leaf:
    if not isinstance(one, torch.Tensor):
        raise StateError(f"this state holds {one!r}, which is no tensor")
    if not one.is_floating_point():
        raise StateError(f"this state holds {one.dtype}, and must be of real numbers")
    grown = [
        dim
        for dim in range(one.ndim)
        if one.ndim == two.ndim and (one.shape[dim], two.shape[dim]) == (size, 2 * size)
    ]
    if len(grown) != 1 or two.numel() != 2 * one.numel():
        raise StateError(
            "each tensor of the state needs one dimension for the samples; the shape is "
            f"{tuple(one.shape)} for {size} samples and {tuple(two.shape)} for {2 * size}"
        )
    dim = grown[0]
    shape = (*one.shape[:dim], *one.shape[dim + 1 :])
    return _Leaf(shape, dim, torch.promote_types(one.dtype, torch.float32), one.device)


def find_state_form(advance: Callable[[Any, Any], tuple[Any, Any]], inputs: Any) -> StateForm:
    """The form of a model's state, from a pass of at most two samples, and one of these twice.

    Args:
        advance: (inputs, state or None) -> (outputs, state).
        inputs: of a micro-batch of one sample or more, on the device.

    Raises:
        StateError: for a state that cannot be carried.
    """
    first_two = changed_leaves(
        inputs, lambda value: value[:2] if isinstance(value, torch.Tensor) else value
    )
    size = number_of_samples(first_two)
    with torch.no_grad():
        _, state = advance(first_two, None)
        form = StateForm.of(state, advance(twofold(first_two), None)[1], size)
        kept = form.state(form.rows(state, size))  # as a run carries it
        form.rows(advance(first_two, kept)[1], size)
    return form


def number_of_samples(inputs: Any) -> int:
    """The samples of a micro-batch, by the first dimension of its first tensor.

    Raises:
        StateError: if there is no such tensor.
    """
    for value in leaves(inputs):
        if isinstance(value, torch.Tensor) and value.ndim:
            return len(value)
    raise StateError("its inputs must hold a tensor whose first dimension is the samples")


class CarriedWindow:
    """The states with which a micro-batch begins, and those that it leaves.

    Args:
        states: of all lanes.
        micro_batch: its samples, numbered over the run.
    """

    def __init__(self, states: LaneStates, micro_batch: MicroBatch) -> None:
        self._states, self._size = states, micro_batch.size
        lanes = states.lanes
        # On the device: an upload would make the host wait for it
        samples = torch.arange(micro_batch.start, micro_batch.stop, device=states.device)
        positions = samples % lanes.size
        self._lanes, self._begins = positions % lanes.number, positions < lanes.number
        # At the end of an epoch a lane may occur twice: its later sample counts
        self._last: list[int] | None = None
        if micro_batch.start // lanes.size != (micro_batch.stop - 1) // lanes.size:
            numbers = lanes.positions(micro_batch.start, micro_batch.stop).lanes.tolist()
            self._last = sorted({lane: place for place, lane in enumerate(numbers)}.values())

    def before(self) -> Any:
        """The state with which its samples begin."""
        rows = []
        for tensor in self._states.tensors:
            row = tensor[self._lanes]
            begins = self._begins.view(-1, *(1 for _ in row.shape[1:]))
            rows.append(torch.where(begins, torch.zeros_like(row), row))
        return self._states.form.state(rows)

    def after(self, state: Any) -> None:
        """Keep the state that its samples have left, until the step is accepted.

        Raises:
            StateError: if it has another form than before.
        """
        lanes, rows = self._lanes, self._states.form.rows(state, self._size)
        if self._last is not None:
            lanes, rows = lanes[self._last], [row[self._last] for row in rows]
        self._states.keep(lanes, rows)


class LaneStates:
    """The state of each lane after its last sample; zeros at first.

    Args:
        lanes: of the data set.
        form: of the model's state.
    """

    def __init__(self, lanes: Lanes, form: StateForm) -> None:
        self.lanes, self.form = lanes, form
        self.device = form.leaves[0].device
        self.tensors = [
            torch.zeros(lanes.number, *leaf.shape, dtype=leaf.dtype, device=leaf.device)
            for leaf in form.leaves
        ]
        self._kept: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def window(self, micro_batch: MicroBatch) -> CarriedWindow:
        """The states that a micro-batch uses."""
        return CarriedWindow(self, micro_batch)

    def keep(self, lanes: torch.Tensor, rows: list[torch.Tensor]) -> None:
        """Keep new states of lanes, each of which occurs once, until `accept` or `discard`."""
        self._kept.append((lanes, rows))

    def accept(self) -> None:
        """The states that were kept are those of their lanes."""
        for lanes, rows in self._kept:
            for tensor, row in zip(self.tensors, rows, strict=True):
                tensor[lanes] = row
        self._kept = []

    def discard(self) -> None:
        """Forget the states that were kept."""
        self._kept = []

    def clear(self, lanes: NDArray[np.int64]) -> None:
        """Set the states of some lanes to zeros."""
        if len(lanes):
            for tensor in self.tensors:
                tensor[torch.from_numpy(lanes).to(tensor.device)] = 0


class CarriedState(Protocol):
    """What a replica carries from step to step beside weights and optimizer state. Every rank calls
    `begin_step`, `end_step` and `share` together.
    """

    def begin_step(self, layout: BatchLayout, start: int) -> None:
        """Before the passes of a step whose first sample is number `start` of the run."""
        ...

    def window(self, micro_batch: MicroBatch) -> CarriedWindow | None:
        """The states of a micro-batch of this rank; None if nothing is carried."""
        ...

    def end_step(self, applied: bool) -> None:
        """After the step; `applied` if it has updated the weights."""
        ...

    def share(self) -> None:
        """Give every rank the newest states."""
        ...

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The states on this rank by name, not copied; after `share` the same on every rank."""
        ...

    def restore(self, saved: Mapping[str, torch.Tensor] | None) -> None:
        """Set the states to saved ones, or to zeros. The caller then broadcasts rank 0's.

        Args:
            saved: on rank 0 what `named_tensors` gave, of the same names, shapes and types; or
                None.
        """
        ...


class NoCarriedState:
    """Nothing is carried: samples are independent of each other."""

    def begin_step(self, layout: BatchLayout, start: int) -> None:
        """See CarriedState."""

    def window(self, micro_batch: MicroBatch) -> None:
        """See CarriedState."""
        return

    def end_step(self, applied: bool) -> None:
        """See CarriedState."""

    def share(self) -> None:
        """See CarriedState."""

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """See CarriedState."""
        return {}

    def restore(self, saved: Mapping[str, torch.Tensor] | None) -> None:
        """See CarriedState."""


class CarriedLanes:
    """The states of all lanes, on one of several workers.

    Args:
        states: of all lanes, zeros.
        rank: this worker.
        world_size: workers.
        sum_ranks: (tensor, name) -> the sum of the tensor over all ranks.
    """

    def __init__(
        self,
        states: LaneStates,
        rank: int,
        world_size: int,
        sum_ranks: Callable[[torch.Tensor, str], torch.Tensor],
    ) -> None:
        self._states, self._rank, self._world_size = states, rank, world_size
        self._sum_ranks = sum_ranks
        # Of each lane the rank that has its newest state
        self._holders = np.full(states.lanes.number, _EVERYONE)
        self._step: tuple[Positions, NDArray[np.int64]] | None = (
            None  # its samples, and their ranks
        )

    def begin_step(self, layout: BatchLayout, start: int) -> None:
        """See CarriedState.

        Raises:
            JobError: on every rank, for more samples than lanes, as a measured growth may ask for.
        """
        if layout.global_batch > self._states.lanes.number:
            raise JobError(
                f"data.lanes: the global batch has grown to {layout.global_batch:,} samples, and a "
                f"step takes at most one sample of each of {self._states.lanes.number:,} lanes; "
                "start anew (--fresh) with more lanes, or with a growth that ends there"
            )
        positions = self._states.lanes.positions(start, start + layout.global_batch)
        readers = np.repeat(np.arange(self._world_size), layout.samples_of_ranks())
        holders = self._holders[positions.lanes]
        if ((holders != _EVERYONE) & (holders != readers) & ~positions.begins).any():
            self.share()
        self._step = positions, readers

    def window(self, micro_batch: MicroBatch) -> CarriedWindow:
        """See CarriedState."""
        return self._states.window(micro_batch)

    def end_step(self, applied: bool) -> None:
        """See CarriedState."""
        assert self._step is not None  # begun
        positions, readers = self._step
        if applied:
            self._states.accept()
            # Of a lane that occurs twice, the later one
            self._holders[positions.lanes] = readers
        else:
            self._states.discard()
            begun = positions.lanes[positions.begins]
            self._states.clear(begun)
            self._holders[begun] = _EVERYONE

    def share(self) -> None:
        """See CarriedState."""
        if self._world_size > 1 and (self._holders != _EVERYONE).any():
            others = self._holders != self._rank
            if self._rank == 0:
                others &= self._holders != _EVERYONE
            mask = torch.from_numpy(others)
            for name, tensor in self.named_tensors().items():
                # As integers: a sum of floats would turn −0 into 0
                bits = tensor.view(_BITS[tensor.dtype]).clone()
                bits[mask.to(bits.device)] = 0
                tensor.copy_(self._sum_ranks(bits, name).view(tensor.dtype))
        self._holders[:] = _EVERYONE

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """See CarriedState."""
        return {f"carried.{number}": tensor for number, tensor in enumerate(self._states.tensors)}

    def restore(self, saved: Mapping[str, torch.Tensor] | None) -> None:
        """See CarriedState."""
        self._states.discard()
        for name, tensor in self.named_tensors().items():
            tensor.zero_() if saved is None else tensor.copy_(saved[name])
        self._holders[:] = _EVERYONE
