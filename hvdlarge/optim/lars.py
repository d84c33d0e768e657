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
          λ = 1 always. A tensor whose gradient is zero throughout is left alone in that step
          (norms.py): weights, momentum and decay.
Source:   You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks" (2017), Algorithm
          1. The fallback λ = 1 is that of the MLPerf and TensorFlow forms; the last rule is what
          torch's own optimizers do for a gradient of None. The other forms, and who has them, are
          in presets.py.
Contract: called after the gradients have been averaged over all workers, so every rank computes the
          same ratio. Every hyper-parameter lives in the parameter groups and every constructor
          argument has a default, because Horovod re-creates the class from its groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from hvdlarge.optim import lars_gpu
from hvdlarge.optim.momentum import MomentumStep, momentum_update
from hvdlarge.optim.norms import GradientNorms, HostNorms, MeasuresGradients, norm, norms


class LARS(MeasuresGradients, torch.optim.Optimizer):
    """Stochastic gradient descent with momentum and one trust ratio for each tensor.

    Args:
        params: parameters or parameter groups. A group may set `adapt: False` to be left without
            trust ratios.
        lr: learning rate, ≥ 0.
        momentum: m, in [0, 1).
        weight_decay: β, ≥ 0.
        trust_coefficient: η, > 0.
        adapt: whether tensors get a trust ratio.
        lr_in_momentum: whether the rate stands inside the momentum buffer (the paper's form).
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

    # Not in __init__, which Horovod passes by.
    # Of the last step; None: not yet brought from the GPU
    _ratios: dict[torch.Tensor, float] | None = None
    _table: lars_gpu.Table | None = None
    against_gpu: str | None = None  # what some worker has against it: all of them go the same way
    # Of the last step that moved the weights
    _last: tuple[lars_gpu.DeviceNorms, lars_gpu.Table] | None = None
    # Whether a GPU moves the tensors together; None before the first step
    _together: bool | None = None

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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the weights once, with the gradients in `.grad`, already averaged over all
        workers.

        Raises:
            ValueError: if a closure is given (its gradients would not be averaged), or for a sparse
                gradient.
        """
        if closure is not None:
            raise ValueError(
                "LARS takes no closure: its gradients would not be averaged over the workers"
            )
        measured = self.take_gradient_norms()
        if isinstance(measured, lars_gpu.DeviceNorms):
            assert self._table is not None  # it has measured
            self._table.move(measured, self.param_groups)
            self._last, self._ratios = (measured, self._table), None
            return
        assert isinstance(measured, HostNorms)
        grad_norms = measured.of  # gradients that are zero have been taken away
        self._ratios = {}
        for group in self.param_groups:
            moving = [
                (weight, weight.grad) for weight in group["params"] if weight.grad is not None
            ]
            if not moving:
                continue
            velocities = [self._velocity(weight) for weight, _ in moving]
            if not group["adapt"]:
                self._ratios.update((weight, 1.0) for weight, _ in moving)
                momentum_update(
                    [weight for weight, _ in moving],
                    [grad for _, grad in moving],
                    velocities,
                    _move(group, 1.0),
                )
                continue
            for (weight, grad), weight_norm, velocity in zip(
                moving, _weight_norms(moving), velocities, strict=True
            ):
                grad_norm = grad_norms[weight]
                if group["joint_norm"] and group["weight_decay"]:
                    grad_norm = norm(grad.add(weight, alpha=group["weight_decay"])).item()
                self._ratios[weight] = ratio = trust_ratio(weight_norm, grad_norm, group)
                momentum_update([weight], [grad], [velocity], _move(group, ratio))

    def _velocity(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        # A kernel would be handed an address of another memory
        if state["momentum_buffer"].device != weight.device:
            raise ValueError(
                f"the momentum of a weight on {weight.device} lies on "
                f"{state['momentum_buffer'].device}"
            )
        return state["momentum_buffer"]

    def measure(self) -> GradientNorms:
        """The norms of the gradients as they are; on a GPU those of the weights too, and nothing
        waits for them.
        """
        if self._together is None:  # looked up once: it takes as long as the launches of a step
            self._together = self.reason_against_gpu() is None
        return self._measure_on_gpu() if self._together else super().measure()

    def reason_against_gpu(self) -> str | None:
        """Why this optimizer's tensors are moved one by one, with a wait in each step; None where a
        GPU moves them together.
        """
        if self.against_gpu is not None:
            return self.against_gpu
        weights = [weight for group in self.param_groups for weight in group["params"]]
        against = lars_gpu.unsupported_reason(weights[0].device)
        if against is None and not lars_gpu.same_dtype_and_device(weights):
            against = "the weights are not all float32 or all float64, or not dense in memory"
        return against

    def _measure_on_gpu(self) -> GradientNorms:
        weights, ends = [], []
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if weight.grad.is_sparse:
                    raise ValueError(
                        "sparse gradients cannot be averaged and measured: build the embedding "
                        "with sparse=False"
                    )
                weight.grad = lars_gpu.match_strides(weight.grad, weight)
                weights.append(weight)
            ends.append(len(weights))
        if not weights:
            return HostNorms({})
        if self._table is None or not self._table.is_of(weights, ends):
            self._table = lars_gpu.Table(weights, ends)
        return self._table.measure(
            [weight.grad for weight in weights], [self._velocity(weight) for weight in weights]
        )

    def trust_ratio_of(self, weight: torch.Tensor) -> float | None:
        """λ of a tensor in the last step (1 for one that is not adapted); None if it was left
        alone. May wait for a GPU.
        """
        if self._ratios is None:
            self._ratios = {}
            if self._last is not None:
                measured, table = self._last
                rows = zip(
                    measured.weights,
                    table.ratios.tolist(),
                    measured.values[1].tolist(),
                    strict=True,
                )
                self._ratios = {
                    weight: ratio for weight, ratio, grad_norm in rows if grad_norm != 0
                }
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


def _weight_norms(moving: Sequence[tuple[torch.Tensor, Any]]) -> Iterator[float]:
    """The norm of each weight: of a large one on a CPU when it is asked for, so that the update
    finds it in the cache.
    """
    weights = [weight for weight, _ in moving]
    lazily = weights[0].device.type == "cpu"
    together = iter(
        norms([weight for weight in weights if not lazily or weight.numel() < _FEW_VALUES])
    )
    for weight in weights:
        yield norm(weight).item() if lazily and weight.numel() >= _FEW_VALUES else next(together)


def _move(group: dict[str, Any], ratio: float) -> MomentumStep:
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
