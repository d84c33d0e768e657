"""Interfaces for communication between workers, and the errors that they raise.

Two channels (docs/design.md): tensors go over Horovod, decisions over MPI. Both
have a solo form, so the code above them never asks whether it runs alone. Only
`horovod_backend.py` knows Horovod and only `mpi_backend.py` mpi4py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    import torch

    from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer


class WorldMismatchError(Exception):
    """A component is missing, or the components see different worlds (exit code 3)."""


class RankLostError(Exception):
    """A collective failed because another rank has exited (exit code 76)."""


class CollectiveMismatchError(Exception):
    """Ranks called a collective with different names, shapes or dtypes (exit code 71)."""


class CollectiveError(Exception):
    """A collective failed otherwise, e.g. in NCCL or CUDA, with their message (exit code 70)."""


class ControlChannel(Protocol):
    """Small messages of bytes. Every method but `abort` is collective: every rank calls it
    together, in one order.
    """

    rank: int
    size: int

    def broadcast(self, record: bytes | None, length: int) -> bytes:
        """Rank 0's `record` of exactly `length` bytes, on every rank (the others pass None)."""
        ...

    def allgather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of the ranks, on every rank."""
        ...

    def start_max(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Start an element-wise maximum over ranks, of equally many values on each.

        Returns:
            A function that waits for it and returns the maxima, in order.
        """
        ...

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        ...

    def close(self, last: bool = True) -> None:
        """Close the channel, after the collectives. A rank that exits without closing it makes the
        launcher abort the others.

        Args:
            last: whether this process opens no other channel afterwards.
        """
        ...

    def abort(self, code: int) -> NoReturn:
        """End every process of the run with this exit code, at once. Any single rank may call
        it.
        """
        ...


class DistributedOptimizer(Protocol):
    """An optimizer whose gradients are summed over all workers before it updates the weights."""

    optimizer: MeanGradientOptimizer

    def zero_grad(self, numbers: range, num_micro_batches: int) -> None:
        """Drop the old gradients and expect a backward pass for each of this worker's
        micro-batches.

        Called before the first backward pass of each step.

        Args:
            numbers: their indices within the step; empty for an idle worker.
            num_micro_batches: of all workers together.
        """
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of `loss`, a micro-batch's share of the step's, shape ().

        Raises:
            RankLostError, CollectiveMismatchError, CollectiveError: if all-reduces overlap with the
                backward pass and one fails.
        """
        ...

    def backward_done(self) -> None:
        """Called after each backward pass of this worker."""
        ...

    def synchronize(self) -> None:
        """Wait until each gradient is the sum over all workers' micro-batches. Every rank calls
        this together.
        """
        ...

    def apply(self, norms: GradientNorms, lr: float) -> None:
        """Update the weights with the reduced gradients. Called after `synchronize`; needs no
        other worker.

        Args:
            norms: of the reduced gradients, from `optimizer.measure`.
            lr: learning rate of this step, ≥ 0.
        """
        ...


class Collectives(Protocol):
    """Tensors between workers. Every method is collective: every rank calls it together, in one
    order.
    """

    local_rank: int
    local_size: int
    supports_gpu_tensors: bool
    needs_own_gpus: bool  # whether two workers cannot share one

    def broadcast_(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite each named tensor by rank 0's, in place. Names, shapes and types are the same
        on every rank.
        """
        ...

    def sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The sum of `tensor` over all workers, as a new tensor of its shape and dtype on every
        rank.
        """
        ...

    def gather(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Every worker's tensor, of one shape on all, shape (world_size, *shape), in the order of
        the ranks.
        """
        ...

    def distributed_optimizer(
        self,
        optimizer: MeanGradientOptimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        compressed: bool = False,
        groups: int | None = None,
    ) -> DistributedOptimizer:
        """Wrap `optimizer` so that gradients are summed over workers before each update. It must
        not have any state yet.

        Args:
            optimizer: plain.
            named_parameters: all of its parameters, with their names.
            compressed: whether gradients are sent and summed in fp16.
            groups: number of groups in which gradients are all-reduced; None: one all-reduce each.
        """
        ...

    def close(self) -> None:
        """Stop, before the control channel is closed."""
        ...
