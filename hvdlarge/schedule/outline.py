"""A run on paper: its stages, without taking a step.

Contract: pure; the stages, step counts and rates are those that the controller will decide, found
          by arithmetic, so that a run of a million steps costs no more to outline than one of ten.
          A test holds the two together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hvdlarge.schedule.decay import Decay, MultistepDecay, OneCycle
from hvdlarge.schedule.growth import Growth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.progress import Clock, next_mark
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
    # Samples of the stage's last step; smaller than global_batch at the end of a run only
    last_batch: int
    first_lr: float
    highest_lr: float
    last_lr: float
    full_rate: float  # epoch at which the rate has followed the batch


class Stretch(NamedTuple):
    """One stretch of constant batch, and the rate of each of its steps."""

    first_sample: int
    steps: int
    global_batch: int
    starts: tuple[StageStart, ...]  # of the stages up to this one
    lr: Callable[[int], float]  # of the step with this number within the stretch


def stretches(
    clock: Clock, base_batch: int, initial: int, growth: Growth, rate: LRSchedule
) -> Iterator[Stretch]:
    """The stretches of a run of `clock` that begins with `initial` samples an update; `base_batch`
    is where k = 1.
    """
    starts: list[StageStart] = []
    samples, total = 0, clock.total_samples
    while samples < total:
        epoch = clock.epoch(samples)
        batch = growth.global_batch(initial, epoch)
        starts.append(StageStart(epoch, batch / base_batch))
        steps = _steps_of(clock, initial, growth, samples, batch)

        def lr(
            step: int,
            begun: tuple[StageStart, ...] = tuple(starts),
            first: int = samples,
            batch: int = batch,
        ) -> float:
            start = first + step * batch
            return rate.lr(
                begun, clock.epoch(start), clock.epoch(min(total, start + batch)), clock.epochs
            )

        yield Stretch(samples, steps, batch, tuple(starts), lr)
        samples = min(total, samples + steps * batch)


def _steps_of(clock: Clock, initial: int, growth: Growth, first: int, batch: int) -> int:
    """Steps of `batch` samples from sample `first` on, up to the end of the run or the first step
    of a larger batch.
    """
    left = -(-(clock.total_samples - first) // batch)

    def has_grown(step: int) -> bool:
        return growth.global_batch(initial, clock.epoch(first + step * batch)) > batch

    # Batches only grow, so this is a search: marks may be many more than steps, and most of them
    # may round to no change.
    return 1 + bisect_left(range(1, left), True, key=has_grown)


def outline(
    clock: Clock, base_batch: int, initial: int, growth: Growth, rate: LRSchedule
) -> list[StageOutline]:
    """The stages of a run; the arguments are those of `stretches`."""
    stages: list[StageOutline] = []
    for stretch in stretches(clock, base_batch, initial, growth, rate):
        first, steps, batch = stretch.first_sample, stretch.steps, stretch.global_batch
        end = min(clock.total_samples, first + steps * batch)
        full_rate = full_rate_epoch(rate.warmup, stretch.starts)
        turns = [full_rate, *_turns(rate.decay, clock.epochs, full_rate)]
        near = {
            -(-(clock.samples_until(turn) - first) // batch) + aside
            for turn in turns
            for aside in (-1, 0)
        }
        stages.append(
            StageOutline(
                stage=len(stages),
                start=clock.epoch(first),
                end=clock.epoch(end),
                steps=steps,
                global_batch=batch,
                last_batch=end - first - (steps - 1) * batch,
                first_lr=stretch.lr(0),
                highest_lr=_highest(stretch, [step for step in near if 0 <= step < steps]),
                last_lr=stretch.lr(steps - 1),
                full_rate=full_rate,
            )
        )
    return stages


def _turns(decay: Decay, epochs: float, full_rate: float) -> list[float]:
    """Epochs at which a rate may turn from rising to falling, beside the end of its warmup."""
    if isinstance(decay, OneCycle):
        return [decay.peak * epochs]
    marks: list[float] = []
    if isinstance(decay, MultistepDecay):  # marks inside a warmup
        mark = next_mark(0.0, decay.every_epochs, decay.milestones)
        while mark is not None and mark <= full_rate and len(marks) < _PROBES:
            marks.append(mark)
            mark = next_mark(mark, decay.every_epochs, decay.milestones)
    return marks


def _highest(stretch: Stretch, near: Sequence[int]) -> float:
    """The highest rate of a stretch: that of its turns, or of a search that closes in on the
    highest of evenly spaced steps.
    """
    low, high = 0, stretch.steps - 1
    while True:
        probes = sorted({low + number * (high - low) // _PROBES for number in range(_PROBES + 1)})
        rates = [stretch.lr(step) for step in probes]
        best = rates.index(max(rates))
        if high - low <= _PROBES:
            return max(
                rates[best],
                *(stretch.lr(step) for step in near),
                stretch.lr(0),
                stretch.lr(stretch.steps - 1),
            )
        low, high = probes[max(0, best - 1)], probes[min(len(probes) - 1, best + 1)]


def curve(
    clock: Clock, base_batch: int, initial: int, growth: Growth, rate: LRSchedule, points: int = 400
) -> list[tuple[float, int, float]]:
    """Epoch, global batch and rate of about `points` steps of each stage, in order, first and last
    among them.
    """
    found = []
    for stretch in stretches(clock, base_batch, initial, growth, rate):
        steps = sorted({number * (stretch.steps - 1) // points for number in range(points + 1)})
        for step in steps:
            epoch = clock.epoch(stretch.first_sample + step * stretch.global_batch)
            found.append((epoch, stretch.global_batch, stretch.lr(step)))
    return found
