"""The momentum update of tensors with a trust ratio, in few passes over their memory.

Formula:  u = λ·(g + β·w)
          rate in the momentum:  v ← m·v + lr·u;    w ← w − v
                                 nesterov:          w ← w − (m·v + lr·u)
          rate outside:          v ← m·v + u;       w ← w − lr·v
                                 nesterov:          w ← w − lr·(m·v + u)
Source:   the forms of LARS; see lars.py.
Contract: `reference_update` is the formula in plain torch. On a CPU `momentum_update` does the same
          with torch's own fused SGD in one pass that reads g, w, v and writes w, v: lr = 1 and
          dampening = 1 − lr·λ (or lr and 1 − λ) make it this update. That call is private to torch,
          so it is tried once and the reference stands in where it is missing or has changed; and
          where 1 − (1 − lr·λ) would not give lr·λ back to the weights' precision. `list_update` is
          the formula over whole lists, for a GPU: as many launches for a thousand tensors as for a
          few.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

# In 16 bits torch 2.13's fused SGD on a CPU leaves most values of a tensor as they are.
_FUSED_TYPES = frozenset([torch.float32, torch.float64])


class MomentumStep(NamedTuple):
    """How one tensor is to be updated."""

    lr: float
    ratio: float  # λ
    momentum: float  # m
    weight_decay: float  # β
    lr_in_momentum: bool = True
    nesterov: bool = False

    @property
    def into_momentum(self) -> float:
        """What multiplies g + β·w on its way into v."""
        return self.lr * self.ratio if self.lr_in_momentum else self.ratio

    @property
    def out_of_momentum(self) -> float:
        """What multiplies v on its way into w."""
        return 1.0 if self.lr_in_momentum else self.lr


def momentum_update(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    velocities: Sequence[torch.Tensor],
    move: MomentumStep,
) -> None:
    """Update CPU tensors in place, all in the same way: by torch's fused SGD where that gives the
    formula, else by the plain operations.

    Args:
        weights: w of each.
        grads: g of each, of the shape and type of its w.
        velocities: v of each, of the same; zeros before the first step.
        move: how.
    """
    # Fused SGD adds m·v to the undamped gradient under nesterov, and leaves v out without momentum:
    # other formulas.
    able = not move.nesterov and move.momentum > 0 and _fused_works()
    factor = move.into_momentum
    for weight, grad, velocity in zip(weights, grads, velocities, strict=True):
        able = (
            able
            and weight.dtype == grad.dtype == velocity.dtype
            and weight.dtype in _FUSED_TYPES
            and _exact_as_dampening(factor, weight.dtype)
        )
        able = able and weight.stride() == grad.stride() == velocity.stride()
    if able:
        _fused_update(weights, grads, velocities, move)
        return
    for weight, grad, velocity in zip(weights, grads, velocities, strict=True):
        reference_update(weight, grad, velocity, move)


def reference_update(
    weight: torch.Tensor, grad: torch.Tensor, velocity: torch.Tensor, move: MomentumStep
) -> None:
    """The formula in plain torch, for one tensor; otherwise as `momentum_update`."""
    inside, decay = move.into_momentum, move.into_momentum * move.weight_decay
    velocity.mul_(move.momentum).add_(grad, alpha=inside)
    if decay:
        velocity.add_(weight, alpha=decay)
    moved = velocity
    if move.nesterov:
        moved = velocity.mul(move.momentum).add_(grad, alpha=inside)
        if decay:
            moved.add_(weight, alpha=decay)
    weight.sub_(moved, alpha=move.out_of_momentum)


def list_update(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    velocities: list[torch.Tensor],
    move: MomentumStep,
    ratios: Sequence[float],
) -> None:
    """Update many tensors of one device in place, in five launches or so over whole lists.

    Args:
        weights: w of each; at least one.
        grads: g of each, of the shape and type of its w; they stay as they are.
        velocities: v of each, of the same; zeros before the first step.
        move: how all of them; its trust ratio is not used.
        ratios: λ of each.
    """
    inside = move.lr if move.lr_in_momentum else 1.0
    factors = [inside * ratio for ratio in ratios]
    if move.weight_decay:
        updates = torch._foreach_add(grads, weights, alpha=move.weight_decay)
        torch._foreach_mul_(updates, factors)
    else:
        updates = torch._foreach_mul(grads, factors)
    torch._foreach_mul_(velocities, move.momentum)
    torch._foreach_add_(velocities, updates)
    moved = (
        torch._foreach_add(updates, velocities, alpha=move.momentum)
        if move.nesterov
        else velocities
    )
    torch._foreach_sub_(weights, moved, alpha=move.out_of_momentum)


def _fused_update(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    velocities: Sequence[torch.Tensor],
    move: MomentumStep,
) -> None:
    torch._fused_sgd_(
        list(weights),
        list(grads),
        list(velocities),
        weight_decay=move.weight_decay,
        momentum=move.momentum,
        lr=move.out_of_momentum,
        dampening=1.0 - move.into_momentum,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _exact_as_dampening(factor: float, dtype: torch.dtype) -> bool:
    """Whether 1 − (1 − factor) is the factor, as far as weights of this type can tell."""
    return factor > 0 and abs((1.0 - (1.0 - factor)) / factor - 1.0) < _epsilon(dtype) / 8


@functools.cache
def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@functools.cache
def _fused_works() -> bool:
    """Whether this torch's fused SGD is there and gives the formula."""
    fused, reference = (
        tuple(torch.tensor([value, 2.0], dtype=torch.float64) for value in (1.0, -3.0, 0.5))
        for _ in range(2)
    )
    weight, grad, velocity = fused
    move = MomentumStep(lr=0.7, ratio=0.3, momentum=0.9, weight_decay=0.1)
    try:
        _fused_update([weight], [grad], [velocity], move)
    except (AttributeError, RuntimeError, TypeError):
        return False
    weight, grad, velocity = reference
    reference_update(weight, grad, velocity, move)
    return all(
        torch.allclose(actual, expected, rtol=1e-12, atol=0)
        for actual, expected in zip(fused, reference, strict=True)
    )
