"""The collectives over Horovod: the only file that knows Horovod. Lines that exist because of it
say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from hvdlarge.comm.interfaces import (
    CollectiveError,
    CollectiveMismatchError,
    ControlChannel,
    RankLostError,
    WorldMismatchError,
)
from hvdlarge.exits import InvalidEnvironmentError
from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer


def check_build() -> None:
    """Raise InvalidEnvironmentError if this Horovod was built without MPI."""
    if not hvd.mpi_built():
        raise InvalidEnvironmentError(
            "this Horovod was built without MPI; docker/install-horovod.sh builds it with MPI"
        )


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Translate HorovodInternalError, which Horovod raises for every failure, into the errors of
    comm/interfaces.py.
    """
    try:
        yield
    except HorovodInternalError as error:
        raise error_of(str(error)) from None


def error_of(text: str) -> RankLostError | CollectiveMismatchError | CollectiveError:
    """The error for a HorovodInternalError with the message `text`.

    >>> type(error_of("Mismatched allreduce tensor shapes: ...")).__name__
    'CollectiveMismatchError'
    >>> type(error_of("ncclCommInitRank failed: invalid usage")).__name__
    'CollectiveError'
    """
    if "ismatched" in text:
        return CollectiveMismatchError(text)
    # Horovod's message for every collective after a rank has exited
    if "has been shut down" in text:
        return RankLostError(text)
    return CollectiveError(text)


class HorovodCollectives:
    """Sums and broadcasts over Horovod with its MPI controller."""

    def __init__(self, control: ControlChannel) -> None:
        """Start Horovod on the MPI that the control channel has started. Every rank calls this
        together.

        Raises:
            WorldMismatchError: if Horovod sees other ranks than the control channel.
        """
        hvd.init()
        if (hvd.size(), hvd.rank()) != (control.size, control.rank):
            raise WorldMismatchError(
                f"Horovod sees rank {hvd.rank()} of {hvd.size()}, MPI sees rank {control.rank} of "
                f"{control.size}: Horovod and mpi4py use two MPIs, or Horovod runs over Gloo; "
                "build both with docker/install-horovod.sh and start with mpirun or horovodrun "
                "--mpi"
            )
        self.local_rank: int = hvd.local_rank()
        self.local_size: int = hvd.local_size()
        self.supports_gpu_tensors: bool = bool(hvd.cuda_built() or hvd.rocm_built())
        self.needs_own_gpus: bool = bool(hvd.nccl_built())

    def broadcast_(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite each named tensor by rank 0's, in place. Every rank calls this together."""
        with _translated_errors():
            handles = []
            for name, tensor in tensors:
                # Explicit names: with generated ones, ranks could mismatch tensors or deadlock
                if tensor.dtype in _CARRIED and tensor.is_contiguous():
                    handle = hvd.broadcast_async_(tensor, root_rank=0, name=f"broadcast.{name}")
                    handles.append(handle)
                    continue
                # Horovod rejects other types and non-contiguous tensors: broadcast their bytes
                carried = tensor.contiguous().reshape(-1).view(torch.uint8)
                hvd.broadcast_(carried, root_rank=0, name=f"broadcast.{name}")
                tensor.copy_(carried.view(tensor.dtype).reshape(tensor.shape))
            for handle in handles:
                hvd.synchronize(handle)

    def sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The sum of `tensor` over all workers, on every rank. Every rank calls this together."""
        with _translated_errors():
            return hvd.allreduce(tensor, op=hvd.Sum, name=f"sum.{name}")

    def gather(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Every worker's tensor, stacked in the order of the ranks. Every rank calls this
        together.
        """
        with _translated_errors():
            return hvd.allgather(tensor.unsqueeze(0).contiguous(), name=f"gather.{name}")

    def distributed_optimizer(
        self,
        optimizer: MeanGradientOptimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        compressed: bool = False,
        groups: int | None = None,
    ) -> HorovodOptimizer:
        """Wrap `optimizer`, which must have no state yet, to all-reduce gradients first."""
        return HorovodOptimizer(optimizer, named_parameters, compressed, groups)

    def close(self) -> None:
        """Stop Horovod. Every rank calls this together, before the control channel is closed."""
        hvd.shutdown()


_CARRIED = frozenset(
    [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64]
)


class HorovodOptimizer:
    """`hvd.DistributedOptimizer`, called as zero_grad, backward passes, synchronize, apply.

    Neither Horovod's accumulation over backward passes nor op=Sum divides. The step scales each
    micro-batch's loss by its share of the global batch instead. That is exact for uneven workers
    too, where an average of averages is not.
    """

    def __init__(
        self,
        optimizer: MeanGradientOptimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        compressed: bool,
        groups: int | None,
    ) -> None:
        if optimizer.state:
            raise ValueError("the optimizer has state already; Horovod would drop it")
        # Horovod re-creates the optimizer's class from its param_groups: nothing may wrap or
        # subclass the result, and whatever is not in the groups is lost. It is therefore the last
        # thing done to an optimizer.
        self.optimizer = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=named_parameters,
            op=hvd.Sum,
            compression=hvd.Compression.fp16 if compressed else hvd.Compression.none,
            # Horovod would make empty ones, and fail
            groups=None if groups is None else min(groups, len(named_parameters)),
        )

    def zero_grad(self, numbers: range, num_micro_batches: int) -> None:
        """Drop the old gradients and expect a backward pass for each of this worker's
        micro-batches.
        """
        self.optimizer.zero_grad()
        # Each worker counts its own passes: the allreduce of a tensor starts after its last one. A
        # worker without any takes part all the same, with zeros that `synchronize` submits for it.
        passes = max(1, len(numbers))
        if passes != self.optimizer.backward_passes_per_step:
            self.optimizer.set_backward_passes_per_step(passes)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a micro-batch's share of the loss; Horovod's hooks all-reduce
        each gradient once it is complete.
        """
        with _translated_errors():
            loss.backward()

    def backward_done(self) -> None:
        """Do nothing: Horovod's hooks have counted the pass."""

    def synchronize(self) -> None:
        """Wait until each gradient is the sum over all workers. Every rank calls this together."""
        with _translated_errors():
            self._complete_groups()
            self.optimizer.synchronize()

    def _complete_groups(self) -> None:
        # `synchronize` would submit the tensors of an incomplete group one by one, while the other
        # ranks wait for the group: an idle worker's, and one whose gradients are not all there
        # (which the consistency check of the step then reports).
        handles = self.optimizer._handles
        for group in self.optimizer._group_counts:
            if group not in handles:
                for weight in group:
                    handles.pop(weight, None)
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)
                handles[group] = self.optimizer._grouped_allreduce_grad_async(group)
                self.optimizer._group_counts[group] = 0

    def apply(self, norms: GradientNorms, lr: float) -> None:
        """Update the weights with the reduced gradients."""
        # Horovod's own `step` would wait for sums once more; what else it does in each step is this
        self.optimizer._synchronized = False
        self.optimizer.update(norms, lr)
