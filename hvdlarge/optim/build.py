"""Builds the optimizer that a job names."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from hvdlarge.models.state import Modules
from hvdlarge.optim.interface import MeanGradientOptimizer
from hvdlarge.optim.own import own_optimizer
from hvdlarge.optim.param_groups import parameter_groups
from hvdlarge.optim.per_tensor import PerTensor
from hvdlarge.optim.sections import OptimizerSection, OwnOptimizer


def build_optimizer(
    modules: torch.nn.Module | Modules, section: OptimizerSection, own: Any = None
) -> MeanGradientOptimizer:
    """The optimizer of a section over the trainable parameters of `modules`; the learning rate is
    set at each step.

    Args:
        modules: a model, or several modules; param_groups.py puts their parameters into groups.
        section: as the job has it.
        own: the class that an `OwnOptimizer` section names.

    Raises:
        ValueError: for patterns that match nothing, or a model without trainable parameters.
        OptimizerRefused: see `own_optimizer`.
    """
    _skip_the_import_of_dynamo()
    groups = parameter_groups(
        modules,
        section.weight_decay,
        section.exclude,
        section.exclude_bias_and_norm,
        section.excluded_lr_factor,
    )
    if isinstance(section, OwnOptimizer):
        return own_optimizer(own, groups, section.args, section.weight_decay)
    if not section.implementation:
        kind = type(type(section).__name__, (PerTensor,), {})  # the run shows its name
        return kind(groups, section, **section.options)
    module, _, name = section.implementation.partition(":")
    return getattr(importlib.import_module(module), name)(groups, **section.options)


def _skip_the_import_of_dynamo() -> None:
    # torch keeps its compiler away from these methods, and imports it for that when one of them is
    # first called: more than a second on every worker. The engine never has them compiled, so they
    # are marked as kept away already, for the whole process; where torch does it another way this
    # changes nothing.
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            plain.__dynamo_disable = plain
