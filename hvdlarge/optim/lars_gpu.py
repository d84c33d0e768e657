"""LARS on a GPU: no host waits in it, and the number of launches does not grow with the number of
tensors.

Formula:  lars.py; here over vectors that hold one number for each tensor.
Contract: moves what `LARS.step` moves tensor by tensor, and gives the same numbers to rounding. The
          norms of all weights and gradients come out of one pass over both (two reads), the ratios
          from vectors on the GPU, the update from one pass that reads g, w, v and writes w, v:
          seven in all, and two more for joint norms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hvdlarge.optim.norms import HostNorms


def unsupported_reason(device: torch.device) -> str | None:
    """Why tensors of this device are not moved in this way; None where they are. Tried out once on
    every device.
    """
    if device.type != "cuda":
        return "the weights are not on a GPU"
    return _reason_against(device)


@functools.cache
def _reason_against(device: torch.device) -> str | None:
    try:
        right = all(
            _gives_the_formula(device, dtype, other_side)
            for dtype in _CLOSE
            for other_side in (False, True)
        )
        return None if right else "Triton's update gives other numbers here than torch's"
    # Triton's own errors are of many kinds, and none of them is worth a run
    except Exception as error:
        return (
            f"Triton does not work here ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
        )


_CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def _gives_the_formula(device: torch.device, dtype: torch.dtype, other_side: bool) -> bool:
    """Whether the kernels compile and give the formula for tensors of a type, on one side of their
    branches or the other.
    """
    held = [torch.linspace(-1, 2, count + 1, dtype=dtype, device=device) for count in (5, 5000)]
    # Aligned in memory, and not
    weights = [tensor[1:] if other_side else tensor[:-1] for tensor in held]
    grads = [weight.cos() for weight in weights]
    velocities = [weight.sin() for weight in weights]
    group = {
        "lr": 0.7,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "trust_coefficient": 0.3,
        "adapt": True,
        "lr_in_momentum": True,
        "joint_norm": other_side,
        "clip": False,
        "nesterov": other_side,
        "eps": 0.0,
    }
    expected = []
    for w, g, v in zip(weights, grads, velocities, strict=True):
        ratio = 0.3 * w.norm() / ((g + 0.1 * w).norm() if other_side else g.norm() + 0.1 * w.norm())
        into = 0.7 * ratio * (g + 0.1 * w)
        moved = 0.9 * v + into
        expected += [w - (0.9 * moved + into if other_side else moved), moved]
    table = Table(weights, [2])
    norms = table.measure(grads, velocities)
    table.move(norms, [group])
    ours = [tensor for pair in zip(weights, velocities, strict=True) for tensor in pair]
    close = _CLOSE[dtype]
    return all(
        torch.allclose(one, other, rtol=close, atol=close)
        for one, other in zip(ours, expected, strict=True)
    )


class DeviceNorms:
    """L2 norms of weights and of their mean gradients, as they come out of a GPU: reading a number
    of them waits for it.

    Args:
        weights: the tensors, in the order of `values`.
        values: float64, shape (2, number): of the weights, and of the gradients.
        guarded: whether a step with a gradient that is not finite moves nothing.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], values: torch.Tensor, guarded: bool = False
    ) -> None:
        self.weights = weights
        self.values = values
        self.guarded = guarded

    def not_finite(self, names: Mapping[Any, str]) -> list[str]:
        """The names of the gradients that are not finite. Waits for the GPU."""
        found = zip(self.weights, self.values[1].isfinite().tolist(), strict=True)
        return [names[weight] for weight, finite in found if not finite]

    def later(self) -> Callable[[], HostNorms]:
        """Begin to bring the gradients' norms to the host; what is returned waits for them and
        gives them.

        As nobody has judged them when the weights are moved, gradients that are not finite then
        leave all of them alone.
        """
        self.guarded = True
        found = self.values[1]
        if found.device.type == "cpu":
            return lambda: HostNorms(dict(zip(self.weights, found.tolist(), strict=True)))
        kept = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        kept.copy_(found, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> HostNorms:
            arrived.synchronize()
            return HostNorms(dict(zip(self.weights, kept.tolist(), strict=True)))

        return wait

    def clipped(self, limit: float | None) -> DeviceNorms:
        """Scale all gradients down, in place, where they are longer together than `limit`; the
        norms afterwards.
        """
        if limit is None:
            return self
        factor = (limit / torch.linalg.vector_norm(self.values[1])).clamp(max=1.0)
        grads: Any = [weight.grad for weight in self.weights]
        torch._foreach_mul_(grads, factor.to(self.weights[0].dtype))
        return DeviceNorms(
            self.weights, torch.stack([self.values[0], self.values[1] * factor]), self.guarded
        )


class Table:
    """Tensors that are measured and moved together, and where they lie.

    Args:
        weights: of one type on one device, group after group; every one is dense in memory.
        ends: of each group in `weights`.
    """

    def __init__(self, weights: Sequence[torch.Tensor], ends: Sequence[int]) -> None:
        from hvdlarge.optim import lars_kernels

        self._kernels = lars_kernels
        self.weights = list(weights)
        self._begins = [0, *ends[:-1]]
        self._ends = list(ends)
        self._device = weights[0].device
        sizes = [weight.numel() for weight in weights]
        chunks = [-(-size // lars_kernels.CHUNK) for size in sizes]
        first = [0]
        for count in chunks:
            first.append(first[-1] + count)
        self._first_chunk = first
        self._sizes = self._upload(sizes)
        self._owners = self._upload(
            [owner for owner, count in enumerate(chunks) for _ in range(count)]
        )
        self._starts = self._upload(
            [lars_kernels.CHUNK * number for count in chunks for number in range(count)]
        )
        self._first = self._upload(first)
        self._squares = torch.empty((first[-1], 2), dtype=torch.float64, device=self._device)
        self._listed: list[int] = []
        self._aligned = False
        self._addresses = self._sizes
        # λ of the last step
        self.ratios = torch.ones(len(sizes), dtype=torch.float64, device=self._device)

    def is_of(self, weights: Sequence[torch.Tensor], ends: Sequence[int]) -> bool:
        """Whether this is the table of exactly these tensors and groups."""
        same = len(weights) == len(self.weights) and list(ends) == self._ends
        return same and all(one is other for one, other in zip(weights, self.weights, strict=True))

    def measure(
        self, grads: Sequence[torch.Tensor], velocities: Sequence[torch.Tensor]
    ) -> DeviceNorms:
        """The norms of all weights and gradients; `grads` and `velocities` are what `move` then
        works with.
        """
        listed = [
            tensor.data_ptr() for tensors in (self.weights, grads, velocities) for tensor in tensors
        ]
        if listed != self._listed:
            self._listed, self._addresses = listed, self._upload(listed)
            self._aligned = all(address % 16 == 0 for address in listed)
        values = torch.empty((2, len(self.weights)), dtype=torch.float64, device=self._device)
        self._take_squares(0, len(self.weights), values, None)
        return DeviceNorms(self.weights, values)

    def move(self, norms: DeviceNorms, groups: Sequence[Mapping[str, Any]]) -> None:
        """Move the weights, by the settings of their groups."""
        moving = norms.values
        if norms.guarded:  # a norm of zero leaves its tensor alone
            moving = torch.where(norms.values[1].isfinite().all(), norms.values, 0.0)
        for group, begin, end in zip(groups, self._begins, self._ends, strict=True):
            if begin == end:
                continue
            # A tensor filled on the GPU: copying numbers from the host's ordinary memory would
            # wait.
            out = 1.0 if group["lr_in_momentum"] else group["lr"]
            settings = self._vector([group["momentum"], group["weight_decay"], out])
            weight_norms, grad_norms = norms.values[0], norms.values[1]
            if group["joint_norm"] and group["weight_decay"] and group["adapt"]:
                joint = torch.empty_like(norms.values)
                self._take_squares(begin, end, joint, settings)
                grad_norms = joint[1]
            ratios = trust_ratios(weight_norms[begin:end], grad_norms[begin:end], group)
            self.ratios[begin:end] = ratios
            into = self.ratios * group["lr"] if group["lr_in_momentum"] else self.ratios
            chunks = slice(self._first_chunk[begin], self._first_chunk[end])
            if chunks.start == chunks.stop:
                continue
            self._kernels.update[(chunks.stop - chunks.start,)](
                self._addresses,
                len(self.weights),
                self._sizes,
                self._owners[chunks],
                self._starts[chunks],
                moving,
                into,
                settings,
                NESTEROV=group["nesterov"],
                **self._kind(),
            )

    def _take_squares(
        self, begin: int, end: int, values: torch.Tensor, settings: torch.Tensor | None
    ) -> None:
        chunks = slice(self._first_chunk[begin], self._first_chunk[end])
        if chunks.start < chunks.stop:
            self._kernels.squares[(chunks.stop - chunks.start,)](
                self._addresses,
                len(self.weights),
                self._sizes,
                self._owners[chunks],
                self._starts[chunks],
                self._squares if settings is None else settings,
                self._squares[chunks],
                JOINT=settings is not None,
                **self._kind(),
            )
        self._kernels.roots[(len(self.weights),)](
            self._squares, self._first, len(self.weights), values, AT_ONCE=self._kernels.AT_ONCE
        )

    def _kind(self) -> dict[str, Any]:
        types = {torch.float32: self._kernels.tl.float32, torch.float64: self._kernels.tl.float64}
        return {
            "TYPE": types[self.weights[0].dtype],
            "ALIGNED": self._aligned,
            "CHUNK": self._kernels.CHUNK,
        }

    def _vector(self, numbers: Sequence[float]) -> torch.Tensor:
        return torch.stack(
            [torch.full((), number, dtype=torch.float64, device=self._device) for number in numbers]
        )

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        """A list as int64 on the device; from pinned memory, so that nothing waits."""
        held = torch.tensor(numbers, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return held.to(self._device, non_blocking=True)


def trust_ratios(
    weight_norms: torch.Tensor, grad_norms: torch.Tensor, group: Mapping[str, Any]
) -> torch.Tensor:
    """λ of many tensors of one group, as `lars.trust_ratio` gives it for one; 1 throughout where
    the group is not adapted.

    Args:
        weight_norms: float64, shape (n,).
        grad_norms: likewise; joint ones where the group wants those.
        group: the settings.

    Returns:
        float64, shape (n,); where a gradient is zero the value means nothing.
    """
    if not group["adapt"]:
        return torch.ones_like(weight_norms)
    decay = 0.0 if group["joint_norm"] else group["weight_decay"]
    size = grad_norms + decay * weight_norms + group["eps"]
    ratio = group["trust_coefficient"] * weight_norms / size
    if group["clip"]:
        ratio = (ratio / group["lr"]).clamp(max=1.0) if group["lr"] > 0 else torch.ones_like(ratio)
    return torch.where((weight_norms == 0) | (size == 0), 1.0, ratio)


def same_dtype_and_device(weights: Sequence[torch.Tensor]) -> bool:
    """Whether these tensors can be moved together: of one type that the update knows, on one
    device, each dense in memory.
    """
    kinds = {(weight.dtype, weight.device) for weight in weights}
    return (
        len(kinds) == 1
        and weights[0].dtype in (torch.float32, torch.float64)
        and all(_dense(weight) for weight in weights)
    )


def match_strides(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A gradient that lies in memory as its weight does."""
    if grad.stride() == weight.stride():
        return grad
    return torch.empty_like(weight).copy_(grad)


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the values fill one stretch of memory, in whatever order."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
