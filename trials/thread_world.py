"""A world whose ranks are threads of one process, exactly one of which runs at any time.

A rank yields to another one in collective calls only, and the random generators are switched with
it. So every rank behaves like a separate process, while a run costs little more than its compute.
Errors that processes notice by a time-out are detected at once: deadlocks, ranks that call
different collectives, or with different names, shapes or dtypes, and ranks that exit while others
wait for them.
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


class WorldEnded(BaseException):
    """Raised in every rank to end the world; a BaseException, so that `except Exception` does not
    catch it.
    """


@dataclass
class WorldOutcome:
    """How a world ended.

    Attributes:
        results: what each rank returned; None for a rank that did not finish.
        error: the rank that raised an error, and the error, which ended the other ranks, as MPI's
            abort does.
        broken: a message if the ranks' collective calls did not match.
        killed: whether the world was killed as requested.
        calls: collective calls that were started, summed over ranks.
    """

    results: list[Any]
    error: tuple[int, BaseException] | None
    broken: str | None
    killed: bool
    calls: int


@dataclass
class _Call:
    """One collective call of all ranks."""

    signature: Any  # must be the same on every rank
    first: int  # the rank that called first
    inputs: dict[int, Any] = field(default_factory=dict)  # by rank
    result: Any = None
    complete: bool = False


class World:
    """Ranks that take turns.

    Args:
        size: number of ranks.
        seed: for the order in which ranks run, and for the random generators of each rank.
        kill_at: number of the collective call, counted over all ranks from 0, at which every rank
            ends; None to never kill.
    """

    def __init__(self, size: int, seed: int = 0, kill_at: int | None = None) -> None:
        self.size = size
        self.calls = 0
        self._kill_at = kill_at
        self._rng = random.Random(seed)
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._ended = threading.Semaphore(0)
        self._generators = [_fresh_generators(seed, rank) for rank in range(size)]
        self._waits_for: list[_Call | None] = [None] * size
        self._exited = [False] * size
        self._numbers: list[dict[str, int]] = [{} for _ in range(size)]  # calls by channel
        self._pending: dict[tuple[str, int], _Call] = {}
        self._ending = False
        self._outcome = WorldOutcome([None] * size, None, None, False, 0)

    def run(self, action: Callable[[ThreadChannel, ThreadCollectives], Any]) -> WorldOutcome:
        """Run `action` on every rank with its two channels, and wait until all have ended."""
        threads = [
            threading.Thread(target=self._run_rank, args=(rank, action), daemon=True)
            for rank in range(self.size)
        ]
        with preserved_generators():
            for thread in threads:
                thread.start()
            self._turns[self._rng.randrange(self.size)].release()
            self._ended.acquire()
            for thread in threads:
                thread.join()
        self._outcome.calls = self.calls
        return self._outcome

    # --- called by the rank that runs

    def start_call(
        self,
        rank: int,
        channel: str,
        signature: Any,
        value: Any,
        combine: Callable[[list[Any]], Any],
    ) -> _Call:
        """Start this rank's next collective call on a channel, without waiting for the others."""
        self._count()
        number = self._numbers[rank].get(channel, 0)
        self._numbers[rank][channel] = number + 1
        call = self._pending.setdefault((channel, number), _Call(signature, rank))
        if call.signature != signature:
            self._break(
                f"call {number} on the channel for {channel} is {_shown(call.signature)} on rank "
                f"{call.first} and {_shown(signature)} on rank {rank}"
            )
        call.inputs[rank] = value
        if len(call.inputs) == self.size:
            call.result = combine([call.inputs[other] for other in range(self.size)])
            call.complete = True
            del self._pending[channel, number]
        return call

    def wait(self, rank: int, call: _Call) -> Any:
        """The result of a collective call; other ranks run until all have started it."""
        self._waits_for[rank] = call
        self._yield(rank)
        self._waits_for[rank] = None
        return call.result

    def _count(self) -> None:
        if self._ending:
            raise WorldEnded
        if self.calls == self._kill_at:
            self._ending = self._outcome.killed = True
            raise WorldEnded
        self.calls += 1

    def _break(self, message: str) -> NoReturn:
        self._outcome.broken = self._outcome.broken or message
        self._ending = True
        raise WorldEnded

    def _yield(self, rank: int) -> None:
        """Let a random rank that can continue run, perhaps this one; returns when it is this rank's
        turn again.
        """
        chosen = self._next()
        if chosen is None:
            self._break("deadlock: " + ", ".join(self._waits()))
        if chosen != rank:
            self._generators[rank] = _generators()
            self._turns[chosen].release()
            self._turns[rank].acquire()
            _set_generators(self._generators[rank])
        if self._ending:
            raise WorldEnded

    def _waits(self) -> Iterator[str]:
        for rank, call in enumerate(self._waits_for):
            if self._exited[rank]:
                yield f"rank {rank} has exited"
            elif call is not None:
                yield f"rank {rank} waits in {_shown(call.signature)}"

    def _next(self) -> int | None:
        ready = [
            rank
            for rank, call in enumerate(self._waits_for)
            if not self._exited[rank] and (self._ending or call is None or call.complete)
        ]
        return self._rng.choice(ready) if ready else None

    def _run_rank(
        self, rank: int, action: Callable[[ThreadChannel, ThreadCollectives], Any]
    ) -> None:
        self._turns[rank].acquire()
        _set_generators(self._generators[rank])
        try:
            if not self._ending:
                self._outcome.results[rank] = action(
                    ThreadChannel(self, rank), ThreadCollectives(self, rank)
                )
        except WorldEnded:
            pass
        except BaseException as error:
            self._outcome.error = self._outcome.error or (rank, error)
            self._ending = True
        self._exited[rank] = True
        self._waits_for[rank] = None
        chosen = self._next()
        if chosen is None and not all(self._exited):
            with contextlib.suppress(WorldEnded):
                self._yield(rank)  # reports the deadlock
            chosen = self._next()
        if chosen is None:
            self._ended.release()
        else:
            self._turns[chosen].release()


