"""Scaling of the learning rate with the batch.

Formula:  k = global_batch / base_batch
          none: scale(k) = 1;    linear: scale(k) = k;    sqrt: scale(k) = √k
Source:   linear: Goyal et al., "Accurate, Large Minibatch SGD" (2017), section 2.1, and AdaBatch
          (2017), which multiplies the rate with the batch; sqrt: You et al., LEGW
          (UCB/EECS-2018-138; 2019): peak rate × √k.
Contract: pure; scale(1) = 1 for each, so the tuned small-batch baseline is the case k = 1.
"""

from __future__ import annotations

import math
from typing import Literal

Scaling = Literal["none", "linear", "sqrt"]


def scale(scaling: Scaling, batch_factor: float) -> float:
    """What multiplies the base rate, after warmup, when the batch is `batch_factor` (k) times the
    base batch.

    >>> scale("linear", 4), scale("sqrt", 4), scale("none", 4)
    (4.0, 2.0, 1.0)
    """
    if scaling == "linear":
        return float(batch_factor)
    if scaling == "sqrt":
        return math.sqrt(batch_factor)
    if scaling == "none":
        return 1.0
    raise ValueError(f"scaling must be none, linear or sqrt, got {scaling!r}")
