"""The handwritten digits that scikit-learn ships, the data set of the example jobs."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from hvdlarge.data.in_memory import InMemory
from hvdlarge.data.order import permute

_TEST_SAMPLES = 360
_SPLIT_SEED = 1998  # arbitrary but fixed: the year in which the digits were published


def digits() -> tuple[InMemory, InMemory]:
    """1797 handwritten digits of 8×8 pixels in a fixed split: 1437 for training, 360 for testing.

    Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
        Repository (1998), as shipped with scikit-learn.

    Returns:
        Training and test set; inputs (n, 1, 8, 8) float32 in [0, 1], targets (n,) int64.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed; names the extra to install.
    """
    pixels, labels = _pixels_and_labels()
    inputs = torch.from_numpy(pixels.astype(np.float32) / 16.0).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    order = torch.from_numpy(permute(_SPLIT_SEED, 0, np.arange(len(targets)), len(targets)))
    test, train = order[:_TEST_SAMPLES], order[_TEST_SAMPLES:]
    return InMemory(inputs[train], targets[train]), InMemory(inputs[test], targets[test])


def _pixels_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, shape (1797, 64), float64 in 0 … 16, and class labels, shape (1797,)."""
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "the digits data set needs scikit-learn, which is not installed: pip install "
            "'hvdlarge[digits]'"
        )
    table = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not table.exists():  # a scikit-learn release that stores them elsewhere
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    # Read the file directly: importing scikit-learn takes a second on every worker.
    with gzip.open(table) as file:
        rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1], rows[:, -1]
