"""Batches as data sets give them: tensors, also inside lists, tuples and dicts."""

from __future__ import annotations

from typing import Any

import torch


def to_device(batch: Any, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Any:
    """A batch on the device, its floats of the weights' type; tensors inside lists, tuples and
    dicts too.
    """
    if isinstance(batch, torch.Tensor):
        images = channels_last and batch.is_floating_point() and batch.ndim == 4
        return batch.to(
            device=device,
            dtype=dtype if batch.is_floating_point() else batch.dtype,
            non_blocking=True,  # from pinned memory; from any other it waits
            memory_format=torch.channels_last if images else torch.preserve_format,
        )
    if isinstance(batch, dict):
        return {key: to_device(value, device, dtype, channels_last) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [to_device(value, device, dtype, channels_last) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def repeat(batch: Any, size: int) -> Any:
    """A batch of one sample, `size` times; tensors inside lists, tuples and dicts too."""
    if isinstance(batch, torch.Tensor):
        images = batch.ndim == 4 and batch.is_contiguous(memory_format=torch.channels_last)
        whole = batch.expand(size, *batch.shape[1:])
        return whole.contiguous(
            memory_format=torch.channels_last if images else torch.contiguous_format
        )
    if isinstance(batch, dict):
        return {key: repeat(value, size) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        repeated = [repeat(value, size) for value in batch]
        return type(batch)(*repeated) if hasattr(batch, "_fields") else type(batch)(repeated)
    return batch
