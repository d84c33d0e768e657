"""LARS, layer-wise adaptive rate scaling, in all its published forms; the paper's is the default.

Formula:  for every adapted tensor, with mean gradient g, weights w, weight decay β, trust
          coefficient η, momentum m:
              λ = η‖w‖ / (‖g‖ + β‖w‖ + ε);    u = λ·(g + β·w);    v ← m·v + lr·u;    w ← w − v
          joint_norm:             λ = η‖w‖ / (‖g + β·w‖ + ε)
          clip:                   λ ← min(λ / lr, 1)
          lr_in_momentum: false:  v ← m·v + u;    w ← w − lr·v
          nesterov:               the weights move by what v would become in one more step with the
                                  same u: w ← w − (m·v + lr·u)
          λ = 1 where ‖w‖ = 0, so that a tensor of zeros can move; a tensor that is not adapted has
          λ = 1 always. A tensor whose gradient is zero throughout is skipped in that step
          (interface.py): weights, momentum and decay.
Source:   You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks" (2017), Algorithm
          1. The fallback λ = 1 is that of the MLPerf and TensorFlow forms. The other forms, and who
          has them, are in presets.py.
Contract: that of interface.py. On a GPU the weights are updated as whole lists: the norms of
          weights and gradients come to the host in one read, two with joint norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer
from hvdlarge.optim.momentum import MomentumStep, list_update, momentum_update
from hvdlarge.optim.norms import norm, norms, norms_of_list, uses_foreach


class LARS(MeanGradientOptimizer):
    """Stochastic gradient descent with momentum and one trust ratio for each tensor.

    Args:
        params: parameters or parameter groups, all on one device. A group may set `adapt: False` to
            be left without trust ratios.
        lr: learning rate, ≥ 0.
        momentum: m, in [0, 1).
        weight_decay: β, ≥ 0.
        trust_coefficient: η, > 0.
        adapt: whether tensors get a trust ratio.
        lr_in_momentum: whether the lr multiplies the update before the momentum buffer (the
            paper's form).
        joint_norm: whether the decay is added before the gradient's norm is taken.
        clip: whether λ·lr is held at or below lr (LARC).
        nesterov: Nesterov's momentum.
        eps: ε, ≥ 0.

    Raises:
        ValueError: for a hyper-parameter out of its range, in any group.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    >>> weight.grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
    >>> LARS([weight], lr=2.0, momentum=0.9, weight_decay=0.0005, trust_coefficient=0.001).step()
    >>> [round(value, 12) for value in weight.tolist()]
    [2.994, 3.992]
    """

    # Of the last step; replaced by each. Of the class, since a copy of an optimizer has not been
    # through __init__.
    _ratios: dict[torch.Tensor, float] = {}
    uses_foreach = staticmethod(uses_foreach)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
        lr_in_momentum: bool = True,
        joint_norm: bool = False,
        clip: bool = False,
        nesterov: bool = False,
        eps: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "adapt": adapt,
                "lr_in_momentum": lr_in_momentum,
                "joint_norm": joint_norm,
                "clip": clip,
                "nesterov": nesterov,
                "eps": eps,
            },
        )
        for group in self.param_groups:
            _check(group)

    def _weights_to_measure(self) -> Sequence[torch.nn.Parameter]:
        return [
            weight
            for group in self.param_groups
            for weight in group["params"]
            if group["adapt"] and weight.grad is not None and self.uses_foreach(weight.device)
        ]

    def _update_measured(self, norms: GradientNorms) -> None:
        self._ratios = {}
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight in norms.gradients]
            if not weights:
                continue
            velocities = [self._velocity(weight) for weight in weights]
            if self.uses_foreach(weights[0].device):
                self._update_list(group, weights, velocities, norms)
            elif group["adapt"]:
                self._update_one_by_one(group, weights, velocities, norms)
            else:
                self._ratios.update((weight, 1.0) for weight in weights)
                grads = [weight.grad for weight in weights]
                momentum_update(weights, grads, velocities, _momentum_step(group, 1.0))

    def _update_one_by_one(
        self,
        group: dict[str, Any],
        weights: Sequence[torch.Tensor],
        velocities: Sequence[torch.Tensor],
        norms: GradientNorms,
    ) -> None:
        # Backwards: of the gradients, which `measure` has read, the last are still in the cache
        weights = weights[::-1]
        for weight, weight_norm, velocity in zip(
            weights, _weight_norms(weights), velocities[::-1], strict=True
        ):
            grad, grad_norm = weight.grad, norms.gradients[weight]
            assert grad is not None  # it has a norm
            if group["joint_norm"] and group["weight_decay"]:
                grad_norm = norm(grad.add(weight, alpha=group["weight_decay"])).item()
            self._ratios[weight] = ratio = trust_ratio(weight_norm, grad_norm, group)
            momentum_update([weight], [grad], [velocity], _momentum_step(group, ratio))

    def _update_list(
        self,
        group: dict[str, Any],
        weights: list[torch.Tensor],
        velocities: list[torch.Tensor],
        norms: GradientNorms,
    ) -> None:
        grads = [weight.grad for weight in weights if weight.grad is not None]
        ratios = [1.0] * len(weights)
        if group["adapt"]:
            grad_norms = [norms.gradients[weight] for weight in weights]
            if group["joint_norm"] and group["weight_decay"]:
                grad_norms = norms_of_list(
                    torch._foreach_add(grads, weights, alpha=group["weight_decay"])
                )
            ratios = [
                trust_ratio(norms.weights[weight], grad_norm, group)
                for weight, grad_norm in zip(weights, grad_norms, strict=True)
            ]
        self._ratios.update(zip(weights, ratios, strict=True))
        list_update(weights, grads, velocities, _momentum_step(group, 1.0), ratios)

    def _velocity(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        if state["momentum_buffer"].device != weight.device:
            raise ValueError(
                f"the momentum of a weight on {weight.device} lies on "
                f"{state['momentum_buffer'].device}"
            )
        return state["momentum_buffer"]

    def trust_ratio_of(self, weight: torch.Tensor) -> float | None:
        """λ of a tensor in the last step (1 for one that is not adapted); None if it was left
        alone.
        """
        return self._ratios.get(weight)


def trust_ratio(weight_norm: float, grad_norm: float, group: dict[str, Any]) -> float:
    """λ for the norms of a tensor and of its mean gradient, decayed where the norm is a joint one
    (both L2; the latter above 0).

    >>> trust_ratio(5.0, 1.0, {"trust_coefficient": 0.001, "weight_decay": 0.0005})
    0.004987531172069826
    """
    if weight_norm == 0:
        return 1.0
    decay = 0.0 if group.get("joint_norm") else group["weight_decay"] * weight_norm
    size = grad_norm + decay + group.get("eps", 0.0)
    if size == 0:  # a joint norm in which gradient and decay cancel each other
        return 1.0
    ratio = group["trust_coefficient"] * weight_norm / size
    if group.get("clip"):
        ratio = min(ratio / group["lr"], 1.0) if group["lr"] > 0 else 1.0
    return ratio


_FEW_VALUES = 2**18  # the norms of smaller tensors are cheaper taken together


def _weight_norms(weights: Sequence[torch.Tensor]) -> Iterator[float]:
    """The norm of each weight: of a large one when it is asked for, so that the update finds it in
    the cache.
    """
    together = iter(norms([weight for weight in weights if weight.numel() < _FEW_VALUES]))
    for weight in weights:
        yield norm(weight).item() if weight.numel() >= _FEW_VALUES else next(together)


def _momentum_step(group: dict[str, Any], ratio: float) -> MomentumStep:
    return MomentumStep(
        group["lr"],
        ratio,
        group["momentum"],
        group["weight_decay"],
        group["lr_in_momentum"],
        group["nesterov"],
    )


def _check(group: dict[str, Any]) -> None:
    if not group["lr"] >= 0:
        raise ValueError(f"lr must be at least 0, got {group['lr']}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {group['momentum']}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']}")
    if not group["trust_coefficient"] > 0:
        raise ValueError(f"trust_coefficient must be above 0, got {group['trust_coefficient']}")
    if not group["eps"] >= 0:
        raise ValueError(f"eps must be at least 0, got {group['eps']}")
    if group["nesterov"] and group["momentum"] == 0:
        raise ValueError("nesterov needs a momentum above 0")
