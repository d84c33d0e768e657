"""A world of ranks as threads of one process, of which exactly one runs at any time.

The baton changes hands inside collective calls only, and each rank brings its own random generators
with it. So every rank behaves as a process of its own, and a whole run costs no more than its
arithmetic. What takes a time-out to notice among processes is seen at once: ranks that wait for
each other for ever, ranks that call different collectives, or with other names, shapes or types,
and a rank that leaves while others wait for it.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch

from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer

Generators = tuple[Any, Any, Any]


class WorldOver(BaseException):
    """Raised in every rank of a world that has come to its end; no `except Exception` stands in its
    way.
    """


@dataclass
class Ends:
    """How a world ended.

    Attributes:
        results: what each rank returned; None for one that did not come to its end.
        error: what one rank raised alone, and its number; the others were ended by it, as by MPI's
            abort.
        broken: how the ranks' calls did not fit together, in words.
        killed: whether the world was killed as it had been asked to be.
        calls: collective calls that were begun, of all ranks together.
    """

    results: list[Any]
    error: tuple[int, BaseException] | None
    broken: str | None
    killed: bool
    calls: int


@dataclass
class _Meeting:
    """One collective call of all ranks."""

    signature: Any  # must be the same on every rank
    first: int  # the rank that came first
    given: dict[int, Any] = field(default_factory=dict)
    result: Any = None
    complete: bool = False
    read: int = 0


class World:
    """Ranks that take turns.

    Args:
        size: ranks.
        seed: which rank gets the baton next, and with which random generators each rank begins.
        kill_at: the collective call, counted over all ranks from 0, at which every rank ends at
            once; None for none.
    """

    def __init__(self, size: int, seed: int = 0, kill_at: int | None = None) -> None:
        self.size = size
        self.calls = 0
        self._kill_at = kill_at
        self._chance = random.Random(seed)
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._ended = threading.Semaphore(0)
        self._generators = [_fresh_generators(seed, rank) for rank in range(size)]
        self._waits_for: list[_Meeting | None] = [None] * size
        self._left = [False] * size
        self._numbers: list[dict[str, int]] = [{} for _ in range(size)]
        self._meetings: dict[tuple[str, int], _Meeting] = {}
        self._over = False
        self._ends = Ends([None] * size, None, None, False, 0)

    def run(self, action: Callable[[ThreadChannel, ThreadCollectives], Any]) -> Ends:
        """Let every rank do `action` with its two channels, and wait until all have come to an
        end.
        """
        threads = [
            threading.Thread(target=self._live, args=(rank, action), daemon=True)
            for rank in range(self.size)
        ]
        with kept_generators():
            for thread in threads:
                thread.start()
            self._turns[self._chance.randrange(self.size)].release()
            self._ended.acquire()
            for thread in threads:
                thread.join()
        self._ends.calls = self.calls
        return self._ends

    # --- of one rank, while it has the baton

    def begin(
        self, rank: int, wire: str, signature: Any, given: Any, combine: Callable[[list[Any]], Any]
    ) -> _Meeting:
        """Come to this rank's next collective call on `wire`, without waiting for the others."""
        self._count()
        number = self._numbers[rank].get(wire, 0)
        self._numbers[rank][wire] = number + 1
        meeting = self._meetings.setdefault((wire, number), _Meeting(signature, rank))
        if meeting.signature != signature:
            self._break(
                f"call {number} on the wire for {wire} is {_shown(meeting.signature)} on rank "
                f"{meeting.first} and {_shown(signature)} on rank {rank}"
            )
        meeting.given[rank] = given
        if len(meeting.given) == self.size:
            meeting.result = combine([meeting.given[other] for other in range(self.size)])
            meeting.complete = True
            del self._meetings[wire, number]
        return meeting

    def wait(self, rank: int, meeting: _Meeting) -> Any:
        """What came of a collective call, once every rank has come to it. The baton goes on
        meanwhile.
        """
        self._waits_for[rank] = meeting
        self._pass_on(rank)
        self._waits_for[rank] = None
        return meeting.result

    def _count(self) -> None:
        if self._over:
            raise WorldOver
        if self.calls == self._kill_at:
            self._over = self._ends.killed = True
            raise WorldOver
        self.calls += 1

    def _break(self, what: str) -> NoReturn:
        self._ends.broken = self._ends.broken or what
        self._over = True
        raise WorldOver

    def _pass_on(self, rank: int) -> None:
        """Hand the baton to a rank that can go on, perhaps this one, and come back with it."""
        chosen = self._next()
        if chosen is None:
            self._break("the ranks wait for ever: " + ", ".join(self._places()))
        if chosen != rank:
            self._generators[rank] = _generators()
            self._turns[chosen].release()
            self._turns[rank].acquire()
            _set_generators(self._generators[rank])
        if self._over:
            raise WorldOver

    def _places(self) -> Iterator[str]:
        for rank, meeting in enumerate(self._waits_for):
            if self._left[rank]:
                yield f"rank {rank} has left"
            elif meeting is not None:
                yield f"rank {rank} waits in {_shown(meeting.signature)}"

    def _next(self) -> int | None:
        able = [
            other
            for other in range(self.size)
            if not self._left[other] and (self._over or self._can_go_on(other))
        ]
        return self._chance.choice(able) if able else None

    def _can_go_on(self, rank: int) -> bool:
        meeting = self._waits_for[rank]
        return meeting is None or meeting.complete

    def _live(self, rank: int, action: Callable[[ThreadChannel, ThreadCollectives], Any]) -> None:
        self._turns[rank].acquire()
        _set_generators(self._generators[rank])
        try:
            if not self._over:
                self._ends.results[rank] = action(
                    ThreadChannel(self, rank), ThreadCollectives(self, rank)
                )
        except WorldOver:
            pass
        except BaseException as error:
            self._ends.error = self._ends.error or (rank, error)
            self._over = True
        self._left[rank] = True
        self._waits_for[rank] = None
        chosen = self._next()
        if chosen is None and not all(self._left):
            with contextlib.suppress(WorldOver):
                self._pass_on(rank)  # says who waits for whom
            chosen = self._next()
        if chosen is None:
            self._ended.release()
        else:
            self._turns[chosen].release()


