"""Moves and repeats batches: tensors, or nested lists, tuples and dicts of tensors."""

from __future__ import annotations

from typing import Any

import torch


def to_device(batch: Any, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Any:
    """Copy a batch to `device`, including tensors nested in lists, tuples and dicts.

    Args:
        batch: the batch.
        device: where the model is.
        dtype: of the weights; floating-point tensors are cast to it, others keep their dtype.
        channels_last: use this memory format for floating-point tensors of four dimensions.
    """
    if isinstance(batch, torch.Tensor):
        use_channels_last = channels_last and batch.is_floating_point() and batch.ndim == 4
        return batch.to(
            device=device,
            dtype=dtype if batch.is_floating_point() else batch.dtype,
            non_blocking=True,  # asynchronous only from pinned memory
            memory_format=torch.channels_last if use_channels_last else torch.preserve_format,
        )
    if isinstance(batch, dict):
        return {key: to_device(value, device, dtype, channels_last) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values = [to_device(value, device, dtype, channels_last) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def repeat(batch: Any, size: int) -> Any:
    """Expand a batch of one sample to `size` copies, including tensors nested in lists, tuples and
    dicts.
    """
    if isinstance(batch, torch.Tensor):
        channels_last = batch.ndim == 4 and batch.is_contiguous(memory_format=torch.channels_last)
        return batch.expand(size, *batch.shape[1:]).contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
    if isinstance(batch, dict):
        return {key: repeat(value, size) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        repeated = [repeat(value, size) for value in batch]
        return type(batch)(*repeated) if hasattr(batch, "_fields") else type(batch)(repeated)
    return batch
