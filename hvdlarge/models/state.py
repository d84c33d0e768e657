"""The parameters, buffers and extra state of the model, and of the loss if it is a module, under
unique names.

Contract: tensors are identified by object identity, not by name: one that has two names (tied
          weights, a shared layer) is listed once. Names of the loss are prefixed by `loss.`.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

Tensor = TypeVar("Tensor", bound=torch.Tensor)
Modules = Mapping[str, nn.Module]  # by the prefix of their names

MODEL, LOSS = "", "loss."  # the prefixes


def trained_modules(model: nn.Module, loss: Any) -> dict[str, nn.Module]:
    """The model, and the loss if it is a module.

    Raises:
        ValueError: if a name of the model's state_dict equals a prefixed name of the loss's.
    """
    if not isinstance(loss, nn.Module):
        return {MODEL: model}
    duplicates = sorted(model.state_dict().keys() & {LOSS + name for name in loss.state_dict()})
    if duplicates:
        raise ValueError(
            f"{duplicates[0]!r} is in the state_dict of the model and in that of the loss: rename "
            "the model's"
        )
    return {MODEL: model, LOSS: loss}


def join_names(module: str, part: str) -> str:
    """The full name of the part `part` of a module, itself named as by `named_modules`."""
    return module + part if module in (MODEL, LOSS) else f"{module}.{part}"


def named_modules(modules: Modules) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with its full name."""
    known: set[nn.Module] = set()  # the loss may hold parts of the model
    for prefix, root in modules.items():
        for name, module in root.named_modules(known):
            yield prefix + name, module


def named_parameters(modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, with its full name."""
    yield from _once(modules, lambda root: root.named_parameters())


def named_buffers(modules: Modules) -> Iterator[tuple[str, torch.Tensor]]:
    """Every buffer once, persistent or not, with its full name."""
    yield from _once(modules, lambda root: root.named_buffers())


def _once(
    modules: Modules, tensors_of: Callable[[nn.Module], Iterable[tuple[str, Tensor]]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all modules under their full names; one that two of them share only once."""
    known: set[int] = set()
    for prefix, root in modules.items():
        for name, tensor in tensors_of(root):
            if id(tensor) not in known:
                known.add(id(tensor))
                yield prefix + name, tensor


def saved_tensors(modules: Modules) -> dict[str, torch.Tensor]:
    """Every tensor of the state_dicts once, under its first name; not copied."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in _entries(modules):
        if isinstance(value, torch.Tensor) and id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value
    return tensors


def extra_states(modules: Modules) -> dict[str, Any]:
    """What the modules' `get_extra_state` returns, by full name."""
    return {name: value for name, value in _entries(modules) if not isinstance(value, torch.Tensor)}


def pack(extra: Mapping[str, Any]) -> bytes:
    """Serialise extra state; equal states give equal bytes.

    Raises:
        ValueError: if the state holds anything but tensors and builtins, which a checkpoint cannot
            store.
    """
    file = io.BytesIO()
    try:
        torch.save(dict(extra), file)
        unpack(file.getvalue())
    except Exception as error:  # pickling raises errors of many types
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the extra state {', '.join(map(repr, extra))} cannot be saved: get_extra_state must "
            f"return tensors and builtins ({type(error).__name__}: {reason})"
        ) from None
    return file.getvalue()


def unpack(packed: bytes) -> dict[str, Any]:
    """The inverse of `pack`."""
    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)


def set_extra_states(modules: Modules, extra: Mapping[str, Any]) -> None:
    """Restore extra state, by full name, in the modules it came from."""
    for prefix, root in modules.items():
        names = {prefix + name for name in root.state_dict()}
        own = {name.removeprefix(prefix): value for name, value in extra.items() if name in names}
        if own:
            root.load_state_dict(own, strict=False)


def _entries(modules: Modules) -> Iterator[tuple[str, Any]]:
    for prefix, root in modules.items():
        for name, value in root.state_dict(keep_vars=True).items():
            yield prefix + name, value


def with_versions(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A state_dict of saved tensors with the versions of the module's parts, which some modules
    want to see when they load it. Names and forms are those of the module already.
    """
    versioned = OrderedDict(state)
    versioned._metadata = getattr(module.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    return versioned
