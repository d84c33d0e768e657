"""The order of a text whose state is carried from sample to sample: consecutive samples are cut
into lanes, and a step takes the next sample of each of the lanes that follow.

Formula:  N samples, K lanes, M, R = ⌊N / K⌋, N mod K. Lane l holds the data-set indices from
          l·M + min(l, R), M + 1 of them if l < R, else M. Sample s of a run is at position
          p = s mod N of its epoch: sample ⌊p / K⌋ of lane p mod K. It continues the sample at
          position p − K, and begins its lane if p < K
Source:   docs/text.md; streams read in parallel, the last state of a window beginning the next one:
          Zaremba, Sutskever, Vinyals, "Recurrent Neural Network Regularization" (2014), section
          4.1.
Contract: pure. Every epoch visits every sample exactly once, in the same order, and the data
          position is one integer. Of at most K samples in a row none continues another, so the
          samples of a step of `global_batch` ≤ K are independent of each other, and a larger batch
          only takes more lanes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvdlarge.schedule.batch import MicroBatch


class Positions(NamedTuple):
    """Where samples of a run are in the lanes."""

    lanes: NDArray[np.int64]  # shape (n,)
    begins: NDArray[np.bool_]  # whether a sample is the first of its lane in its epoch, shape (n,)


class Lanes:
    """The samples of a run in lanes.

    Args:
        size: N, samples in the data set.
        number: K, lanes.

    Raises:
        ValueError: unless every lane has a sample.

    >>> lanes = Lanes(size=8, number=3)  # 0 1 2 | 3 4 5 | 6 7
    >>> lanes.samples(0, 9).tolist()
    [0, 3, 6, 1, 4, 7, 2, 5, 0]
    >>> lanes.positions(6, 9).lanes.tolist(), lanes.positions(6, 9).begins.tolist()
    ([0, 1, 0], [False, False, True])
    """

    def __init__(self, size: int, number: int) -> None:
        if not 1 <= number <= size:
            raise ValueError(f"{size:,} samples cannot be cut into {number:,} lanes")
        self.size, self.number = size, number
        self._length, self._longer = divmod(size, number)

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Data-set indices of samples `start` … `stop` − 1 of the run, shape (stop − start,)."""
        place, lane = np.divmod(self._in_epoch(start, stop), self.number)
        return lane * self._length + np.minimum(lane, self._longer) + place

    def positions(self, start: int, stop: int) -> Positions:
        """Where samples `start` … `stop` − 1 of the run are."""
        positions = self._in_epoch(start, stop)
        return Positions(positions % self.number, positions < self.number)

    def along(self, blocks: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Micro-batches that take blocks of lanes from their first samples to their last, one
        sample of each lane at once; all blocks together have every sample of an epoch.

        Args:
            blocks: of lanes, in the place of samples.

        >>> Lanes(size=8, number=3).along([MicroBatch(0, 0, 2)])[-1]
        MicroBatch(number=0, start=6, stop=8)
        """
        return [
            MicroBatch(block.number, start + block.start, min(start + block.stop, self.size))
            for start in range(0, self.size, self.number)
            for block in blocks
            if start + block.start < self.size
        ]

    def _in_epoch(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(start, stop, dtype=np.int64) % self.size
