"""Both channels for a single worker: no Horovod, no MPI, the same calls."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

    from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer


class SoloChannel:
    """The control channel of a single worker: collectives return their input."""

    rank = 0
    size = 1

    def broadcast(self, record: bytes | None, length: int) -> bytes:
        """`record` itself."""
        if record is None or len(record) != length:
            raise ValueError(f"rank 0 must give a record of {length} bytes")
        return record

    def allgather(self, message: bytes) -> list[bytes]:
        """The one message."""
        return [message]

    def start_max(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Return a function that returns `values`."""
        return lambda: list(values)

    def barrier(self) -> None:
        """Do nothing."""

    def close(self, last: bool = True) -> None:
        """Do nothing."""

    def abort(self, code: int) -> NoReturn:
        """End this process with this exit code, at once."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class SoloCollectives:
    """A world of one: every sum has one term."""

    local_rank = 0
    local_size = 1
    supports_gpu_tensors = True
    needs_own_gpus = False

    def broadcast_(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Do nothing."""

    def sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """A copy of `tensor`."""
        return tensor.clone()

    def gather(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The one tensor, stacked."""
        return tensor.clone().unsqueeze(0)

    def distributed_optimizer(
        self,
        optimizer: MeanGradientOptimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        compressed: bool = False,
        groups: int | None = None,
    ) -> SoloOptimizer:
        """`optimizer` behind the calls that the step makes."""
        return SoloOptimizer(optimizer)

    def close(self) -> None:
        """Do nothing."""


class SoloOptimizer:
    """A plain optimizer with the calls of a summed one."""

    def __init__(self, optimizer: MeanGradientOptimizer) -> None:
        self.optimizer = optimizer

    def zero_grad(self, numbers: range, num_micro_batches: int) -> None:
        """Drop the old gradients."""
        self.optimizer.zero_grad()

    def backward(self, loss: torch.Tensor) -> None:
        """Add its gradients."""
        loss.backward()

    def backward_done(self) -> None:
        """Do nothing: autograd has accumulated the gradients."""

    def synchronize(self) -> None:
        """The gradients of one worker are the sum already."""

    def apply(self, norms: GradientNorms, lr: float) -> None:
        """Update the weights."""
        self.optimizer.update(norms, lr)