class ThreadChannel:
    """The channel for decisions between threads; as `comm.interfaces.ControlChannel`."""

    def __init__(self, world: World, rank: int) -> None:
        self._world = world
        self.rank, self.size = rank, world.size

    def broadcast(self, record: bytes | None, length: int) -> bytes:
        """Rank 0's `record` of exactly `length` bytes, on every rank. Every rank calls this
        together.
        """
        if self.rank == 0 and (record is None or len(record) != length):
            raise ValueError(f"rank 0 must give a record of {length} bytes")
        return self._meet(("broadcast", length), record, lambda given: given[0])

    def allgather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of the ranks. Every rank calls this together."""
        return list(self._meet(("allgather",), bytes(message), lambda given: given))

    def start_max(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Begin to find the largest of each value. Every rank calls this together, and later the
        result.
        """
        numbers = [float(value) for value in values]
        meeting = self._world.begin(
            self.rank, "decisions", ("start_max", len(numbers)), numbers, _largest
        )
        return lambda: list(self._world.wait(self.rank, meeting))

    def barrier(self) -> None:
        """Wait until every rank has come here. Every rank calls this together."""
        self._meet(("barrier",), None, lambda given: None)

    def close(self) -> None:
        """Leave in order. Every rank calls this together."""
        self._meet(("close",), None, lambda given: None)

    def abort(self, code: int) -> NoReturn:
        """End every rank."""
        raise RuntimeError(f"rank {self.rank} ended the run with code {code}")

    def _meet(self, signature: Any, given: Any, combine: Callable[[list[Any]], Any]) -> Any:
        return self._world.wait(
            self.rank, self._world.begin(self.rank, "decisions", signature, given, combine)
        )


