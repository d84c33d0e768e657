"""Real handwritten digits, small enough to ship with scikit-learn: the data of the main job."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from hvdlarge.data.in_memory import InMemory
from hvdlarge.data.order import permute

_TEST_SAMPLES = 360
_SPLIT_SEED = 1998  # the year in which the digits were published; any fixed number does


def digits() -> tuple[InMemory, InMemory]:
    """1797 handwritten digits of 8×8 pixels: 1437 for training and 360 for testing, always the
    same.

    Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
        Repository (1998), as carried by scikit-learn.

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
    """The digits as scikit-learn has them: float64 (1797, 64) in 0 … 16, and their classes
    (1797,).
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "the digits are carried by scikit-learn, which is not installed: pip install "
            "'hvdlarge[digits]'"
        )
    table = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not table.exists():  # another release of it keeps them elsewhere
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    # Its file, without importing the whole of scikit-learn: that takes a second on every worker.
    with gzip.open(table) as file:
        rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1], rows[:, -1]
