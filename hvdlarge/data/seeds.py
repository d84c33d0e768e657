"""Keys for everything random: a seed for what it is used for, never for who uses it.

Formula:  mix(x) = the SplitMix64 finalizer;  key(seed, purpose, a, b, …) = mix(… mix(mix(seed) + a)
          + b …), all modulo 2^64
Source:   Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (2014), with the
          constants of its reference implementation.
Contract: pure. Augmentation is keyed by sample and dropout by micro-batch, never by rank: that is
          why the number of workers does not change a run (docs/design.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ALL = 2**64 - 1

# What a key is for; the numbers are part of every run's result and must never change.
ORDER, WEIGHTS, MICRO_BATCH, SAMPLE, DATA, EVALUATION = 1, 2, 3, 4, 5, 6


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit values, one to one. `values` is an array (numpy warns of the wanted overflow
    on scalars).
    """
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def _mix(value: int) -> int:
    """`mix` of one value: numpy would take twenty times as long for it."""
    value = value + _GOLDEN & _ALL
    value = (value ^ value >> 30) * _FIRST & _ALL
    value = (value ^ value >> 27) * _SECOND & _ALL
    return value ^ value >> 31


def keys(seed: int, purpose: int, *parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit key for each combination of `parts` (integers, or integer arrays of one shape).

    >>> keys(0, ORDER, np.arange(3)).shape
    (3,)
    """
    shape = np.broadcast_shapes(*(np.shape(part) for part in parts)) if parts else ()
    state = mix(np.full(shape or (1,), seed % 2**64, dtype=np.uint64))
    for part in (purpose, *parts):
        state = mix(state + np.asarray(part, dtype=np.int64).astype(np.uint64))
    return state


def key(seed: int, purpose: int, *parts: int) -> int:
    """One key as a non-negative Python integer below 2^63, which every random generator accepts as
    its seed.

    >>> key(7, MICRO_BATCH, 3) == int(keys(7, MICRO_BATCH, 3)[0]) >> 1
    True
    """
    state = _mix(seed & _ALL)
    for part in (purpose, *parts):
        state = _mix(state + part & _ALL)
    return state >> 1
