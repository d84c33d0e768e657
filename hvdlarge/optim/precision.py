"""Number formats of a step, and the loss scaling that they need.

Formula:  gradients of s·loss, divided by s once they are summed over all workers; s a power of two,
          so that nothing is rounded. fp16: s begins at 2¹⁶, is halved at each step whose gradients
          overflow (that step is skipped on every rank), and doubled after 2000 steps without one.
          compression fp16: s is also multiplied by the smallest power of two that is at least the
          number of workers, since what travels is each worker's share of the mean. For a loss
          (sum, weight) s is then divided by the power of two nearest to the weight per sample,
          since the sum is divided by the weight of the step only after the all-reduce.
Source:   Micikevicius et al., "Mixed Precision Training" (2018), section 3.2; the numbers are those
          of torch's GradScaler.
Contract: weights, their gradients and everything in the update stay in 32 (or 64) bits. The order
          in a step: backward, sum over the workers, divide by s, look for what is not finite, clip,
          update. So every rank sees the same s.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from hvdlarge.exits import JobError

_WEIGHTS = {"fp64": torch.float64}
_NARROW = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
_WIDENED = {
    torch.float32: _NARROW,
    torch.float64: dict.fromkeys([torch.float16, torch.bfloat16, torch.float32], torch.float64)
    | dict.fromkeys([torch.complex32, torch.complex64], torch.complex128),
}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LossScaler:
    """The loss scale s = static × dynamic.

    Args:
        static: the part of s that stays.
        dynamic: the part that follows overflows.
    """

    LARGEST, FIRST, STEPS_BEFORE_GROWTH = 2.0**24, 2.0**16, 2000

    def __init__(self, static: float = 1.0, dynamic: float = 1.0) -> None:
        self.static, self.dynamic = static, dynamic

    @property
    def value(self) -> float:
        """The factor s."""
        return self.static * self.dynamic

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The product s·loss."""
        return loss if self.value == 1 else loss * self.value

    def unscale(self, weights: Iterable[torch.Tensor], factor: float = 1.0) -> None:
        """Multiply the gradients of `weights` by factor / s, in place."""
        if factor != self.value:
            torch._foreach_mul_(
                [weight.grad for weight in weights if weight.grad is not None], factor / self.value
            )


class Precision:
    """How a worker computes.

    Args:
        precision: fp32, tf32, bf16, fp16 or fp64.
        device: of the worker.

    Raises:
        JobError: for a precision that the device lacks, naming those it has.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        known = precisions_of(device)
        if precision not in known:
            raise JobError(
                f"precision: {precision} is not supported on {_named(device)}; supported: "
                f"{', '.join(known)}"
            )
        self.name, self.device = precision, device
        self.weights = _WEIGHTS.get(precision, torch.float32)
        self.scales_losses = precision == "fp16"

    def convert(self, module: torch.nn.Module) -> None:
        """Bring a module to the device, its real and complex numbers to at least the width of this
        precision, in place.

        A type that is wider already, or is no number format of weights, was chosen by whoever built
        the module, and stays.
        """
        wider = _WIDENED[self.weights]
        # As Module.to does it; that would make every float, however wide, and with torch.float32 a
        # complex number too, one type.
        module._apply(lambda tensor: tensor.to(self.device, wider.get(tensor.dtype, tensor.dtype)))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which forward passes and losses are computed."""
        if self.name not in _AUTOCAST:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.name])


def precisions_of(device: torch.device) -> list[str]:
    """The precisions that a device has."""
    if device.type == "cpu":
        return ["fp32", "bf16", "fp16", "fp64"]
    known = ["fp32", "fp16", "fp64"]
    if torch.cuda.get_device_capability(device) >= (8, 0):
        known.insert(1, "tf32")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        known.insert(-2, "bf16")
    return known


def scale_for_compression(
    compression: str, world_size: int, weight_per_sample: float = 1.0
) -> float:
    """The part of s that brings what is sent in 16 bits near the size of the mean gradient.

    Args:
        compression: fp16 or none.
        world_size: workers, each of which sends its share of the mean.
        weight_per_sample: of a loss that is a sum with a weight, above 0; 1 for a mean.

    >>> scale_for_compression("fp16", 48), scale_for_compression("none", 48)
    (64.0, 1.0)
    >>> scale_for_compression("fp16", 48, weight_per_sample=1000)
    0.0625
    """
    if compression != "fp16":
        return 1.0
    return 2.0 ** (math.ceil(math.log2(world_size)) - round(math.log2(weight_per_sample)))


def _named(device: torch.device) -> str:
    return "a CPU" if device.type == "cpu" else f"this GPU ({torch.cuda.get_device_name(device)})"
