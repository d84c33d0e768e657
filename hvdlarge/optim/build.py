"""Builds the optimizer that a job names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdlarge.optim.groups import parameter_groups
from hvdlarge.optim.lars import LARS


def build_optimizer(
    model: torch.nn.Module,
    name: str,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    adapt_everything: bool = False,
    not_adapted: Sequence[str] = (),
    not_adapted_lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer `name` over the trainable parameters of `model`; the rate is set at each step.

    Raises:
        ValueError: for an unknown name, or patterns that match nothing.
    """
    groups = parameter_groups(model, weight_decay, not_adapted, adapt_everything, not_adapted_lr_factor)
    if name == "lars":
        return LARS(groups, momentum=momentum, trust_coefficient=trust_coefficient)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    raise ValueError(f"unknown optimizer {name!r}; known are lars, sgd")
