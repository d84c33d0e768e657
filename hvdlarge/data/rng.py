"""Seeds the global random generators that models, losses and data sets draw from.

Contract: the one place where a run seeds anything. Whatever a user's code draws from torch, numpy
          or Python's `random` then belongs to a sample or to a micro-batch, and never to the rank
          or the process that happens to work on it. A generator that the user's code makes for
          itself is out of reach; the rehearsal before the first step (preflight/rehearsal.py)
          refuses it.

`torch.manual_seed` would do for torch, but takes 0.1 ms, most of it for devices that are not there:
too much for every sample.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(key: int) -> None:
    """Seed torch's generators (of the CPU, and of the current GPU where one is in use), numpy's
    global one and Python's.

    Args:
        key: 0 … 2^63 − 1.
    """
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(key)
    random.seed(key)
    np.random.seed(key % 2**32)
