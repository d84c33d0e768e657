"""Gradient clipping by the norm of all mean gradients together.

Formula:  n = √(Σ ‖g‖²) over all tensors;  g ← g · c / n where n > c
Source:   Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks"
          (2013), section 3.2.
Contract: after the gradients have been averaged over all workers and found finite; a worker's own
          share is never clipped. With LARS only the balance between gradient and weight decay
          changes by it: a trust ratio takes a gradient's length out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def clip(
    norms: Mapping[torch.nn.Parameter, float], limit: float | None
) -> dict[torch.nn.Parameter, float]:
    """Scale all gradients down, in place, where they are longer together than `limit`.

    Args:
        norms: of each gradient (L2), all finite.
        limit: c; None leaves everything as it is.

    Returns:
        The norms afterwards.

    >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    >>> weight.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    >>> list(clip({weight: 5.0}, 2.5).values()), weight.grad.tolist()
    ([2.5], [1.5, 2.0])
    """
    total = math.hypot(*norms.values())
    if limit is None or total <= limit:
        return dict(norms)
    factor = limit / total
    torch._foreach_mul_([weight.grad for weight in norms if weight.grad is not None], factor)
    return {weight: norm * factor for weight, norm in norms.items()}
