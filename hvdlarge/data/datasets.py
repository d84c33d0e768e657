"""What a data set is to the engine, and the one that ships with it: real handwritten digits.

A job's `data.name` names a callable that returns a pair (training set, test set or None). A set is map-style: it has a
length and gives the pair (input, target) of an index; `__getitems__(indices)`, where its class has one, gives the pairs of many
indices at once. A set that holds its samples as tensors is an `InMemory` and is indexed without any loader process.

However a set is read, it is read as its own class says: a way to many samples that a base class has is not taken where a class
below it reads a single sample in a way of its own, which would be passed over.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hvdlarge.data.order import permute


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
    """Whether micro-batches of a set are read by `InMemory.batch`, and no class below it reads samples in another way."""
    return isinstance(dataset, InMemory) and _comes_first(type(dataset), "batch", ("__getitem__", "__getitems__"))


def reads_many(dataset: Any) -> bool:
    """Whether many samples of a set are read by its class's `__getitems__`, and no class below it reads one in another way."""
    return _comes_first(type(dataset), "__getitems__", ("__getitem__",))


def _comes_first(kind: type, method: str, others: tuple[str, ...]) -> bool:
    """Whether a class or the nearest of its bases that defines any of these methods defines `method`."""
    for base in kind.__mro__:
        if method in vars(base):
            return vars(base)[method] is not None
        if any(other in vars(base) for other in others):
            return False
    return False


_TEST_SAMPLES = 360
_SPLIT_SEED = 1998  # the year in which the digits were published; any fixed number does


def digits() -> tuple[InMemory, InMemory]:
    """1797 handwritten digits of 8×8 pixels: 1437 for training and 360 for testing, always the same.

    Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998), as carried
    by scikit-learn.

    Returns:
        Training and test set; inputs (n, 1, 8, 8) float32 in [0, 1], targets (n,) int64.

    Raises:
        ModuleNotFoundError: without scikit-learn, naming the extra to install.
    """
    pixels, labels = _pixels_and_labels()
    inputs = torch.from_numpy(pixels.astype(np.float32) / 16.0).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    order = torch.from_numpy(permute(_SPLIT_SEED, 0, np.arange(len(targets)), len(targets)))
    test, train = order[:_TEST_SAMPLES], order[_TEST_SAMPLES:]
    return InMemory(inputs[train], targets[train]), InMemory(inputs[test], targets[test])


def _pixels_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """The digits as scikit-learn has them: float64 (1797, 64) in 0 … 16, and their classes (1797,)."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "the digits are carried by scikit-learn, which is not installed: pip install 'hvdlarge[digits]'"
        )
    table = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not table.exists():  # another release of it keeps them elsewhere
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    # Its file, without importing the whole of scikit-learn: that takes a second on every worker.
    with gzip.open(table) as file:
        rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1], rows[:, -1]