class ThreadChannel:
    """A ControlChannel between threads, see comm/interfaces.py."""

    def __init__(self, world: World, rank: int) -> None:
        self._world = world
        self.rank, self.size = rank, world.size

    def broadcast(self, record: bytes | None, length: int) -> bytes:
        """Rank 0's `record` of exactly `length` bytes. Every rank calls this together."""
        if self.rank == 0 and (record is None or len(record) != length):
            raise ValueError(f"rank 0 must give a record of {length} bytes")
        return self._call(("broadcast", length), record, lambda records: records[0])

    def allgather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of the ranks. Every rank calls this together."""
        return list(self._call(("allgather",), bytes(message), lambda messages: messages))

    def start_max(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Start an elementwise maximum over ranks. Every rank calls this together, and later the
        returned function, which waits for the result.
        """
        numbers = [float(value) for value in values]
        call = self._world.start_call(
            self.rank, "decisions", ("start_max", len(numbers)), numbers, _largest
        )
        return lambda: list(self._world.wait(self.rank, call))

    def barrier(self) -> None:
        """Wait for every rank. Every rank calls this together."""
        self._call(("barrier",), None, lambda _: None)

    def close(self, last: bool = True) -> None:
        """Close the channel. Every rank calls this together."""
        self._call(("close",), None, lambda _: None)

    def abort(self, code: int) -> NoReturn:
        """End every rank."""
        raise RuntimeError(f"rank {self.rank} ended the run with code {code}")

    def _call(self, signature: Any, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        call = self._world.start_call(self.rank, "decisions", signature, value, combine)
        return self._world.wait(self.rank, call)


class ThreadCollectives:
    """Collectives between threads, see comm/interfaces.py."""

    supports_gpu_tensors = False

    def __init__(self, world: World, rank: int) -> None:
        self._world = world
        self.rank = self.local_rank = rank
        self.local_size = world.size

    def broadcast_(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite each named tensor by rank 0's, in place. Every rank calls this together."""
        named = list(tensors)
        copies = [tensor.detach().clone() for _, tensor in named] if self.rank == 0 else None
        values = self.call(
            ("broadcast_", *(_described(*pair) for pair in named)),
            copies,
            lambda of_ranks: of_ranks[0],
        )
        with torch.no_grad():
            for (_, tensor), value in zip(named, values, strict=True):
                tensor.copy_(value)

    def sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The sum of `tensor` over all ranks, in their order. Every rank calls this together."""
        return self.call(
            ("sum", _described(name, tensor)), tensor.detach().clone(), sum_in_order
        ).clone()

    def gather(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Every rank's tensor, stacked in their order. Every rank calls this together."""
        return self.call(
            ("gather", _described(name, tensor)), tensor.detach().clone(), torch.stack
        ).clone()

    def distributed_optimizer(
        self,
        optimizer: MeanGradientOptimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        compressed: bool = False,
        groups: int | None = None,
    ) -> ThreadOptimizer:
        """Wrap `optimizer`, which must not have state yet, with a sum of gradients over ranks."""
        return ThreadOptimizer(self, optimizer, named_parameters, compressed, groups)

    def close(self) -> None:
        """Close the channel. Every rank calls this together."""
        self.call(("close",), None, lambda _: None)

    def call(self, signature: Any, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """A collective call: `combine` of the values of all ranks, in their order."""
        call = self._world.start_call(self.rank, "tensors", signature, value, combine)
        return self._world.wait(self.rank, call)


class ThreadOptimizer:
    """Sums gradients over threads with the semantics of Horovod's `DistributedOptimizer`.

    The optimizer is rebuilt from its parameter groups. The gradient of a parameter is taken after
    its last expected backward pass, and a further pass is an error. Missing gradients count as
    zeros, so that every parameter has a gradient afterwards.
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
        known = {id(weight) for _, weight in named_parameters}
        if any(
            id(weight) not in known
            for group in optimizer.param_groups
            for weight in group["params"]
        ):
            raise ValueError("a parameter of the optimizer has no name")
        self._tensors = tensors
        self._named = sorted(named_parameters)
        self._compressed, self._groups = compressed, groups
        kind: Any = type(optimizer)
        self.optimizer: MeanGradientOptimizer = kind(optimizer.param_groups)
        self._remaining_passes: dict[torch.Tensor, int] = {}
        self._taken: dict[torch.Tensor, torch.Tensor] = {}
        for _, weight in named_parameters:
            weight.register_post_accumulate_grad_hook(self._count_pass)

    def zero_grad(self, numbers: range, num_micro_batches: int) -> None:
        """Clear the gradients and expect a backward pass for each of this rank's micro-batches."""
        self.optimizer.zero_grad()
        self._remaining_passes = {weight: max(1, len(numbers)) for _, weight in self._named}
        self._taken = {}

    def backward(self, loss: torch.Tensor) -> None:
        """One backward pass."""
        loss.backward()

    def backward_done(self) -> None:
        """Do nothing: the hooks count the passes."""

    def synchronize(self) -> None:
        """Replace each gradient by its sum over all ranks. Every rank calls this together."""
        grads = [self._take(weight) for _, weight in self._named]
        described = [
            _described(name, grad) for (name, _), grad in zip(self._named, grads, strict=True)
        ]
        sums = self._tensors.call(
            ("reduce", self._groups, self._compressed, *described), grads, _sum_each
        )
        for (_, weight), total in zip(self._named, sums, strict=True):
            weight.grad = total.to(weight.dtype).clone()

    def apply(self, norms: GradientNorms, lr: float) -> None:
        """Update the weights with the summed gradients."""
        self.optimizer.update(norms, lr)

    def _count_pass(self, weight: torch.Tensor) -> None:
        if weight not in self._remaining_passes:  # before the first step, in the rehearsal
            return
        if self._remaining_passes[weight] == 0:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to "
                "step()"
            )
        self._remaining_passes[weight] -= 1
        if self._remaining_passes[weight] == 0:
            self._taken[weight] = self._of(weight)

    def _take(self, weight: torch.Tensor) -> torch.Tensor:
        return self._taken.pop(weight) if weight in self._taken else self._of(weight)

    def _of(self, weight: torch.Tensor) -> torch.Tensor:
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()
        return grad.half() if self._compressed and grad.is_floating_point() else grad


class CountingChannel(SoloChannel):
    """A SoloChannel that counts its calls and can end the world at one of them.

    Args:
        kill_at: number of the call, from 0, at which the world ends; None to never end it.
    """

    def __init__(self, kill_at: int | None = None) -> None:
        self.calls = 0
        self._kill_at = kill_at

    def broadcast(self, record: bytes | None, length: int) -> bytes:
        """See SoloChannel."""
        self._count()
        return super().broadcast(record, length)

    def allgather(self, message: bytes) -> list[bytes]:
        """See SoloChannel."""
        self._count()
        return super().allgather(message)

    def start_max(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """See SoloChannel."""
        self._count()
        return super().start_max(values)

    def _count(self) -> None:
        if self.calls == self._kill_at:
            raise WorldEnded
        self.calls += 1


def run_single(
    action: Callable[[Any, Any], Any], seed: int = 0, kill_at: int | None = None
) -> WorldOutcome:
    """Like `World.run`, in this thread, with the engine's channels for a single worker."""
    control = CountingChannel(kill_at)
    outcome = WorldOutcome([None], None, None, False, 0)
    with preserved_generators():
        _set_generators(_fresh_generators(seed, 0))
        try:
            outcome.results = [action(control, SoloCollectives())]
        except WorldEnded:
            outcome.killed = True
        except Exception as error:
            outcome.error = (0, error)
    outcome.calls = control.calls
    return outcome


def run_world(
    size: int, action: Callable[[Any, Any], Any], seed: int = 0, kill_at: int | None = None
) -> WorldOutcome:
    """Run `action` on each of `size` ranks with its two channels: threads, or the engine's channels
    for a single worker.
    """
    return (
        run_single(action, seed, kill_at) if size == 1 else World(size, seed, kill_at).run(action)
    )


def sum_in_order(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors, added in their order."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _largest(rows: list[list[float]]) -> list[float]:
    return [max(column) for column in zip(*rows, strict=True)]


def _sum_each(rows: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [sum_in_order(column) for column in zip(*rows, strict=True)]


def _described(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    return (name, tuple(tensor.shape), tensor.dtype, tensor.layout)


def _shown(signature: Any) -> str:
    text = str(signature)
    return text if len(text) < 300 else text[:300] + "…"


# --- the random generators of a process


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the global random generators at the end of the `with` block."""
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
    """Generators as in a new process: different for each seed and rank."""
    with preserved_generators():
        number = (seed * 1_000_003 + rank) % 2**32
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        return _generators()
