"""What a data set is to the engine, and the one that holds its samples as tensors.

A job's `data.name` names a callable that returns a pair (training set, test set or None). A set is
map-style: it has a length and gives the pair (input, target) of an index; `__getitems__(indices)`,
where its class has one, gives the pairs of many indices at once. A set that holds its samples as
tensors is an `InMemory` and is indexed without any loader process.

However a set is read, it is read as its own class says: a way to many samples that a base class has
is not taken where a class below it reads a single sample in a way of its own, which would be passed
over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset


class InMemory(Dataset):
    """Samples kept as tensors.

    Args:
        inputs: shape (n, …).
        targets: shape (n, …).

    Raises:
        ValueError: if the two differ in length.
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
        return self.inputs[indices], self.targets[indices]


def reads_batches(dataset: Any) -> bool:
    """Whether micro-batches of a set are read by `InMemory.batch`, and no class below it reads
    samples in another way.
    """
    return isinstance(dataset, InMemory) and _comes_first(
        type(dataset), "batch", ("__getitem__", "__getitems__")
    )


def reads_many(dataset: Any) -> bool:
    """Whether many samples of a set are read by its class's `__getitems__`, and no class below it
    reads one in another way.
    """
    return _comes_first(type(dataset), "__getitems__", ("__getitem__",))


def _comes_first(kind: type, method: str, others: tuple[str, ...]) -> bool:
    """Whether a class or the nearest of its bases that defines any of these methods defines
    `method`.
    """
    for base in kind.__mro__:
        if method in vars(base):
            return vars(base)[method] is not None
        if any(other in vars(base) for other in others):
            return False
    return False
