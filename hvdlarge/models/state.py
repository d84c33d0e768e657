"""The modules that learn, and what of them is state: the model, and a loss that is a module, by
names that fit together.

Contract: a tensor is told by its identity and never by its name alone: one that stands under two
          names (tied weights, a layer that two modules hold) is one tensor. A loss's parts are
          named `loss.<name>`, beside the model's own names.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

Modules = Mapping[str, nn.Module]  # by what stands before the names of their parts

_LOSS = "loss."


def trained_modules(model: nn.Module, loss: Any) -> dict[str, nn.Module]:
    """The model, and the loss where it is a module.

    Raises:
        ValueError: if the two have a part of the same full name.
    """
    if not isinstance(loss, nn.Module):
        return {"": model}
    taken = {name for name in model.state_dict() if name.startswith(_LOSS)}
    both = sorted(taken & {_LOSS + name for name in loss.state_dict()})
    if both:
        raise ValueError(
            f"{both[0]!r} is the name of a part of the model and of a part of the loss: rename the "
            "model's"
        )
    return {"": model, _LOSS: loss}


def join_names(module: str, part: str) -> str:
    """The full name of a module's part; the name of a whole model or loss is its prefix alone."""
    return module + part if module in ("", _LOSS) else f"{module}.{part}"


def named_modules(modules: Modules) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with its full name."""
    for prefix, whole in modules.items():
        for name, module in whole.named_modules():
            yield prefix + name, module


def named_parameters(modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, with its full name."""
    for prefix, whole in modules.items():
        for name, parameter in whole.named_parameters():
            yield prefix + name, parameter


def named_buffers(modules: Modules) -> Iterator[tuple[str, torch.Tensor]]:
    """Every buffer once, saved or not, with its full name."""
    for prefix, whole in modules.items():
        for name, buffer in whole.named_buffers():
            yield prefix + name, buffer


def saved_tensors(modules: Modules) -> dict[str, torch.Tensor]:
    """Every tensor of the state_dicts once, by the first of its names; the tensors themselves, not
    copies.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in _entries(modules):
        if isinstance(value, torch.Tensor) and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def extra_states(modules: Modules) -> dict[str, Any]:
    """What modules keep beside tensors (`get_extra_state`), by its full name."""
    return {name: value for name, value in _entries(modules) if not isinstance(value, torch.Tensor)}


def pack(extra: Mapping[str, Any]) -> bytes:
    """Extra state as bytes; equal states give equal bytes.

    Raises:
        ValueError: for extra state that a checkpoint cannot hold, because it is more than tensors
            and builtins.
    """
    file = io.BytesIO()
    try:
        torch.save(dict(extra), file)
        unpack(file.getvalue())
    except Exception as error:  # pickle's errors are of many kinds
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the extra state {', '.join(map(repr, extra))} cannot be saved: get_extra_state must "
            f"return tensors and builtins ({type(error).__name__}: {reason})"
        ) from None
    return file.getvalue()


def unpack(packed: bytes) -> dict[str, Any]:
    """What `pack` has packed."""
    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)


def set_extra_states(modules: Modules, extra: Mapping[str, Any]) -> None:
    """Hand extra state back to the modules that it came from."""
    for prefix, whole in modules.items():
        own = {
            name.removeprefix(prefix): value
            for name, value in extra.items()
            if name in _names(prefix, whole)
        }
        if own:
            whole.load_state_dict(own, strict=False)


def _names(prefix: str, module: nn.Module) -> set[str]:
    return {prefix + name for name in module.state_dict()}


def _entries(modules: Modules) -> Iterator[tuple[str, Any]]:
    for prefix, whole in modules.items():
        for name, value in whole.state_dict(keep_vars=True).items():
            yield prefix + name, value
