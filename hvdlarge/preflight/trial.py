"""Passes on trial: they leave buffers and the compiler as they were, and no gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from hvdlarge.models.state import Modules, named_parameters


def eager() -> AbstractContextManager[Any]:
    """Run compiled models eagerly: compiling takes minutes, and steps may have other sizes."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled: avoids importing the compiler
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def restored(modules: Modules, buffers: Iterable[torch.Tensor]) -> Iterator[Callable[[], None]]:
    """Restore buffers, and clear gradients, at the end of the `with` block; yields a function that
    restores the buffers at once.

    Args:
        modules: whose gradients are cleared.
        buffers: to restore; one that is given twice counts once.
    """
    unique = {id(buffer): buffer for buffer in buffers}
    copies = [(buffer, buffer.clone()) for buffer in unique.values()]

    def restore() -> None:
        with torch.no_grad():
            for buffer, copy in copies:
                buffer.copy_(copy)

    try:
        yield restore
    finally:
        restore()
        clear_gradients(modules)


def clear_gradients(modules: Modules) -> None:
    """Remove the gradients of all parameters."""
    for _, weight in named_parameters(modules):
        weight.grad = None
