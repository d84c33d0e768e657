"""The order of the data: one stream of shuffled epochs, of which a step takes the next
`global_batch` samples.

Formula:  sample s of a run (s = 0, 1, 2, …) is data-set index permute(seed, s // N, s % N) of a set
          of N samples; permute = a Feistel network of `_ROUNDS` rounds on the numbers of max(6,
          ⌈log2 N⌉) bits, walked until below N
Source:   docs/design.md; Feistel with cycle walking: Black, Rogaway, "Ciphers with Arbitrary Finite
          Domains" (2002), section 4.
Contract: pure; for every seed, epoch and N a bijection on 0 … N − 1; time and memory grow with the
          indices asked for and not with N. Every epoch shows every sample once, whatever the
          batches, and the data position is one integer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvdlarge.data import seeds

_ROUNDS = 8
# Fewer would shuffle very small sets unevenly; their places are found among 64 numbers instead
_LEAST_BITS = 6


def permute(
    seed: int, epoch: int | NDArray[np.int64], offset: int | NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """Where each place of a shuffled epoch lies in the data set.

    Args:
        seed: the run's seed.
        epoch: whole epochs passed, one for all places or one for each.
        offset: places in the epoch, 0 … size − 1, shape (n,) or a single one.
        size: N, samples in the data set, 1 … 2^62.

    Returns:
        Data-set indices, shape (n,).

    Raises:
        ValueError: if the size or an offset is out of range.

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

    bits = max(_LEAST_BITS, (size - 1).bit_length())
    round_keys = seeds.keys(seed, seeds.ORDER, epoch)
    places = _feistel(offset.astype(np.uint64), round_keys, bits)
    outside = np.flatnonzero(places >= np.uint64(size))
    while outside.size:  # from 33 samples on, on average less than one more walk for each place
        places[outside] = _feistel(places[outside], round_keys[outside], bits)
        outside = outside[places[outside] >= np.uint64(size)]
    return places.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], round_keys: NDArray[np.uint64], bits: int
) -> NDArray[np.uint64]:
    """A keyed bijection on the numbers of `bits` bits: the two halves change each other in turn."""
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
    # Far apart: keys that lie closer than 2^bits would let the rounds share values, and small sets
    # would shuffle badly.
    return round_keys + np.uint64(number * 0xD1B54A32D192ED03 % 2**64)


def samples(seed: int, size: int, start: int, stop: int) -> NDArray[np.int64]:
    """Data-set indices of the samples `start` … `stop` − 1 of a run over a set of `size` samples,
    in stream order.

    >>> len(set(samples(seed=7, size=5, start=10, stop=15).tolist()))
    5
    """
    numbers = np.arange(start, stop, dtype=np.int64)
    return permute(seed, numbers // size, numbers % size, size)


class Stream:
    """`samples` for one who reads on through the stream: looks ahead, since a look costs little
    more for many than for few.

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
        self._begin = self._end = 0  # of what was looked up
        self._found: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._last = 0  # where the last reading ended

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Data-set indices of the samples `start` … `stop` − 1 of the run."""
        if not self._begin <= start <= stop <= self._end:
            # Who jumps far, as a worker among many does, would throw away most of what was looked
            # up ahead.
            reads_on = 0 <= start - self._last <= _AHEAD // 4
            self._begin, self._end = start, max(stop, start + _AHEAD) if reads_on else stop
            self._found = samples(self._seed, self._size, self._begin, self._end)
        self._last = stop
        return self._found[start - self._begin : stop - self._begin]


_AHEAD = 2048  # samples
