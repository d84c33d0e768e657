"""What the engine asks of every optimizer: the norms of the mean gradients, then the update.

Formula:  A tensor whose mean gradient is zero throughout, or so small that its norm is 0 in the
          precision of the gradient, is skipped in a step: weights, state and decay. Horovod submits
          zeros for a gradient that is missing on every worker; without this rule an optimizer would
          decay such a parameter, and move it by its momentum, on several workers and leave it alone
          on one.
Source:   torch's own optimizers do so for a gradient of None.
Contract: `measure` and `update` are called after the gradients have been averaged over all workers,
          so every rank computes the same. Every hyper-parameter lives in the parameter groups and
          every constructor argument has a default, because Horovod re-creates the class from its
          groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hvdlarge.optim.clipping import clip
from hvdlarge.optim.norms import norms
from hvdlarge.optim.param_groups import set_lr


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the mean gradients of one step.

    Attributes:
        gradients: by parameter; those without a gradient, or with one that is zero throughout, are
            left out.
        weights: norms of weights that were read along with them, by parameter.
    """

    gradients: Mapping[Any, float]
    weights: Mapping[Any, float] = field(default_factory=dict)

    def not_finite(self, names: Mapping[Any, str]) -> list[str]:
        """The names of the parameters whose gradients are not finite."""
        return [names[weight] for weight, size in self.gradients.items() if not math.isfinite(size)]

    def clipped(self, limit: float | None) -> GradientNorms:
        """Scale all gradients down, in place, if their total norm exceeds `limit`.

        Returns:
            The norms afterwards.
        """
        return GradientNorms(clip(self.gradients, limit), self.weights)


class MeanGradientOptimizer(torch.optim.Optimizer):
    """An optimizer whose gradients, in `.grad`, have been averaged over all workers.

    A step is `measure`, a check of the norms, and `update`. For custom loops, `step` combines
    `measure` and `update`, also under `hvd.DistributedOptimizer`.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group without `lr` gets the optimizer's times the group's `lr_factor`."""
        if "lr" not in param_group and "lr_factor" in param_group:
            param_group["lr"] = self.defaults["lr"] * param_group["lr_factor"]
        super().add_param_group(param_group)

    @torch.no_grad()
    def measure(self) -> GradientNorms:
        """The norms of the gradients as they are. Waits for the device.

        Raises:
            ValueError: for a sparse gradient.
        """
        weights, grads = [], []
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if weight.grad.is_sparse:
                    raise ValueError(
                        "sparse gradients cannot be averaged and measured: build the embedding "
                        "with sparse=False"
                    )
                weights.append(weight)
                grads.append(weight.grad)
        along = self._weights_to_measure()
        sizes = norms([*grads, *along])
        return GradientNorms(
            {weight: size for weight, size in zip(weights, sizes, strict=False) if size != 0},
            dict(zip(along, sizes[len(weights) :], strict=True)),
        )

    @torch.no_grad()
    def update(self, norms: GradientNorms, lr: float) -> None:
        """Update the weights once.

        Args:
            norms: of the gradients as they are now, from `measure`.
            lr: learning rate, ≥ 0; set in every group, times the group's `lr_factor`.
        """
        set_lr(self, lr)
        self._update_measured(norms)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update the weights once, with the learning rates of the groups.

        Args:
            closure: computes the gradients anew and returns the loss, as Lightning passes it. Not
                under `hvd.DistributedOptimizer`, which averages the gradients before it is called.

        Returns:
            The closure's loss; None without a closure.

        Raises:
            ValueError: for a closure under Horovod, or a sparse gradient.
        """
        loss = None
        if closure is not None:
            if hasattr(self, "set_backward_passes_per_step"):  # of hvd.DistributedOptimizer
                raise ValueError(
                    f"{type(self).__name__} takes no closure under hvd.DistributedOptimizer: it "
                    "would compute gradients after those of the workers have been averaged, and "
                    "each worker would move by its own; call backward() before step()"
                )
            with torch.enable_grad():
                loss = closure()
        self._update_measured(self.measure())
        return loss

    def _weights_to_measure(self) -> Sequence[torch.nn.Parameter]:
        """Weights whose norms `measure` reads along with the gradients'."""
        return []

    def _update_measured(self, norms: GradientNorms) -> None:
        """Update the weights that `norms` has gradients of, by the learning rates of the groups."""
        raise NotImplementedError
