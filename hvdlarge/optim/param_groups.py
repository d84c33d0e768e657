"""Selects the parameters that get a trust ratio and weight decay.

Source:   the LARS paper (2017) adapts and decays every tensor; each later reference (TensorFlow's
          TPU code, MLPerf) excludes biases and normalisation parameters, and so does this default.
          Normalisation parameters are identified by the type of their module, biases by their
          name (`bias…`, `…_bias`), neither by shape; a job adds patterns of names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from hvdlarge.models.state import Modules, named_modules
from hvdlarge.models.state import named_parameters as every_parameter

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def parameter_groups(
    modules: nn.Module | Modules,
    weight_decay: float,
    exclude: Sequence[str] = (),
    exclude_bias_and_norm: bool = True,
    excluded_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model, or of several modules, in at most two groups: adapted
    and decayed, and neither.

    Args:
        modules: parameters that do not require a gradient are left out.
        weight_decay: β of the adapted group; the other one has none.
        exclude: patterns with `*` and `?`; a parameter whose full name matches one is neither
            adapted nor decayed. A tied parameter is found by any of its names.
        exclude_bias_and_norm: whether biases and normalisation parameters are excluded too; False
            is the paper's reading.
        excluded_lr_factor: factor of the learning rate of the parameters that are not adapted.

    Returns:
        Groups with the keys params, names, adapt, weight_decay and lr_factor.

    Raises:
        ValueError: if nothing is trainable, or a pattern matches no parameter.
    """
    if isinstance(modules, nn.Module):
        modules = {"": modules}
    apart = set(_bias_and_normalisation(modules)) if exclude_bias_and_norm else set()
    trainable = [
        (name, parameter) for name, parameter in every_parameter(modules) if parameter.requires_grad
    ]
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    apart |= _matching(modules, exclude)

    groups = []
    for adapt in (True, False):
        members = [
            (name, parameter)
            for name, parameter in trainable
            if (id(parameter) not in apart) == adapt
        ]
        if members:
            groups.append(
                {
                    "params": [parameter for _, parameter in members],
                    "names": [name for name, _ in members],
                    "adapt": adapt,
                    "weight_decay": weight_decay if adapt else 0.0,
                    "lr_factor": 1.0 if adapt else excluded_lr_factor,
                }
            )
    return groups


def _matching(modules: Modules, patterns: Sequence[str]) -> set[int]:
    """The identities of the trainable parameters with a name that matches a pattern."""
    named = [
        (prefix + name, parameter)
        for prefix, root in modules.items()
        for name, parameter in root.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    ]
    found: set[int] = set()
    for pattern in patterns:
        matching = {id(parameter) for name, parameter in named if fnmatchcase(name, pattern)}
        if not matching:
            names = ", ".join(name for name, _ in named[:8])
            raise ValueError(
                f"the pattern {pattern!r} matches no trainable parameter; the first names are: "
                f"{names}"
            )
        found |= matching
    return found


def named_parameters(groups: list[dict[str, Any]]) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of the groups with its full name."""
    return [
        (name, parameter)
        for group in groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the coming update in every group; a group's own `lr_factor`, 1 where it has
    none, multiplies it.
    """
    for group in optimizer.param_groups:
        set_group_lr(group, lr * group.get("lr_factor", 1.0))


def set_group_lr(group: dict[str, Any], lr: float | torch.Tensor) -> None:
    """Set the rate of one group, in place where it is a tensor, as in torch's own schedulers: an
    optimizer that is captured or compiled reads that tensor.
    """
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _bias_and_normalisation(modules: Modules) -> Iterator[int]:
    """The identities of the parameters that are a bias, or belong to a normalisation."""
    for _, module in named_modules(modules):
        for name, parameter in module.named_parameters(recurse=False):
            if (
                isinstance(module, _NORMALISATION)
                or name.startswith("bias")
                or name.endswith("_bias")
            ):
                yield id(parameter)
