"""An optimizer whose section of the job file holds the formula for one tensor.

Contract: as in lars.py: after the gradients have been averaged; every hyper-parameter in the
          groups, since Horovod re-creates the class from them. A tensor whose gradient is zero
          throughout is skipped in that step (interface.py): weights, state, decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer


class UpdateRule(Protocol):
    """A section that updates each tensor itself."""

    def update_tensor(
        self,
        weight: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> None:
        """Update one tensor in place.

        Args:
            weight: of any shape.
            grad: its mean gradient over the global batch, of the same shape.
            state: what the rule keeps of this tensor from step to step, tensors and numbers; empty
                before the first update. Checkpoints hold it.
            group: its `lr`, `weight_decay` (0 for an excluded tensor), `adapt` (whether it gets a
                trust ratio) and the rule's own keys.
        """
        ...


class PerTensor(MeanGradientOptimizer):
    """Applies a rule to each tensor.

    Args:
        params: parameters or parameter groups.
        rule: the formula; the groups hold it where Horovod re-creates the optimizer from them.
        lr: learning rate, ≥ 0.
        weight_decay: ≥ 0.
        adapt: whether tensors get a trust ratio.
        **options: further defaults of the groups, such as the rule's own keys.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: UpdateRule | None = None,
        lr: float = 0.001,
        weight_decay: float = 0.0,
        adapt: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            {"rule": rule, "lr": lr, "weight_decay": weight_decay, "adapt": adapt, **options},
        )

    def _update_measured(self, norms: GradientNorms) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight in norms.gradients:
                    group["rule"].update_tensor(weight, weight.grad, self.state[weight], group)
