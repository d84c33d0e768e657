"""A digest of what must be the same on every rank: weights, and the optimizer's state.

Formula:  per tensor the sum, modulo 2^64, of its bytes read as 32-bit words; over all tensors the
          CRC of those sums and names
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
    sums = [_words(tensor).sum(dtype=torch.int64).to(device) for tensor in state.values()]
    values = torch.stack(sums).tolist() if sums else []
    return {name: value % 2**64 for name, value in zip(state, values, strict=True)}


def combined(digests: Mapping[str, int]) -> int:
    """One number over all tensors, 0 … 2^64 − 1."""
    text = "\n".join(f"{name} {value}" for name, value in digests.items()).encode()
    return zlib.crc32(text) << 32 | zlib.crc32(text[::-1])


def _words(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // 4 * 4
    words = raw[:whole].view(torch.int32)
    return words if whole == raw.numel() else torch.cat([words, raw[whole:].to(torch.int32)])
