"""Decay of the learning rate over a run.

Formula:  constant: 1;   multistep: gamma^(marks reached);
          polynomial: end + (1 − end)·(1 − x)^power,  x = (epoch − W) / (T − W), W = end of the first warmup, T = the run's
          length (after_warmup: true, the reading of MLPerf and of the LEGW tables), or x = epoch / T (after_warmup: false)
Source:   polynomial, power 2: You, Gitman, Ginsburg, LARS (2017), Algorithm 1; multistep: AdaBatch (2017), where a baseline
          decay of 0.375 and a batch doubling with linear scaling give the paper's factor 0.75.
Contract: pure; read at the start of a step; 1 before it begins and never above 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hvdlarge.schedule.progress import check_marks, marks_reached


@dataclass(frozen=True)
class ConstantDecay:
    """No decay."""

    policy: Literal["constant"] = "constant"

    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """1, always."""
        return 1.0


@dataclass(frozen=True)
class MultistepDecay:
    """The rate is multiplied by `gamma` at each mark.

    Args:
        gamma: in (0, 1].
        every_epochs: a mark every so many epochs; or
        milestones: a mark at each of these epochs.

    >>> decay = MultistepDecay(gamma=0.1, milestones=(30, 60))
    >>> [round(decay.factor(epoch, 0, 90), 12) for epoch in (29, 30, 60)]
    [1.0, 0.1, 0.01]
    """

    policy: Literal["multistep"] = "multistep"
    gamma: float = 0.1
    every_epochs: float | None = None
    milestones: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma}")
        check_marks(self.every_epochs, self.milestones, ("every_epochs", "milestones"))

    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """The decay at `epoch` (epochs); the end of the warmup and the run's length do not matter to it."""
        return self.gamma ** marks_reached(epoch, self.every_epochs, self.milestones)


@dataclass(frozen=True)
class PolynomialDecay:
    """Polynomial decay to `end_factor` at the end of the run.

    Args:
        power: of the polynomial; 2 in the LARS paper.
        end_factor: the decay at the end of the run, in [0, 1].
        after_warmup: measured from the end of the first warmup (True) or from the start of the run (False).

    >>> decay = PolynomialDecay(power=2)
    >>> [round(10 * decay.factor(epoch, 0, 100), 9) for epoch in (0, 25, 50, 75, 99)]
    [10.0, 5.625, 2.5, 0.625, 0.001]
    """

    policy: Literal["polynomial"] = "polynomial"
    power: float = 2.0
    end_factor: float = 0.0
    after_warmup: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power must be a positive number, got {self.power}")
        if not 0 <= self.end_factor <= 1:
            raise ValueError(f"end_factor must lie between 0 and 1, got {self.end_factor}")

    def factor(self, epoch: float, warmup_end: float, epochs: float) -> float:
        """The decay at `epoch`, for a first warmup that ends at `warmup_end` in a run of `epochs` (all in epochs)."""
        begin = min(warmup_end, epochs) if self.after_warmup else 0.0
        if epoch <= begin:
            return 1.0
        passed = min(1.0, (epoch - begin) / (epochs - begin))
        return self.end_factor + (1.0 - self.end_factor) * (1.0 - passed) ** self.power


Decay = ConstantDecay | MultistepDecay | PolynomialDecay
