"""A cost model of all-reduce: latency and bandwidth, fitted to measurements.

Formula:  T(n, p) = 2(p − 1)·a + 2·(p − 1)/p · n·b
          seconds for n bytes and p workers; latency a in seconds, b in seconds per byte
Source:   ring allreduce; Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
          workstations" (2009).
Contract: pure. The fit minimizes relative errors, since times range over decades. a includes
          Horovod's cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class AllreduceCost(NamedTuple):
    """The two fitted parameters."""

    latency_seconds: float  # a
    seconds_per_byte: float  # b

    def seconds(self, size: int, workers: int) -> float:
        """T, in seconds, for `size` bytes on `workers` workers.

        >>> AllreduceCost(1e-3, 1e-9).seconds(1_000_000, 2)
        0.003
        """
        return (
            2 * (workers - 1) * self.latency_seconds
            + 2 * (workers - 1) / workers * size * self.seconds_per_byte
        )


def fit(sizes: Sequence[int], seconds: Sequence[float], workers: int) -> AllreduceCost:
    """The least-squares fit to measurements, with neither parameter below 0.

    Args:
        sizes: in bytes; at least two different ones.
        seconds: the time of each, above 0.
        workers: at least 2.

    Raises:
        ValueError: if there are fewer workers or sizes.
    """
    if workers < 2 or len(set(sizes)) < 2:
        raise ValueError("a fit needs two workers and two sizes at least")
    import numpy as np  # not at the top: `plan` and `doctor` run without it

    size, time = np.asarray(sizes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    steps = 2.0 * (workers - 1)
    terms = np.stack([np.full_like(size, steps), steps / workers * size], axis=1) / time[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(terms, np.ones_like(time), rcond=None)
    if per_byte < 0:  # then the best fit within bounds has the other parameter only
        latency, per_byte = _fit_single(terms[:, 0]), 0.0
    elif latency < 0:
        latency, per_byte = 0.0, _fit_single(terms[:, 1])
    return AllreduceCost(float(latency), float(per_byte))


def _fit_single(column: Any) -> float:
    """The best fit when the other parameter is 0; `column` is a numpy array, shape (n,)."""
    return column.sum() / (column @ column)
