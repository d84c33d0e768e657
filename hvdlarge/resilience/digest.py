"""Digests of the state that must be the same on every rank: weights, buffers, optimizer state.

Formula:  per tensor, its bytes are read as 32-bit words in rows of 1024; the sums of rows and of
          columns, each weighted by its own multiplier, are added up modulo 2^64. Over all tensors,
          the CRC-32 of names and digests, forwards and backwards
Contract: equal states have equal digests; any single flipped bit changes the digest. One pass over
          the state, every `compare_every_steps` steps and before each checkpoint. Running
          statistics are excluded while they are partial.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch

from hvdlarge.models.state import Modules, extra_states, pack, saved_tensors


def named_state(
    modules: Modules,
    optimizer: torch.optim.Optimizer,
    names: Mapping[Any, str],
    differing: Collection[int] = (),
) -> dict[str, torch.Tensor]:
    """Every saved tensor, the modules' extra state (as bytes) and every tensor of the optimizer's
    state, by name.

    Args:
        modules: the model, and the loss if it is a module.
        optimizer: of their parameters.
        names: of the parameters.
        differing: `id` of each buffer that may differ between ranks.
    """
    tensors = {
        name: value.detach()
        for name, value in saved_tensors(modules).items()
        if id(value) not in differing
    }
    for name, value in extra_states(modules).items():
        tensors[name] = torch.frombuffer(bytearray(pack({name: value})), dtype=torch.uint8)
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[weight]}, {key}"] = value
    return dict(sorted(tensors.items()))


def tensor_digests(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """One number for each tensor, 0 … 2^64 − 1."""
    # Collected on the device, for one synchronization in all; some optimizer state is on the CPU
    device = next(
        (tensor.device for tensor in state.values() if tensor.device.type != "cpu"),
        torch.device("cpu"),
    )
    sums = [_weighted_sum(_words(tensor)).to(device) for tensor in state.values()]
    values = torch.stack(sums).tolist() if sums else []
    return {name: value % 2**64 for name, value in zip(state, values, strict=True)}


def combined(digests: Mapping[str, int]) -> int:
    """One number over all tensors, 0 … 2^64 − 1."""
    text = "\n".join(f"{name} {value}" for name, value in digests.items()).encode()
    return zlib.crc32(text) << 32 | zlib.crc32(text[::-1])


_COLUMNS = 1024
# One odd, one even, so that every word's weight is odd: no changed bit is lost modulo 2^64
_ROW_FACTOR, _COLUMN_FACTOR = 0x9E3779B97F4A7C15 - 2**64, 0x3C6EF372FE94F82A


def _weighted_sum(words: torch.Tensor) -> torch.Tensor:
    """The sum of int32 `words`, shape (n,), each weighted by its position: int64, shape ()."""
    columns = max(1, min(words.numel(), _COLUMNS))
    rows = words.numel() // columns
    full_rows = words[: rows * columns].view(rows, columns)
    rest = words[rows * columns :].to(torch.int64)
    row_sums = torch.cat([full_rows.sum(dim=1, dtype=torch.int64), rest.sum().reshape(1)])
    column_sums = full_rows.sum(dim=0, dtype=torch.int64)
    column_sums[: len(rest)] += rest
    return _odd_weighted(row_sums) * _ROW_FACTOR + _odd_weighted(column_sums) * _COLUMN_FACTOR


def _odd_weighted(sums: torch.Tensor) -> torch.Tensor:
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes as int32 words, shape (n,); each left over byte is a word."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 4:  # as in a slice such as `mask[1:]`
        raw = raw.clone()
    end = raw.numel() // 4 * 4
    words = raw[:end].view(torch.int32)
    return words if end == raw.numel() else torch.cat([words, raw[end:].to(torch.int32)])
