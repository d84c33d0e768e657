"""Decay of the learning rate over a run.

Formula:  constant:    1
          multistep:   gamma^(milestones reached)
          with x = (epoch − W) / (T − W), W = end of the first warmup, T = the run's length
          (after_warmup: true, the reading of MLPerf and of the LEGW tables), or W = 0
          (after_warmup: false):
          polynomial:  end + (1 − end)·(1 − x)^power
          cosine:      end + (1 − end)·(1 + cos πx) / 2
          exponential: gamma^((epoch − W) / every_epochs)
          one_cycle:   with p = peak: linear from start to 1 over x in [0, p], back to start over
                       x in [p, 2p], then on to end over x in [2p, 1]; it holds its own warmup, so
                       the job's must be none and W = 0
Source:   polynomial, power 2: You, Gitman, Ginsburg, LARS (2017), Algorithm 1; multistep: AdaBatch
          (2017), where a baseline decay of 0.375 and a batch doubling with linear scaling give the
          paper's factor 0.75; exponential: one of the schedules evaluated in LEGW (2019);
          cosine: Loshchilov and Hutter, SGDR (2017), equation 5 without restarts; one_cycle: Smith
          and Topin, "Super-Convergence" (2018), section 3, "1cycle".
Contract: pure; read at the start of a step; 1 before it begins (one_cycle: at its peak) and never
          above 1. Each policy also gives its largest factor over an interval, from which the
          outline finds the highest lr of a stage.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from hvdlarge.schedule.progress import (
    check_milestones,
    milestones_past_the_end,
    milestones_reached,
    never_reached,
)
from hvdlarge.schedule.section import Policy


class Decay(Policy, ABC):
    """How the learning rate falls over a run."""

    # Whether `factor` depends on `epochs`; if it does not, a run may be made longer or shorter
    depends_on_length: ClassVar[bool] = True
    # Whether it is its own warmup, so that the job must have none
    includes_warmup: ClassVar[bool] = False

    @abstractmethod
    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """What multiplies the lr of a step, in [0, 1].

        Args:
            epoch: at which the step begins, in epochs.
            warmup_end: of the first warmup, in epochs.
            epochs: length of the run, in epochs.
        """

    def highest_factor(self, start: float, end: float, warmup_end: float, epochs: float) -> float:
        """The largest factor in [start, end] (epochs); here that of a decay that never rises."""
        return self.factor(start, warmup_end, epochs)


@dataclass(frozen=True)
class ConstantDecay(Decay):
    """No decay."""

    depends_on_length: ClassVar[bool] = False

    policy: Literal["constant"] = "constant"
    """No decay."""

    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """1, always."""
        return 1.0


@dataclass(frozen=True)
class MultistepDecay(Decay):
    """The lr is multiplied by `gamma` at each milestone.

    >>> decay = MultistepDecay(gamma=0.1, milestones=(30, 60))
    >>> [round(decay.factor(epoch, 0, 90), 12) for epoch in (29, 30, 60)]
    [1.0, 0.1, 0.01]
    """

    depends_on_length: ClassVar[bool] = False

    policy: Literal["multistep"] = "multistep"
    """Multiply the rate by `gamma` at each milestone."""
    gamma: float = 0.1
    """Factor at each milestone, in (0, 1]."""
    every_epochs: float | None = None
    """Epochs between milestones. Give either this or `milestones`."""
    milestones: tuple[float, ...] | None = None
    """Epochs of the milestones, increasing. Give either this or `every_epochs`."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma}")
        check_milestones(self.every_epochs, self.milestones, ("every_epochs", "milestones"))

    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """The lr factor at `epoch` (epochs); the end of the warmup and the run's length do not
        matter to it.
        """
        return self.gamma ** milestones_reached(epoch, self.every_epochs, self.milestones)

    def errors(self, epochs: float) -> Iterator[tuple[str, str]]:
        """Milestones that the run does not reach."""
        return milestones_past_the_end("milestones", self.milestones, epochs)

    def notes(self, epochs: float) -> Iterator[str]:
        """A note if it never acts."""
        if never_reached(self.every_epochs, epochs):
            yield (
                f"every_epochs is {self.every_epochs:g}, the run has {epochs:g}: the lr never "
                "decays"
            )


