"""The learning-rate schedule of a run.

Formula:  lr = base_lr · multiplier(epoch at the step's end) · decay(epoch at the step's start)
Source:   docs/design.md. Warmup is read at the end of a step, so the first step moves and the first
          full-rate step is the one that completes the warmup; decay is read at its start, so the
          first step is undecayed.
Contract: pure; `stages` holds the stages begun so far, including the one that the step belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hvdlarge.schedule.decay import ConstantDecay, Decay
from hvdlarge.schedule.scaling import Scaling
from hvdlarge.schedule.warmup import NoWarmup, StageStart, Warmup, multiplier


@dataclass(frozen=True)
class LRSchedule:
    """How the learning rate of a run comes about.

    Args:
        base: the lr tuned for the base batch (`base_lr`).
        scaling: how the lr follows the batch.
        warmup: how it rises at the start and at growths.
        decay: how it falls over the run.
    """

    base: float
    scaling: Scaling = "none"
    warmup: Warmup = field(default_factory=NoWarmup)
    decay: Decay = field(default_factory=ConstantDecay)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.base) and self.base > 0):
            raise ValueError(f"base must be a positive learning rate, got {self.base}")

    def lr(self, stages: Sequence[StageStart], start: float, end: float, epochs: float) -> float:
        """The lr of the step that goes from epoch `start` to epoch `end` in a run of `epochs`
        epochs.
        """
        warmup_end = self.warmup.length(stages[0].batch_factor)
        rise = multiplier(self.warmup, self.scaling, stages, end)
        return self.base * rise * self.decay.factor(start, warmup_end, epochs)

    def upper_bound(
        self,
        stages: Sequence[StageStart],
        first_start: float,
        last_start: float,
        last_end: float,
        epochs: float,
    ) -> float:
        """Upper bound of the lr over steps of the last stage that start in [`first_start`,
        `last_start`] and end by `last_end` (epochs); exact for a single step.
        """
        warmup_end = self.warmup.length(stages[0].batch_factor)
        # Within a stage the multiplier never falls
        rise = multiplier(self.warmup, self.scaling, stages, last_end)
        return (
            self.base
            * rise
            * self.decay.highest_factor(first_start, last_start, warmup_end, epochs)
        )
