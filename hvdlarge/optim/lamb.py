"""LAMB, layer-wise adaptive moments for batch training: Adam's direction with LARS's trust ratio.

Formula:  m ← β₁·m + (1 − β₁)·g;    v ← β₂·v + (1 − β₂)·g²
          r = (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε) + β·w
          w ← w − lr·(‖w‖ / ‖r‖)·r
          The ratio is 1 where ‖w‖ = 0 or ‖r‖ = 0, and for a tensor that is not adapted. A tensor
          whose gradient is zero throughout is skipped in that step (interface.py): weights,
          moments and its count t.
Source:   You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh, "Large Batch
          Optimization for Deep Learning: Training BERT in 76 Minutes" (2020), Algorithm 2, with
          φ(z) = z and Adam's bias correction.
Contract: that of interface.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer
from hvdlarge.optim.norms import norm


class LAMB(MeanGradientOptimizer):
    """Adam's direction, as long as the weights.

    Args:
        params: parameters or parameter groups, all on one device. A group may set `adapt: False` to
            be left without trust ratios.
        lr: learning rate, ≥ 0.
        betas: β₁ and β₂, in [0, 1).
        eps: ε, > 0.
        weight_decay: β, ≥ 0.
        adapt: whether tensors get a trust ratio.

    Raises:
        ValueError: for a hyper-parameter out of its range, in any group.
    """

    # Of the last step; replaced by each. Of the class, since a copy of an optimizer has not been
    # through __init__.
    _ratios: dict[torch.Tensor, float] = {}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt: bool = True,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt},
        )
        for group in self.param_groups:
            if not group["lr"] >= 0:
                raise ValueError(f"lr must be at least 0, got {group['lr']}")
            if not all(0 <= beta < 1 for beta in group["betas"]):
                raise ValueError(f"betas must be at least 0 and below 1, got {group['betas']}")
            if not group["eps"] > 0:
                raise ValueError(f"eps must be above 0, got {group['eps']}")
            if not group["weight_decay"] >= 0:
                raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']}")

    def _update_measured(self, norms: GradientNorms) -> None:
        self._ratios = {}
        moving = [
            (group, weight)
            for group in self.param_groups
            for weight in group["params"]
            if weight in norms.gradients
        ]
        if not moving:
            return
        directions = [self._direction(group, weight) for group, weight in moving]
        sizes = torch.stack(
            [
                norm(tensor)
                for (_, weight), r in zip(moving, directions, strict=True)
                for tensor in (weight, r)
            ]
        )
        numbers = sizes.tolist()
        for place, ((group, weight), direction) in enumerate(zip(moving, directions, strict=True)):
            weight_norm, size = numbers[2 * place], numbers[2 * place + 1]
            ratio = weight_norm / size if group["adapt"] and weight_norm > 0 and size > 0 else 1.0
            self._ratios[weight] = ratio
            weight.sub_(direction, alpha=group["lr"] * ratio)

    def _direction(self, group: dict[str, Any], weight: torch.nn.Parameter) -> torch.Tensor:
        """The direction r of a tensor, as a new one; its moments go on."""
        state, grad = self.state[weight], weight.grad
        assert grad is not None  # only such tensors come here
        if not state:
            state["t"] = 0
            state["first_moment"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["second_moment"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        state["t"] += 1
        first, second = group["betas"]
        state["first_moment"].mul_(first).add_(grad, alpha=1 - first)
        state["second_moment"].mul_(second).addcmul_(grad, grad, value=1 - second)
        root = (state["second_moment"].sqrt() / math.sqrt(1 - second ** state["t"])).add_(
            group["eps"]
        )
        direction = state["first_moment"].div(1 - first ** state["t"]).div_(root)
        return (
            direction.add_(weight, alpha=group["weight_decay"])
            if group["weight_decay"]
            else direction
        )

    def trust_ratio_of(self, weight: torch.Tensor) -> float | None:
        """‖w‖ / ‖r‖ of a tensor in the last step (1 for one that is not adapted); None if it was
        skipped.
        """
        return self._ratios.get(weight)
