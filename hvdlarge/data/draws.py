"""Sets the global random generators that models and data sets draw from.

`torch.manual_seed` would do, but takes 0.1 ms, most of it for devices that are not there: too much for every sample.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_torch(key: int) -> None:
    """Seed torch's generator of the CPU, and of the current GPU where one is in use. `key`: 0 … 2^63 − 1."""
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(key)


def seed_all(key: int) -> None:
    """Seed what a data set may draw from: torch, Python's random and numpy's global generator."""
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key % 2**32)
