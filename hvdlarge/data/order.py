"""The order of the data: a stream of shuffled epochs, from which each step takes the next
`global_batch` samples.

Formula:  sample s of a run (s = 0, 1, 2, …) has the data-set index permute(seed, s // N, s % N),
          N being the size of the data set; permute is a Feistel network of `_ROUNDS` rounds on
          integers of max(6, ⌈log2 N⌉) bits, iterated until the result is below N
Source:   docs/design.md; Feistel with cycle walking: Black, Rogaway, "Ciphers with Arbitrary Finite
          Domains" (2002), section 4.
Contract: pure; a bijection on 0 … N − 1 for every seed, epoch and N. Time and memory are
          proportional to the number of indices requested, not to N. Every epoch visits every sample
          exactly once, whatever the batch sizes, and the data position is one integer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvdlarge.data import seeds

_ROUNDS = 8
_MIN_BITS = 6  # with fewer, the permutations of very small data sets are not uniform
_LOOK_AHEAD = 2048  # samples


def permute(
    seed: int, epoch: int | NDArray[np.int64], offset: int | NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """Data-set index of each position in a shuffled epoch.

    Args:
        seed: the run's seed.
        epoch: number of the epoch from 0, scalar or shape (n,).
        offset: positions in the epoch, 0 … size − 1, scalar or shape (n,).
        size: N, samples in the data set, 1 … 2^62.

    Returns:
        Data-set indices, shape (n,).

    Raises:
        ValueError: if `size` or an offset is out of range.

    >>> sorted(permute(0, 0, np.arange(10), 10).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    offset, epoch = np.broadcast_arrays(
        np.atleast_1d(np.asarray(offset, dtype=np.int64)), np.asarray(epoch, np.int64)
    )
    if not 1 <= size <= 2**62:
        raise ValueError(f"size must lie between 1 and 2^62 samples, got {size}")
    if offset.size and not 0 <= int(offset.min()) <= int(offset.max()) < size:
        raise ValueError(f"offsets must lie between 0 and {size - 1}")
    if size == 1:
        return np.zeros(offset.shape, dtype=np.int64)

    bits = max(_MIN_BITS, (size - 1).bit_length())
    round_keys = seeds.keys(seed, seeds.ORDER, epoch)
    indices = _feistel(offset.astype(np.uint64), round_keys, bits)
    outside = np.flatnonzero(indices >= np.uint64(size))
    while outside.size:  # fewer than one extra iteration per index on average if size > 32
        indices[outside] = _feistel(indices[outside], round_keys[outside], bits)
        outside = outside[indices[outside] >= np.uint64(size)]
    return indices.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], round_keys: NDArray[np.uint64], bits: int
) -> NDArray[np.uint64]:
    """A keyed bijection on integers of `bits` bits."""
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask, high_mask = (
        (np.uint64(1) << low_bits) - np.uint64(1),
        (np.uint64(1) << high_bits) - np.uint64(1),
    )
    low, high = values & low_mask, values >> low_bits
    for number in range(0, _ROUNDS, 2):
        high = high ^ (seeds.mix(low + _round_key(round_keys, number)) & high_mask)
        low = low ^ (seeds.mix(high + _round_key(round_keys, number + 1)) & low_mask)
    return (high << low_bits) | low


def _round_key(round_keys: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
    # Far apart: with keys closer than 2^bits the rounds would share values, and small data sets
    # would not be shuffled uniformly.
    return round_keys + np.uint64(number * 0xD1B54A32D192ED03 % 2**64)


def samples(seed: int, size: int, start: int, stop: int) -> NDArray[np.int64]:
    """Data-set indices of the samples `start` … `stop` − 1 of a run, shape (stop − start,).

    Args:
        seed: the run's seed.
        size: N, samples in the data set.
        start: number of the first sample, counted over the whole run.
        stop: number after the last one.

    >>> len(set(samples(seed=7, size=5, start=10, stop=15).tolist()))
    5
    """
    numbers = np.arange(start, stop, dtype=np.int64)
    return permute(seed, numbers // size, numbers % size, size)


class Stream:
    """`samples` with look-ahead for sequential reads, since the cost of a call hardly depends on
    how many indices it computes.

    Args:
        seed: of the run.
        size: N, samples in the data set.

    >>> stream = Stream(seed=7, size=100)
    >>> windows = [(start, start + 3) for start in (0, 3, 9, 500, 3)]
    >>> all((stream.samples(*window) == samples(7, 100, *window)).all() for window in windows)
    True
    """

    def __init__(self, seed: int, size: int) -> None:
        self._seed, self._size = seed, size
        self._start = self._stop = 0  # of the cached window
        self._window: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._last_stop = 0  # of the previous read

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Data-set indices of samples `start` … `stop` − 1 of the run, shape (stop − start,)."""
        if not self._start <= start <= stop <= self._stop:
            # After a long jump, usual for one worker among many, most of it would go unused.
            sequential = 0 <= start - self._last_stop <= _LOOK_AHEAD // 4
            self._start, self._stop = start, max(stop, start + _LOOK_AHEAD) if sequential else stop
            self._window = samples(self._seed, self._size, self._start, self._stop)
        self._last_stop = stop
        return self._window[start - self._start : stop - self._start]
