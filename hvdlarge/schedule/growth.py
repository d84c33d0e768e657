"""Growth of the global batch during a run.

Formula:  global_batch(epoch) = min(max, round(initial · factor^n)),  n = growth marks reached at
          `epoch`; 2^62 at most
Source:   AdaBatch: Devarakonda, Naumov, Garland, "AdaBatch: Adaptive Batch Sizes for Training Deep
          Neural Networks" (2017), section 3: at fixed epoch marks the batch is multiplied by beta
          (2 in the main experiments).
Contract: pure; epochs are floats; a mark acts on the first step that starts at or after it, and
          only between steps. The rate that goes with a growth is in scaling.py and warmup.py, the
          decay that goes with it in decay.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hvdlarge.schedule.progress import check_milestones, milestones_reached
from hvdlarge.schedule.section import SECTION

LARGEST_BATCH = 2**62  # samples: more than any data set, and what the record of a decision holds


@dataclass(frozen=True)
class NoGrowth:
    """One batch for the whole run."""

    __pydantic_config__ = SECTION

    policy: Literal["none"] = "none"
    """A constant global batch."""

    def global_batch(self, initial: int, epoch: float) -> int:
        """Samples per update at `epoch`: `initial`, always."""
        return initial


@dataclass(frozen=True)
class AdaBatchGrowth:
    """AdaBatch: the batch is multiplied by `factor` at each mark, up to `max`.

    Raises:
        ValueError: for values that cannot be followed.

    >>> growth = AdaBatchGrowth(factor=2, every_epochs=20, max=2048)
    >>> [growth.global_batch(128, epoch) for epoch in (0, 19.99, 20, 40, 60, 80, 100)]
    [128, 128, 256, 512, 1024, 2048, 2048]
    """

    __pydantic_config__ = SECTION

    policy: Literal["adabatch"] = "adabatch"
    """AdaBatch (Devarakonda et al. 2017): multiply the batch at milestones."""
    factor: float = 2.0
    """What each growth multiplies the batch by, above 1."""
    every_epochs: float | None = None
    """A growth every so many epochs; or"""
    at_epochs: tuple[float, ...] | None = None
    """a growth at each of these epochs."""
    max: int | None = None
    """Largest global batch, in samples; default: no limit."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 1):
            raise ValueError(f"factor must be a number above 1, got {self.factor}")
        if self.max is not None and self.max < 1:
            raise ValueError(f"max must be at least 1 sample, got {self.max}")
        check_milestones(self.every_epochs, self.at_epochs, ("every_epochs", "at_epochs"))

    def global_batch(self, initial: int, epoch: float) -> int:
        """Samples per update at `epoch`, for a run that began with `initial` samples."""
        return self._after(initial, milestones_reached(epoch, self.every_epochs, self.at_epochs))

    def _after(self, initial: int, growths: int) -> int:
        largest = LARGEST_BATCH if self.max is None else max(initial, min(self.max, LARGEST_BATCH))
        try:
            return min(largest, round(initial * self.factor**growths))
        except OverflowError:
            return largest


Growth = NoGrowth | AdaBatchGrowth
