"""A run on paper: its stages, without taking a step.

Contract: pure; the stages, step counts and rates are those that the controller will decide, found by arithmetic, so that a
          run of a million steps costs no more to outline than one of ten. A test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdlarge.schedule.growth import Growth
from hvdlarge.schedule.progress import Clock
from hvdlarge.schedule.rate import RateSchedule
from hvdlarge.schedule.warmup import StageStart, full_rate_epoch

_PROBES = 64  # rates looked at within a stage to find its highest


@dataclass(frozen=True)
class StageOutline:
    """One stretch of constant batch."""

    stage: int  # index
    start: float  # epochs
    end: float  # epochs
    steps: int  # updates
    global_batch: int  # samples
    last_batch: int  # samples of the stage's last step; smaller than global_batch at the end of a run only
    first_lr: float
    highest_lr: float
    last_lr: float
    full_rate: float  # epoch at which the rate has followed the batch


def outline(clock: Clock, base_batch: int, initial: int, growth: Growth, rate: RateSchedule) -> list[StageOutline]:
    """The stages of a run of `clock` that begins with `initial` samples an update; `base_batch` is where k = 1."""
    stages: list[StageOutline] = []
    starts: list[StageStart] = []
    samples, total = 0, clock.total_samples
    while samples < total:
        epoch = clock.epoch(samples)
        batch = growth.global_batch(initial, epoch)
        starts.append(StageStart(epoch, batch / base_batch))
        mark = growth.next_mark(initial, epoch)
        until = total if mark is None else min(total, clock.samples_until(mark))
        steps = -(-(until - samples) // batch)
        begun, end = tuple(starts), min(total, samples + steps * batch)

        def lr(step: int, begun: tuple[StageStart, ...] = begun, first: int = samples, batch: int = batch) -> float:
            start = first + step * batch
            return rate.lr(begun, clock.epoch(start), clock.epoch(min(total, start + batch)), clock.epochs)

        full_rate = full_rate_epoch(rate.warmup, starts)
        peak = max(0, min(steps - 1, -(-(clock.samples_until(full_rate) - samples) // batch) - 1))
        probes = {0, steps - 1, peak, *(number * (steps - 1) // _PROBES for number in range(_PROBES))}
        stages.append(
            StageOutline(
                stage=len(stages),
                start=epoch,
                end=clock.epoch(end),
                steps=steps,
                global_batch=batch,
                last_batch=end - samples - (steps - 1) * batch,
                first_lr=lr(0),
                highest_lr=max(lr(step) for step in probes),
                last_lr=lr(steps - 1),
                full_rate=full_rate,
            )
        )
        samples = end
    return stages
