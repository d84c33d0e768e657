"""What an allreduce costs: two figures fitted to measurements, and what follows from them for other
sizes and numbers of workers.

Formula:  T(n, p) = 2(p − 1)·a + 2·(p − 1)/p · n·b
          for n bytes and p workers; a seconds of latency, b seconds per byte
Source:   ring allreduce; Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
          workstations" (2009).
Contract: pure. The fit weighs relative errors, since times range over decades. Horovod's own cycle
          is part of a.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class AllreduceCost(NamedTuple):
    """What was measured on one group of workers."""

    latency_seconds: float  # a
    seconds_per_byte: float  # b

    def seconds(self, size: int, workers: int) -> float:
        """T for `size` bytes on `workers` workers.

        >>> AllreduceCost(1e-3, 1e-9).seconds(1_000_000, 2)
        0.003
        """
        return (
            2 * (workers - 1) * self.latency_seconds
            + 2 * (workers - 1) / workers * size * self.seconds_per_byte
        )


def fit(sizes: Sequence[int], seconds: Sequence[float], workers: int) -> AllreduceCost:
    """The cost that fits measurements best, neither part below 0.

    Args:
        sizes: bytes, at least two different ones.
        seconds: of each, above 0.
        workers: at least 2.

    Raises:
        ValueError: for fewer workers or sizes.
    """
    if workers < 2 or len(set(sizes)) < 2:
        raise ValueError("a fit needs two workers and two sizes at least")
    import numpy as np  # here alone: `plan` and `doctor` read costs without it

    size, time = np.asarray(sizes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    steps = 2.0 * (workers - 1)
    both = np.stack([np.full_like(size, steps), steps / workers * size], axis=1) / time[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(both, np.ones_like(time), rcond=None)
    if per_byte < 0:  # then the best fit within bounds has one part alone
        latency, per_byte = _alone(both[:, 0]), 0.0
    elif latency < 0:
        latency, per_byte = 0.0, _alone(both[:, 1])
    return AllreduceCost(float(latency), float(per_byte))


def _alone(column: Any) -> float:
    """What fits best when the other part is 0; `column` as numpy's array, shape (n,)."""
    return column.sum() / (column @ column)
