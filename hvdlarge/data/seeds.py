"""Seeds for every random draw of a run, derived from what the draw is for and never from the rank.

Formula:  mix(x) = the SplitMix64 finalizer;  key(seed, purpose, a, b, …) = mix(… mix(mix(seed) + a)
          + b …), all modulo 2^64
Source:   Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (2014), with the
          constants of its reference implementation.
Contract: pure. Augmentation is keyed by sample (of a data set that reads many samples at once, by
          micro-batch) and dropout by micro-batch, so with a fixed `batch.micro` the results do not
          depend on the number of workers (docs/design.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ALL = 2**64 - 1

# Purposes of keys. The numbers determine the results of every run and must never change.
ORDER, WEIGHTS, MICRO_BATCH, SAMPLE, DATA, EVALUATION, TRANSFORM = 1, 2, 3, 4, 5, 6, 7


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the SplitMix64 finalizer, a bijection on 64-bit integers, to each value.

    Takes arrays only: numpy warns of the intended overflow for scalars.
    """
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def _mix(value: int) -> int:
    """`mix` of one value, twenty times as fast as with numpy."""
    value = value + _GOLDEN & _ALL
    value = (value ^ value >> 30) * _FIRST & _ALL
    value = (value ^ value >> 27) * _SECOND & _ALL
    return value ^ value >> 31


def keys(seed: int, purpose: int, *parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit key per element of the broadcast `parts` (integers or integer arrays).

    >>> keys(0, ORDER, np.arange(3)).shape
    (3,)
    """
    shape = np.broadcast_shapes(*(np.shape(part) for part in parts)) if parts else ()
    state = mix(np.full(shape or (1,), seed % 2**64, dtype=np.uint64))
    for part in (purpose, *parts):
        state = mix(state + np.asarray(part, dtype=np.int64).astype(np.uint64))
    return state


def key(seed: int, purpose: int, *parts: int) -> int:
    """One key as a Python integer, 0 … 2^63 − 1, which torch's and Python's generators accept.

    >>> key(7, MICRO_BATCH, 3) == int(keys(7, MICRO_BATCH, 3)[0]) >> 1
    True
    """
    state = _mix(seed & _ALL)
    for part in (purpose, *parts):
        state = _mix(state + part & _ALL)
    return state >> 1
