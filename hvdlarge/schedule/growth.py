"""Growth of the global batch during a run.

Formula:  adabatch: global_batch(epoch) = min(max, round(initial · factor^n)),
          n = milestones reached at `epoch`; 2^62 at most
Source:   AdaBatch: Devarakonda, Naumov, Garland, "AdaBatch: Adaptive Batch Sizes for Training Deep
          Neural Networks" (2017), section 3: at fixed epochs the batch is multiplied by beta
          (2 in the main experiments).
Contract: pure; epochs are floats; a milestone acts on the first step that starts at or after it,
          and only between steps; a batch never shrinks. The lr that goes with a growth is in
          scaling.py and warmup.py, the decay that goes with it in decay.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from hvdlarge.schedule.progress import (
    check_milestones,
    milestones_past_the_end,
    milestones_reached,
    never_reached,
)
from hvdlarge.schedule.section import Policy

LARGEST_BATCH = 2**62  # samples: more than any data set, and what the record of a decision holds


class Growth(Policy, ABC):
    """How the global batch grows during a run.

    A growth that depends on measurements changes the batch only at certain points. Their positions
    depend on the epoch alone. The decision at such a point waits until all earlier steps have been
    taken, and uses what was measured in the last of them; all other decisions are made ahead. So
    the batches do not depend on how far ahead a run decides, on the number of workers, or on
    interruptions.
    """

    depends_on_measurement: ClassVar[bool] = False

    @abstractmethod
    def next_batch(
        self, initial: int, current: int, epoch: float, measured: Mapping[str, float]
    ) -> int:
        """Samples per update of the step that begins at `epoch`.

        Args:
            initial: samples per update of the run's first step.
            current: samples per update of the step before; `initial` for the first.
            epoch: in epochs.
            measured: by name, as of the last step that updated the weights: `loss` is the mean over
                its global batch, `noise_scale` the gradient noise scale in samples, where the job
                measures it and it is available. Empty before there is one, and for a growth that
                does not depend on measurements, which is a function of `initial` and `epoch` alone.

        Returns:
            `current` or more.
        """

    def checked_next_batch(
        self, initial: int, current: int, epoch: float, measured: Mapping[str, float]
    ) -> int:
        """`next_batch` for the same arguments.

        Raises:
            ValueError: if it is below `current`, or no number of samples.
        """
        batch = self.checked(self.next_batch(initial, current, epoch, measured), epoch)
        if batch < current:
            raise ValueError(
                f"{type(self).__name__} gives a batch of {batch} after {current} at epoch "
                f"{epoch:g}: batches only grow"
            )
        return batch

    def checked(self, batch: int, epoch: float) -> int:
        """A batch that `next_batch` has returned.

        Raises:
            ValueError: if it is no number of samples.
        """
        if type(batch) is not int or batch > LARGEST_BATCH:
            raise ValueError(
                f"{type(self).__name__} gives a batch of {batch!r} at epoch {epoch:g}: it must be "
                f"a whole number of samples, at most {LARGEST_BATCH}"
            )
        return batch

    def acts_between(self, before: float, epoch: float) -> bool:
        """Whether a growth that depends on measurements may change the batch at an epoch in
        (`before`, `epoch`]. The default, True, means that no step can be decided ahead.
        """
        return True

    def check_initial(self, initial: int) -> None:
        """Raise ValueError for a first batch (samples) from which the run cannot grow."""
        return


@dataclass(frozen=True)
class NoGrowth(Growth):
    """One batch for the whole run."""

    policy: Literal["none"] = "none"
    """A constant global batch."""

    def next_batch(
        self, initial: int, current: int, epoch: float, measured: Mapping[str, float]
    ) -> int:
        """Samples per update: `initial`, always."""
        return initial


@dataclass(frozen=True)
class AdaBatchGrowth(Growth):
    """AdaBatch: the batch is multiplied by `factor` at each milestone, up to `max`.

    Raises:
        ValueError: for values that cannot be followed.

    >>> growth = AdaBatchGrowth(factor=2, every_epochs=20, max=2048)
    >>> [growth.next_batch(128, 128, epoch, {}) for epoch in (0, 19.99, 20, 40, 60, 80, 100)]
    [128, 128, 256, 512, 1024, 2048, 2048]
    """

    policy: Literal["adabatch"] = "adabatch"
    """AdaBatch (Devarakonda et al. 2017): multiply the batch at milestones."""
    factor: float = 2.0
    """Factor by which each growth multiplies the batch, above 1."""
    every_epochs: float | None = None
    """Epochs between growths. Give either this or `at_epochs`."""
    at_epochs: tuple[float, ...] | None = None
    """Epochs of the growths, increasing. Give either this or `every_epochs`."""
    max: int | None = None
    """Largest global batch, in samples; default: no limit."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 1):
            raise ValueError(f"factor must be a number above 1, got {self.factor}")
        if self.max is not None and self.max < 1:
            raise ValueError(f"max must be at least 1 sample, got {self.max}")
        check_milestones(self.every_epochs, self.at_epochs, ("every_epochs", "at_epochs"))

    def next_batch(
        self, initial: int, current: int, epoch: float, measured: Mapping[str, float]
    ) -> int:
        """Samples per update at `epoch`, for a run that began with `initial` samples."""
        return self._after(initial, milestones_reached(epoch, self.every_epochs, self.at_epochs))

    def check_initial(self, initial: int) -> None:
        """Raise ValueError for a first batch above `max`."""
        if self.max is not None and self.max < initial:
            raise ValueError(f"growth.max is {self.max}, below the first global batch of {initial}")

    def errors(self, epochs: float) -> Iterator[tuple[str, str]]:
        """Milestones that the run does not reach."""
        return milestones_past_the_end("at_epochs", self.at_epochs, epochs)

    def notes(self, epochs: float) -> Iterator[str]:
        """A note if it never acts."""
        if never_reached(self.every_epochs, epochs):
            yield (
                f"every_epochs is {self.every_epochs:g}, the run has {epochs:g}: the batch never "
                "grows"
            )

    def _after(self, initial: int, growths: int) -> int:
        largest = LARGEST_BATCH if self.max is None else max(initial, min(self.max, LARGEST_BATCH))
        try:
            return min(largest, round(initial * self.factor**growths))
        except OverflowError:
            return largest
