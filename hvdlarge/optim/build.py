"""Builds the optimizer that a job names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hvdlarge.models.state import Modules
from hvdlarge.optim.interface import MeanGradientOptimizer
from hvdlarge.optim.lamb import LAMB
from hvdlarge.optim.lars import LARS
from hvdlarge.optim.param_groups import parameter_groups
from hvdlarge.optim.torch_optimizers import SGD, Adagrad, Adam, AdamW, RMSprop

_CLASSES: dict[str, type[MeanGradientOptimizer]] = {
    "lars": LARS,
    "lamb": LAMB,
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
}


def build_optimizer(
    modules: torch.nn.Module | Modules,
    name: str,
    weight_decay: float,
    exclude_bias_and_norm: bool = True,
    exclude: Sequence[str] = (),
    excluded_lr_factor: float = 1.0,
    **options: Any,
) -> MeanGradientOptimizer:
    """The optimizer `name` over the trainable parameters of `modules`; the rate is set at each
    step.

    Args:
        modules: a model, or several modules; their parameters are put into groups (param_groups.py
            says what the last three are).
        name: lars, lamb, sgd, adam, adamw, adagrad or rmsprop.
        weight_decay: of the adapted parameters.
        exclude_bias_and_norm: see param_groups.py.
        exclude: see param_groups.py.
        excluded_lr_factor: see param_groups.py.
        **options: the optimizer's own, e.g. momentum.

    Raises:
        ValueError: for patterns that match nothing, a model without trainable parameters, or an
            option out of its range.
    """
    _leave_the_compiler_out()
    groups = parameter_groups(
        modules, weight_decay, exclude, exclude_bias_and_norm, excluded_lr_factor
    )
    return _CLASSES[name](groups, **options)


def _leave_the_compiler_out() -> None:
    # torch keeps its compiler away from these methods, and imports it for that when one of them is
    # first called: more than a second on every worker. The engine never has them compiled, so they
    # are marked as kept away already; where torch does it another way this changes nothing.
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            plain.__dynamo_disable = plain
