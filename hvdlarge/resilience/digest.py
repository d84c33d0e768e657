"""A digest of what must be the same on every rank: weights, and the optimizer's state.

Formula:  per tensor, of its bytes read as 32-bit words in rows of 1024: the sums of the rows and of
          the columns, each multiplied by an odd number of its own, added up modulo 2^64; over all
          tensors the CRC of those numbers and names
Contract: equal states have equal digests; a flipped bit anywhere changes it. One pass over the
          state, every `compare_every_steps` steps and before each checkpoint. Running statistics
          are left out while they are scattered.
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
    """Every saved tensor, the modules' extra state and every tensor of the optimizer's state, by
    names that all ranks share.

    Args:
        modules: what learns.
        optimizer: of their parameters.
        names: of the parameters.
        differing: identities of buffers that are not the same on all ranks by their nature.
    """
    found = {
        name: value.detach()
        for name, value in saved_tensors(modules).items()
        if id(value) not in differing
    }
    for name, value in extra_states(modules).items():
        found[name] = torch.frombuffer(bytearray(pack({name: value})), dtype=torch.uint8)
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                found[f"{names[weight]}, {key}"] = value
    return dict(sorted(found.items()))


def tensor_digests(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """One number for each tensor, 0 … 2^64 − 1."""
    # One wait for the device in all; torch keeps some optimizers' counts on the CPU.
    device = next(
        (tensor.device for tensor in state.values() if tensor.device.type != "cpu"),
        torch.device("cpu"),
    )
    sums = [_weighed(_words(tensor)).to(device) for tensor in state.values()]
    values = torch.stack(sums).tolist() if sums else []
    return {name: value % 2**64 for name, value in zip(state, values, strict=True)}


def combined(digests: Mapping[str, int]) -> int:
    """One number over all tensors, 0 … 2^64 − 1."""
    text = "\n".join(f"{name} {value}" for name, value in digests.items()).encode()
    return zlib.crc32(text) << 32 | zlib.crc32(text[::-1])


_COLUMNS = 1024
# Odd and even, so that every word is multiplied by an odd number in all: no changed bit is lost.
_OF_ROWS, _OF_COLUMNS = 0x9E3779B97F4A7C15 - 2**64, 0x3C6EF372FE94F82A


def _weighed(words: torch.Tensor) -> torch.Tensor:
    """A number in which every word counts by its place: int64, shape ()."""
    columns = max(1, min(words.numel(), _COLUMNS))
    rows = words.numel() // columns
    whole = words[: rows * columns].view(rows, columns)
    rest = words[rows * columns :].to(torch.int64)
    of_rows = torch.cat([whole.sum(dim=1, dtype=torch.int64), rest.sum().reshape(1)])
    of_columns = whole.sum(dim=0, dtype=torch.int64)
    of_columns[: len(rest)] += rest
    return _by_place(of_rows) * _OF_ROWS + _by_place(of_columns) * _OF_COLUMNS


def _by_place(sums: torch.Tensor) -> torch.Tensor:
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // 4 * 4
    words = raw[:whole].view(torch.int32)
    return words if whole == raw.numel() else torch.cat([words, raw[whole:].to(torch.int32)])
