"""The interface of a data set, and `InMemory`, a data set held as tensors.

A job's `data.name` names a callable that returns the pair (training set, test set or None). A data
set is map-style: it has a length, and indexing it gives the pair (input, target). It may also
define `__getitems__(indices)`, which gives the pairs of many indices at once. An `InMemory` set is
indexed in the training process, without loader processes.

A subclass that overrides `__getitem__` disables the batched methods of its base classes (`batch`,
`__getitems__`): they would bypass the override.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

_ONLY_INDEXED = (torch.uint16, torch.uint32, torch.uint64)  # torch has no index_select for them


class InMemory(Dataset):
    """A data set held as tensors.

    Args:
        inputs: shape (n, …).
        targets: shape (n, …).

    Raises:
        ValueError: if the lengths differ.
    """

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs and {len(targets)} targets")
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the samples `indices`, shape (n,)."""
        return rows(self.inputs, indices), rows(self.targets, indices)


def rows(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`tensor[indices]`; where a GPU is in use, in pinned memory, from which copies are
    asynchronous.
    """
    if tensor.device.type != "cpu" or tensor.dtype in _ONLY_INDEXED:
        return tensor[indices]
    if not torch.cuda.is_initialized():
        return torch.index_select(tensor, 0, indices)  # copies whole rows: tensor[indices] is slow
    pinned = torch.empty((len(indices), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
    return torch.index_select(tensor, 0, indices, out=pinned)


def reads_batches(dataset: Any) -> bool:
    """Whether micro-batches are read by `batch`: the set is an `InMemory` and no subclass overrides
    the access to single samples.
    """
    return isinstance(dataset, InMemory) and _takes_precedence(
        type(dataset), "batch", ("__getitem__", "__getitems__")
    )


def reads_many(dataset: Any) -> bool:
    """Whether micro-batches are read by `__getitems__`: the class has it and no subclass overrides
    `__getitem__`.
    """
    return _takes_precedence(type(dataset), "__getitems__", ("__getitem__",))


def _takes_precedence(cls: type, method: str, others: tuple[str, ...]) -> bool:
    """Whether `method` is defined no later in the class's resolution order than any of `others`."""
    for base in cls.__mro__:
        if method in vars(base):
            return vars(base)[method] is not None
        if any(other in vars(base) for other in others):
            return False
    return False
