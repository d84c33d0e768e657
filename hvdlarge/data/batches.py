"""Batches, tensors or nested lists, tuples and dicts of tensors: moved, repeated, taken apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def to_device(batch: Any, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Any:
    """Copy a batch to `device`, including tensors nested in lists, tuples and dicts.

    Args:
        batch: the batch. A mapping becomes a dict; an object of another class with a method `to`
            is moved by it, and keeps its dtypes.
        device: where the model is.
        dtype: of the weights; floating-point tensors are cast to it, others keep their dtype.
        channels_last: use this memory format for floating-point tensors of four dimensions.
    """

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            use_channels_last = channels_last and value.is_floating_point() and value.ndim == 4
            return value.to(
                device=device,
                dtype=dtype if value.is_floating_point() else value.dtype,
                non_blocking=True,  # asynchronous only from pinned memory
                memory_format=torch.channels_last if use_channels_last else torch.preserve_format,
            )
        return value.to(device) if callable(getattr(value, "to", None)) else value

    return changed_leaves(batch, move)


def repeat(batch: Any, size: int) -> Any:
    """Expand a batch of one sample to `size` copies, including tensors nested in lists, tuples and
    dicts.
    """

    def expand(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        channels_last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
        return value.expand(size, *value.shape[1:]).contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )

    return changed_leaves(batch, expand)


def twofold(batch: Any) -> Any:
    """Every sample of a batch twice."""
    return changed_leaves(
        batch, lambda value: torch.cat([value, value]) if isinstance(value, torch.Tensor) else value
    )


def leaves(batch: Any) -> list[Any]:
    """What is nested in the lists, tuples and dicts of a batch, in order."""
    found: list[Any] = []
    changed_leaves(batch, found.append)
    return found


def changed_leaves(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The batch with each of its leaves changed."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: changed_leaves(value, change) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        if hasattr(batch, "to"):  # e.g. a PackedSequence, a named tuple that moves itself
            return change(batch)
        values = [changed_leaves(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return change(batch)
