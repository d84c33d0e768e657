"""Progress of a run: samples are the clock, epochs are a float read off it.

Formula:  epoch = samples_seen / dataset_size;  total_samples = epochs · dataset_size (rounded to
          whole samples)
Source:   docs/design.md. Counting steps instead would shift every schedule when the batch grows.
Contract: pure. Every comparison of progress with a milestone goes through `reached`, so that two
          policies with the same milestone (AdaBatch's growth and its decay) act in the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

# A milestone such as 3 × 0.1 epochs is not exactly a float; a progress this close to it (relative)
# has reached it.
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

    def samples_until(self, milestone: float) -> int:
        """The smallest number of samples at which `milestone` (in epochs) is reached."""
        samples = max(0, math.ceil(milestone * self.dataset_size) - 1)
        while not reached(self.epoch(samples), milestone):
            samples += 1
        return samples


def reached(epoch: float, milestone: float) -> bool:
    """Whether progress `epoch` has reached `milestone` (both in epochs): with a milestone at 20,
    epoch 20.0 has, 19.99 has not.
    """
    return epoch >= milestone * (1 - _TOLERANCE)


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
        return sum(reached(epoch, milestone) for milestone in at_epochs)
    if every_epochs is None:
        return 0
    count = math.floor(epoch / every_epochs)
    return count + 1 if reached(epoch, (count + 1) * every_epochs) else count


def milestones_past_the_end(
    key: str, at_epochs: Sequence[float] | None, epochs: float
) -> Iterator[tuple[str, str]]:
    """The key of listed milestones that a run of `epochs` epochs does not reach, and what is wrong
    with them.
    """
    if late := [milestone for milestone in at_epochs or () if milestone >= epochs]:
        shown = ", ".join(f"{milestone:g}" for milestone in late)
        yield (
            key,
            f"{shown} is not before the end of the run at epoch {epochs:g}; milestones are given "
            "in epochs, not in steps",
        )


def never_reached(every_epochs: float | None, epochs: float) -> bool:
    """Whether a run of `epochs` epochs ends before the first milestone at `every_epochs`."""
    return every_epochs is not None and every_epochs >= epochs


def check_milestones(
    every_epochs: float | None, at_epochs: Sequence[float] | None, names: tuple[str, str]
) -> None:
    """Refuse milestones that cannot be followed; `names` are the two keys as the user writes them.

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
        if not all(math.isfinite(milestone) for milestone in at_epochs):
            raise ValueError(f"{at_name} must be finite epochs, got {list(at_epochs)}")
