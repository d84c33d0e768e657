"""Progress of a run: samples are the clock, epochs are a float read off it.

Formula:  epoch = samples_seen / dataset_size;  total_samples = epochs · dataset_size (rounded to
          whole samples)
Source:   docs/design.md. Counting steps instead would shift every schedule when the batch grows.
Contract: pure. Every comparison of progress with a mark goes through `reached`, so that two
          policies with the same mark (AdaBatch's growth and its decay) act in the same step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# A mark such as 3 × 0.1 epochs is not exactly a float; a progress this close to it (relative) has
# reached it.
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Clock:
    """Length of a run: `dataset_size` samples an epoch, `epochs` epochs (a float).

    Raises:
        ValueError: for an empty data set or a run of less than one sample.

    >>> Clock(dataset_size=1437, epochs=30).total_samples
    43110
    >>> Clock(dataset_size=1437, epochs=30).epoch(2874)
    2.0
    """

    dataset_size: int  # samples
    epochs: float  # epochs

    def __post_init__(self) -> None:
        if self.dataset_size < 1:
            raise ValueError(f"dataset_size must be at least 1 sample, got {self.dataset_size}")
        if not (math.isfinite(self.epochs) and self.total_samples >= 1):
            raise ValueError(
                f"a run of {self.epochs} epochs over {self.dataset_size} samples has no sample in "
                "it"
            )

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return round(self.epochs * self.dataset_size)

    def epoch(self, samples_seen: int) -> float:
        """Epochs passed after `samples_seen` samples."""
        return samples_seen / self.dataset_size

    def samples_until(self, mark: float) -> int:
        """The smallest number of samples at which `mark` (in epochs) is reached."""
        samples = max(0, math.ceil(mark * self.dataset_size) - 1)
        while not reached(self.epoch(samples), mark):
            samples += 1
        return samples


def reached(epoch: float, mark: float) -> bool:
    """Whether progress `epoch` has come to `mark` (both in epochs): with a mark at 20, epoch 20.0
    has, 19.99 has not.
    """
    return epoch >= mark * (1 - _TOLERANCE)


def milestones_reached(
    epoch: float, every_epochs: float | None, at_epochs: Sequence[float] | None
) -> int:
    """How many milestones `epoch` has reached: at 1, 2, 3, … times `every_epochs`, or those listed
    in `at_epochs`.

    >>> [milestones_reached(epoch, 20, None) for epoch in (0, 19.999, 20, 45)]
    [0, 0, 1, 2]
    >>> milestones_reached(31, None, (30, 60))
    1
    """
    if at_epochs is not None:
        return sum(reached(epoch, mark) for mark in at_epochs)
    if every_epochs is None:
        return 0
    count = math.floor(epoch / every_epochs)
    return count + 1 if reached(epoch, (count + 1) * every_epochs) else count


def next_mark(
    epoch: float, every_epochs: float | None, at_epochs: Sequence[float] | None
) -> float | None:
    """The next mark (in epochs) that `epoch` has not reached, or None."""
    if at_epochs is not None:
        return min((mark for mark in at_epochs if not reached(epoch, mark)), default=None)
    if every_epochs is None:
        return None
    return (milestones_reached(epoch, every_epochs, None) + 1) * every_epochs


def check_milestones(
    every_epochs: float | None, at_epochs: Sequence[float] | None, names: tuple[str, str]
) -> None:
    """Refuse marks that cannot be followed; `names` are the two keys as the user writes them.

    Raises:
        ValueError: unless exactly one of the two is given, with positive (and rising) epochs.
    """
    every_name, at_name = names
    if (every_epochs is None) == (at_epochs is None):
        raise ValueError(f"give either {every_name} or {at_name}")
    if every_epochs is not None and not (math.isfinite(every_epochs) and every_epochs > 0):
        raise ValueError(f"{every_name} must be a positive number of epochs, got {every_epochs}")
    if at_epochs is not None:
        if not at_epochs or at_epochs[0] <= 0 or any(b <= a for a, b in pairwise(at_epochs)):
            raise ValueError(f"{at_name} must be rising positive epochs, got {list(at_epochs)}")
        if not all(math.isfinite(mark) for mark in at_epochs):
            raise ValueError(f"{at_name} must be finite epochs, got {list(at_epochs)}")
