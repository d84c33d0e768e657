"""Seeds the global random generators that models, losses and data sets draw from.

Contract: a run seeds generators only here. What user code draws from torch, numpy or Python's
          `random` then depends on the sample or micro-batch alone, not on the rank or process.
          Generators that user code creates itself cannot be seeded; the rehearsal before the first
          step (preflight/rehearsal.py) rejects them.

`torch.manual_seed` is not used: it takes 0.1 ms, mostly for absent devices, too long to call for
every sample.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(key: int) -> None:
    """Seed the global generators of torch (CPU and, if in use, the current GPU), numpy and Python.

    Args:
        key: seed, 0 … 2^63 − 1.
    """
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(key)
    random.seed(key)
    np.random.seed(key % 2**32)
