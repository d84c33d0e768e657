"""Growth of the batch by the gradient noise scale that the run measures.

Formula:  at each milestone, B ← factor · B if the noise scale is at least `threshold` · B
Source:   McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training" (2018): up to the
          noise scale a larger batch saves nearly as many steps as it costs samples, and the scale
          rises while a run converges.
Contract: that of Growth: a function of what was measured, so a resumed run decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from hvdlarge.schedule.growth import LARGEST_BATCH, Growth
from hvdlarge.schedule.progress import milestones_reached, never_reached


@dataclass(frozen=True)
class NoiseScaleGrowth(Growth):
    """Multiply the batch at a milestone where the noise scale has outgrown it.

    Raises:
        ValueError: for values that cannot be followed.

    >>> growth = NoiseScaleGrowth(every_epochs=1.0, max=512)
    >>> growth.next_batch(64, 128, 1.0, {"noise_scale": 300.0})
    256
    >>> growth.next_batch(64, 128, 1.0, {"noise_scale": 200.0})
    128
    """

    depends_on_measurement: ClassVar[bool] = True

    policy: Literal["noise_scale"] = "noise_scale"
    """Multiply the batch where the measured gradient noise scale (McCandlish et al. 2018) allows
    it; needs `log.noise_every_steps`.
    """
    every_epochs: float = 1.0
    """Epochs between the points at which the batch may grow."""
    factor: float = 2.0
    """Factor by which each growth multiplies the batch, above 1."""
    threshold: float = 2.0
    """The batch grows if the noise scale is at least so many times the batch."""
    max: int | None = None
    """Largest global batch, in samples; default: no limit."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be above 0, got {value}")
        if not (math.isfinite(self.factor) and self.factor > 1):
            raise ValueError(f"factor must be a number above 1, got {self.factor}")
        if self.max is not None and self.max < 1:
            raise ValueError(f"max must be at least 1 sample, got {self.max}")

    def acts_between(self, before: float, epoch: float) -> bool:
        """Whether a milestone lies in (`before`, `epoch`]."""
        reached = (milestones_reached(each, self.every_epochs, None) for each in (before, epoch))
        return next(reached) < next(reached)

    def next_batch(
        self, initial: int, current: int, epoch: float, measured: Mapping[str, float]
    ) -> int:
        """Samples per update from `epoch` on; as before where the noise scale is not available."""
        noise_scale = measured.get("noise_scale")
        if noise_scale is None or noise_scale < self.threshold * current:
            return current
        largest = LARGEST_BATCH if self.max is None else max(current, min(self.max, LARGEST_BATCH))
        return min(largest, round(current * self.factor))

    def check_initial(self, initial: int) -> None:
        """Raise ValueError for a first batch above `max`."""
        if self.max is not None and self.max < initial:
            raise ValueError(f"growth.max is {self.max}, below the first global batch of {initial}")

    def notes(self, epochs: float) -> Iterator[str]:
        """A note if it never acts."""
        if never_reached(self.every_epochs, epochs):
            yield (
                f"every_epochs is {self.every_epochs:g}, the run has {epochs:g}: the batch never "
                "grows"
            )
