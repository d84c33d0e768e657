"""Norms of each parameter, its gradient and its update in one step.

Source:   the trust ratio: You, Gitman, Ginsburg (2017), equation 6, as the optimizer has used it.
Contract: reads weights and gradients; rank 0 alone measures, since all ranks have the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer
from hvdlarge.optim.norms import norms


class LayerStatistics:
    """Measures an update of named parameters.

    Args:
        names: of the trainable parameters.
        optimizer: that updates them.
    """

    def __init__(
        self, names: Mapping[torch.nn.Parameter, str], optimizer: MeanGradientOptimizer
    ) -> None:
        self._names, self._optimizer = names, optimizer
        self._before: list[torch.Tensor] = []
        self._gradients: Mapping[Any, float] = {}

    @torch.no_grad()
    def before_update(self, gradients: GradientNorms) -> None:
        """Keep the weights, and the norms of the mean gradients."""
        self._gradients = gradients.gradients
        self._before = [weight.detach().clone() for weight in self._names]

    @torch.no_grad()
    def after_update(self) -> dict[str, dict[str, float | None]]:
        """By parameter: `weight_norm` before the update, `gradient_norm` of the mean gradient
        before clipping, `trust_ratio` (None for a parameter without one) and `update_ratio`, the
        norm of the update divided by that of the weight (None for a weight of zeros).
        """
        weights = norms(self._before)
        torch._foreach_sub_(self._before, list(self._names))
        updates = norms(self._before)
        self._before = []
        ratio_of = getattr(self._optimizer, "trust_ratio_of", lambda weight: None)
        adapted = {
            weight
            for group in self._optimizer.param_groups
            if group.get("adapt")
            for weight in group["params"]
        }
        return {
            name: {
                "weight_norm": before,
                "gradient_norm": self._gradients.get(weight, 0.0),
                "trust_ratio": ratio_of(weight) if weight in adapted else None,
                "update_ratio": update / before if before else None,
            }
            for (weight, name), before, update in zip(
                self._names.items(), weights, updates, strict=True
            )
        }
