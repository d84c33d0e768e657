"""The gradients of single micro-batches, taken from the backward passes that train anyway."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.telemetry.gradient_noise import MicroBatchGradient

_RECORD = struct.Struct("<dd")


class PassGradients:
    """Squares of the gradients of a step's passes on this worker.

    Hooks on the parameters see the gradient of each pass before it is added to those of the passes
    before, and before Horovod sums it over the workers.

    Args:
        weights: the trainable parameters.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter]) -> None:
        self._weights = list(weights)
        self._parts: list[torch.Tensor] = []
        self._passes: list[tuple[torch.Tensor | float, torch.Tensor]] = []

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Observe the backward passes within the `with` block."""
        self._parts, self._passes = [], []
        hooks = [weight.register_hook(self._add) for weight in self._weights]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, gradient: torch.Tensor) -> None:
        wide = torch.float32 if gradient.dtype in (torch.float16, torch.bfloat16) else None
        self._parts.append(torch.linalg.vector_norm(gradient.detach(), dtype=wide))

    def end_pass(self, weight: torch.Tensor | float) -> None:
        """Close a pass whose loss has the weight `weight`, such as its number of samples. Does not
        wait for the device.
        """
        if self._parts:
            square = torch.stack(self._parts).double().square().sum()
            self._passes.append((weight, square))
        self._parts = []

    def gather(
        self, control: ControlChannel, global_batch: int, scale: float
    ) -> list[MicroBatchGradient]:
        """Those of all workers, in the order of the micro-batches. Every rank calls this together.

        Args:
            control: the channel between the ranks.
            global_batch: samples of the step, by which every loss was divided.
            scale: by which every loss was multiplied.
        """
        own = b"".join(
            _RECORD.pack(float(weight), square.item()) for weight, square in self._passes
        )
        self._passes = []
        passes = [each for part in control.allgather(own) for each in _RECORD.iter_unpack(part)]
        total = sum(weight for weight, _ in passes)
        return [
            MicroBatchGradient(
                weight * global_batch / total, square * (global_batch / (weight * scale)) ** 2
            )
            if weight
            else MicroBatchGradient(0.0, square)
            for weight, square in passes
        ]
