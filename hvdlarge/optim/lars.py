"""LARS, layer-wise adaptive rate scaling, in the form of its paper.

Formula:  for every adapted tensor, with mean gradient g, weights w, weight decay β, trust coefficient η, momentum m:
              λ = η‖w‖ / (‖g‖ + β‖w‖);    v ← m·v + lr·λ·(g + β·w);    w ← w − v
          λ = 1 where ‖w‖ = 0, so that a tensor of zeros can move; a tensor that is not adapted has λ = 1 always.
          A tensor whose gradient is zero throughout is left alone in that step (norms.py): weights, momentum and decay.
Source:   You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks" (2017), Algorithm 1. The fallback λ = 1 is
          that of the MLPerf and TensorFlow forms; the last rule is what torch's own optimizers do for a gradient of None.
Contract: the rate stands inside the momentum buffer. Called after the gradients have been averaged over all workers, so
          every rank computes the same ratio. Every hyper-parameter lives in the parameter groups and every constructor
          argument has a default, because Horovod re-creates the class from its groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hvdlarge.optim.norms import MeasuresGradients, norms


class LARS(MeasuresGradients, torch.optim.Optimizer):
    """Stochastic gradient descent with momentum and one trust ratio for each tensor.

    Args:
        params: parameters or parameter groups. A group may set `adapt: False` to be left without trust ratios.
        lr: learning rate, ≥ 0.
        momentum: m, in [0, 1).
        weight_decay: β, ≥ 0.
        trust_coefficient: η, > 0.
        adapt: whether tensors get a trust ratio.

    Raises:
        ValueError: for a hyper-parameter out of its range, in any group.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    >>> weight.grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
    >>> LARS([weight], lr=2.0, momentum=0.9, weight_decay=0.0005, trust_coefficient=0.001).step()
    >>> [round(value, 12) for value in weight.tolist()]
    [2.994, 3.992]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ) -> None:
        self._ratios: dict[torch.Tensor, float] = {}
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "adapt": adapt,
            },
        )
        for group in self.param_groups:
            _check(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the weights once, with the gradients in `.grad`, already averaged over all workers.

        Raises:
            ValueError: if a closure is given (its gradients would not be averaged), or for a sparse gradient.
        """
        if closure is not None:
            raise ValueError("LARS takes no closure: its gradients would not be averaged over the workers")
        self._ratios = {}
        grad_norms = self.take_gradient_norms()  # gradients that are zero have been taken away
        moving = [(group, w, w.grad) for group in self.param_groups for w in group["params"] if w.grad is not None]
        for (group, weight, grad), weight_norm in zip(moving, norms([w for _, w, _ in moving]), strict=True):
            grad_norm = grad_norms[weight]
            ratio = trust_ratio(weight_norm, grad_norm, group) if group["adapt"] else 1.0
            self._ratios[weight] = ratio
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            velocity = state["momentum_buffer"]
            velocity.mul_(group["momentum"]).add_(grad, alpha=group["lr"] * ratio)
            if group["weight_decay"]:
                velocity.add_(weight, alpha=group["lr"] * ratio * group["weight_decay"])
            weight.sub_(velocity)

    def trust_ratio_of(self, weight: torch.Tensor) -> float | None:
        """λ of a tensor in the last step (1 for one that is not adapted); None if it was left alone."""
        return self._ratios.get(weight)


def trust_ratio(weight_norm: float, grad_norm: float, group: dict[str, Any]) -> float:
    """λ for the norms of a tensor and of its mean gradient (both L2, unit 1; the gradient's is above 0).

    >>> trust_ratio(5.0, 1.0, {"trust_coefficient": 0.001, "weight_decay": 0.0005})
    0.004987531172069826
    """
    if weight_norm == 0:
        return 1.0
    return group["trust_coefficient"] * weight_norm / (grad_norm + group["weight_decay"] * weight_norm)


def _check(group: dict[str, Any]) -> None:
    if not group["lr"] >= 0:
        raise ValueError(f"lr must be at least 0, got {group['lr']}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {group['momentum']}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']}")
    if not group["trust_coefficient"] > 0:
        raise ValueError(f"trust_coefficient must be above 0, got {group['trust_coefficient']}")