class ThreadCollectives:
    """The collectives between threads; as `comm.interfaces.Collectives`."""

    carries_gpu_tensors = False

    def __init__(self, world: World, rank: int) -> None:
        self._world = world
        self.rank = self.local_rank = rank
        self.local_size = world.size

    def broadcast_(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite each named tensor by rank 0's, in place. Every rank calls this together."""
        held = list(tensors)
        given = [tensor.detach().clone() for _, tensor in held] if self.rank == 0 else None
        found = self.meet(
            ("broadcast_", *(_described(*pair) for pair in held)),
            given,
            lambda all_given: all_given[0],
        )
        with torch.no_grad():
            for (_, tensor), value in zip(held, found, strict=True):
                tensor.copy_(value)

    def sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The sum of `tensor` over all ranks, in their order. Every rank calls this together."""
        return self.meet(("sum", _described(name, tensor)), tensor.detach().clone(), added).clone()

    def gather(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Every rank's tensor, stacked in their order. Every rank calls this together."""
        return self.meet(
            ("gather", _described(name, tensor)), tensor.detach().clone(), torch.stack
        ).clone()

    def distributed_optimizer(
        self,
        optimizer: MeanGradientOptimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        compressed: bool = False,
        groups: int | None = None,
    ) -> ThreadOptimizer:
        """Put the sum over all ranks in front of `optimizer`, which must not have any state yet."""
        return ThreadOptimizer(self, optimizer, named_parameters, compressed, groups)

    def close(self) -> None:
        """Leave in order. Every rank calls this together."""
        self.meet(("close",), None, lambda given: None)

    def meet(self, signature: Any, given: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """One collective call of this channel; `combine` makes its result from what all ranks give,
        in their order.
        """
        return self._world.wait(
            self.rank, self._world.begin(self.rank, "tensors", signature, given, combine)
        )


class ThreadOptimizer:
    """An optimizer behind a sum over threads, with the ways of Horovod's `DistributedOptimizer`.

    The optimizer's class is made anew from its groups; a tensor travels as it is behind its last
    expected backward pass, and one more pass is an error; missing gradients travel as zeros, so
    that every parameter has a gradient afterwards.
    """

    def __init__(
        self,
        tensors: ThreadCollectives,
        optimizer: MeanGradientOptimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        compressed: bool,
        groups: int | None,
    ) -> None:
        if optimizer.state:
            raise ValueError("the optimizer has state already; Horovod would drop it")
        names = [name for name, _ in named_parameters]
        if len(set(names)) != len(names):
            raise ValueError(f"names must be unique: {names}")
        held = {id(weight) for _, weight in named_parameters}
        if any(
            id(weight) not in held for group in optimizer.param_groups for weight in group["params"]
        ):
            raise ValueError("a parameter of the optimizer has no name")
        self._tensors = tensors
        self._named = sorted(named_parameters)
        self._compressed, self._groups = compressed, groups
        kind: Any = type(optimizer)
        self.optimizer: MeanGradientOptimizer = kind(optimizer.param_groups)
        self._left: dict[torch.Tensor, int] = {}
        self._sent: dict[torch.Tensor, torch.Tensor] = {}
        for _, weight in named_parameters:
            weight.register_post_accumulate_grad_hook(self._passed)

    def zero_grad(self, numbers: range, num_micro_batches: int) -> None:
        """Drop the old gradients and expect a backward pass for each of this rank's
        micro-batches.
        """
        self.optimizer.zero_grad()
        self._left = {weight: max(1, len(numbers)) for _, weight in self._named}
        self._sent = {}

    def backward(self, loss: torch.Tensor) -> None:
        """One backward pass."""
        loss.backward()

    def backward_done(self) -> None:
        """Nothing to do: the hooks have counted the pass."""

    def synchronize(self) -> None:
        """Let each gradient be the sum over all ranks. Every rank calls this together."""
        numbers = [self._travels(weight) for _, weight in self._named]
        described = [
            _described(name, grad) for (name, _), grad in zip(self._named, numbers, strict=True)
        ]
        sums = self._tensors.meet(
            ("reduce", self._groups, self._compressed, *described), numbers, _added_each
        )
        for (_, weight), total in zip(self._named, sums, strict=True):
            weight.grad = total.to(weight.dtype).clone()

    def apply(self, norms: GradientNorms, lr: float) -> None:
        """Move the weights with the reduced gradients."""
        self.optimizer.update(norms, lr)

    def _passed(self, weight: torch.Tensor) -> None:
        if weight not in self._left:  # before the first step, when somebody tries the model out
            return
        if self._left[weight] == 0:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to "
                "step()"
            )
        self._left[weight] -= 1
        if self._left[weight] == 0:
            self._sent[weight] = self._of(weight)

    def _travels(self, weight: torch.Tensor) -> torch.Tensor:
        return self._sent.pop(weight) if weight in self._sent else self._of(weight)

    def _of(self, weight: torch.Tensor) -> torch.Tensor:
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()
        return grad.half() if self._compressed and grad.is_floating_point() else grad


class LoneChannel(SoloChannel):
    """One worker's own channel, whose calls are counted, and which can be killed at one of them.

    Args:
        kill_at: the call, counted from 0, at which the world ends; None for none.
    """

    def __init__(self, kill_at: int | None = None) -> None:
        self.calls = 0
        self._kill_at = kill_at

    def broadcast(self, record: bytes | None, length: int) -> bytes:
        """As the solo channel's."""
        self._count()
        return super().broadcast(record, length)

    def allgather(self, message: bytes) -> list[bytes]:
        """As the solo channel's."""
        self._count()
        return super().allgather(message)

    def start_max(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """As the solo channel's."""
        self._count()
        return super().start_max(values)

    def _count(self) -> None:
        if self.calls == self._kill_at:
            raise WorldOver
        self.calls += 1


def alone(action: Callable[[Any, Any], Any], seed: int = 0, kill_at: int | None = None) -> Ends:
    """As `World.run`, for the engine's own channels of a single worker, in this thread."""
    control = LoneChannel(kill_at)
    ends = Ends([None], None, None, False, 0)
    with kept_generators():
        _set_generators(_fresh_generators(seed, 0))
        try:
            ends.results = [action(control, SoloCollectives())]
        except WorldOver:
            ends.killed = True
        except Exception as error:
            ends.error = (0, error)
    ends.calls = control.calls
    return ends


def run_world(
    size: int, action: Callable[[Any, Any], Any], seed: int = 0, kill_at: int | None = None
) -> Ends:
    """Let each of `size` ranks do `action` with its two channels: the solo ones of a single worker,
    or threads.
    """
    return alone(action, seed, kill_at) if size == 1 else World(size, seed, kill_at).run(action)


def added(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors, in their order."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _largest(rows: list[list[float]]) -> list[float]:
    return [max(column) for column in zip(*rows, strict=True)]


def _added_each(rows: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [added(column) for column in zip(*rows, strict=True)]


def _described(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    return (name, tuple(tensor.shape), tensor.dtype, tensor.layout)


def _shown(signature: Any) -> str:
    text = str(signature)
    return text if len(text) < 300 else text[:300] + "…"


# --- the random generators of a process


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Leave the process's own random generators as they were."""
    before = _generators()
    try:
        yield
    finally:
        _set_generators(before)


def _generators() -> Generators:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_generators(states: Generators) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def _fresh_generators(seed: int, rank: int) -> Generators:
    """Generators as a new process has them: of no other process, and of no other start of it."""
    with kept_generators():
        number = (seed * 1_000_003 + rank) % 2**32
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        return _generators()