@dataclass(frozen=True)
class PolynomialDecay(Decay):
    """Polynomial decay to `end_factor` at the end of the run.

    >>> decay = PolynomialDecay(power=2)
    >>> [round(10 * decay.factor(epoch, 0, 100), 9) for epoch in (0, 25, 50, 75, 99)]
    [10.0, 5.625, 2.5, 0.625, 0.001]
    """

    policy: Literal["polynomial"] = "polynomial"
    """Polynomial decay over the run."""
    power: float = 2.0
    """Power of the polynomial; 2 in the LARS paper."""
    end_factor: float = 0.0
    """Factor of the lr at the end of the run, in [0, 1]."""
    after_warmup: bool = True
    """Measure from the end of the first warmup; false: from the start of the run."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power must be a positive number, got {self.power}")
        _check_factor("end_factor", self.end_factor)

    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """The lr factor at `epoch`, for a first warmup that ends at `warmup_end` in a run of
        `epochs` (all in epochs).
        """
        passed = _passed(epoch, warmup_end if self.after_warmup else 0.0, epochs)
        return self.end_factor + (1.0 - self.end_factor) * (1.0 - passed) ** self.power


@dataclass(frozen=True)
class CosineDecay(Decay):
    """Half a cosine wave from 1 to `end_factor` at the end of the run.

    >>> decay = CosineDecay()
    >>> [round(decay.factor(epoch, 10, 110), 9) for epoch in (10, 35, 60, 110)]
    [1.0, 0.853553391, 0.5, 0.0]
    """

    policy: Literal["cosine"] = "cosine"
    """Half a cosine wave over the run."""
    end_factor: float = 0.0
    """Factor of the lr at the end of the run, in [0, 1]."""
    after_warmup: bool = True
    """Measure from the end of the first warmup; false: from the start of the run."""

    def __post_init__(self) -> None:
        _check_factor("end_factor", self.end_factor)

    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """The lr factor at `epoch`, for a first warmup that ends at `warmup_end` in a run of
        `epochs` (all in epochs).
        """
        passed = _passed(epoch, warmup_end if self.after_warmup else 0.0, epochs)
        return self.end_factor + (1.0 - self.end_factor) * 0.5 * (1.0 + math.cos(math.pi * passed))


@dataclass(frozen=True)
class ExponentialDecay(Decay):
    """The lr is multiplied by `gamma` over any `every_epochs` epochs, smoothly.

    >>> decay = ExponentialDecay(gamma=0.5, every_epochs=2)
    >>> [decay.factor(epoch, 1, 90) for epoch in (0, 1, 3, 5)]
    [1.0, 1.0, 0.5, 0.25]
    """

    depends_on_length: ClassVar[bool] = False

    policy: Literal["exponential"] = "exponential"
    """Multiply the rate by `gamma` per `every_epochs`, smoothly."""
    gamma: float = 0.95
    """Factor, in (0, 1]."""
    every_epochs: float = 1.0
    """Epochs over which the rate falls by `gamma`."""
    after_warmup: bool = True
    """Measure from the end of the first warmup; false: from the start of the run."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma}")
        if not (math.isfinite(self.every_epochs) and self.every_epochs > 0):
            raise ValueError(
                f"every_epochs must be a positive number of epochs, got {self.every_epochs}"
            )

    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """The lr factor at `epoch`, for a first warmup that ends at `warmup_end` (in epochs)."""
        begin = warmup_end if self.after_warmup else 0.0
        return self.gamma ** (max(0.0, epoch - begin) / self.every_epochs)


@dataclass(frozen=True)
class OneCycle(Decay):
    """One rise and fall of the rate, then a long tail: the 1cycle schedule.

    >>> cycle = OneCycle(peak=0.4, start_factor=0.1, end_factor=0.001)
    >>> [round(cycle.factor(epoch, 0, 100), 9) for epoch in (0, 20, 40, 60, 80, 90, 100)]
    [0.1, 0.55, 1.0, 0.55, 0.1, 0.0505, 0.001]
    """

    includes_warmup: ClassVar[bool] = True

    policy: Literal["one_cycle"] = "one_cycle"
    """One cycle: up, down again, and a long tail (super-convergence)."""
    peak: float = 0.45
    """Where the rate peaks, as a fraction of the run, in (0, 0.5]."""
    start_factor: float = 0.1
    """Rate at the start and at twice the peak, relative to the peak, in (0, 1]."""
    end_factor: float = 0.001
    """Rate at the end of the run, relative to the peak, in [0, start_factor]."""

    def __post_init__(self) -> None:
        if not 0 < self.peak <= 0.5:
            raise ValueError(f"peak must lie above 0 and not above 0.5 of the run, got {self.peak}")
        if not 0 < self.start_factor <= 1:
            raise ValueError(f"start_factor must be above 0 and at most 1, got {self.start_factor}")
        if not 0 <= self.end_factor <= self.start_factor:
            raise ValueError(
                f"end_factor must lie between 0 and start_factor ({self.start_factor}), got "
                f"{self.end_factor}"
            )

    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """The factor at `epoch` of a run of `epochs` (both in epochs); `warmup_end` is 0, since the
        cycle is its own warmup.
        """
        passed = _passed(epoch, 0.0, epochs)
        if passed <= 2 * self.peak:
            return 1.0 - (1.0 - self.start_factor) * abs(passed - self.peak) / self.peak
        left = (1.0 - passed) / (1.0 - 2 * self.peak)
        return self.end_factor + (self.start_factor - self.end_factor) * left

    def notes(self, epochs: float) -> Iterator[str]:
        """A note if there is no tail."""
        if self.peak == 0.5 and self.end_factor != self.start_factor:
            yield "peak is 0.5: the run ends at start_factor, and end_factor has no effect"

    def highest_factor(self, start: float, end: float, warmup_end: float, epochs: float) -> float:
        """The largest factor in [start, end] (epochs): 1 where the peak lies in it."""
        if start <= self.peak * epochs <= end:
            return 1.0
        return max(self.factor(epoch, warmup_end, epochs) for epoch in (start, end))


def _passed(epoch: float, begin: float, epochs: float) -> float:
    """The fraction of the way from `begin` to the end of the run covered at `epoch`, in [0,
    1].
    """
    if epoch <= begin or begin >= epochs:
        return 0.0
    return min(1.0, (epoch - begin) / (epochs - begin))


def _check_factor(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
