"""A run before it is started: its stages, without taking a step.

Contract: pure; the stages, step counts and lr are those that the controller will decide, found by
          arithmetic, so that a run of a million steps costs little more to outline than one of ten.
          A test compares the two. The outline of a growth that depends on measurements ends at the
          growth's first point: what follows is known only to the run.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hvdlarge.schedule.growth import Growth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.progress import Clock
from hvdlarge.schedule.warmup import StageStart, full_lr_epoch

# A stage's highest lr is exact unless it takes more splits than this, and within the tolerance then
_EXACT_SPLITS = 20_000
_TOLERANCE = 1e-9  # relative


@dataclass(frozen=True)
class StageOutline:
    """One stage."""

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
    full_lr: float  # epoch at which the lr reaches the stage's scaled value
    # Whether the run goes on after this stage, with a batch that depends on what is measured
    open_end: bool = False


class Stage(NamedTuple):
    """The steps of a stage and their lr."""

    first_sample: int
    steps: int
    global_batch: int  # samples
    starts: tuple[StageStart, ...]  # of the stages up to this one
    clock: Clock
    schedule: LRSchedule

    def start(self, step: int) -> int:
        """The first sample of the step with this number within the stage."""
        return self.first_sample + step * self.global_batch

    def end(self, step: int) -> int:
        """One past the last sample of that step."""
        return min(self.clock.total_samples, self.start(step + 1))

    def lr(self, step: int) -> float:
        """The lr of that step."""
        clock = self.clock
        start, end = clock.epoch(self.start(step)), clock.epoch(self.end(step))
        return self.schedule.lr(self.starts, start, end, clock.epochs)

    def highest_possible_lr(self, first: int, last: int) -> float:
        """Upper bound of the lr over the steps `first` … `last` of the stage."""
        clock = self.clock
        return self.schedule.upper_bound(
            self.starts,
            clock.epoch(self.start(first)),
            clock.epoch(self.start(last)),
            clock.epoch(self.end(last)),
            clock.epochs,
        )


def stages(
    clock: Clock, base_batch: int, initial: int, growth: Growth, schedule: LRSchedule
) -> Iterator[Stage]:
    """The stages of a run of `clock` that begins with `initial` samples an update; `base_batch` is
    where k = 1. They end early where the growth depends on measurements.

    Raises:
        ValueError: if the growth makes the batch smaller.
    """
    starts: list[StageStart] = []
    samples, batch, total = 0, initial, clock.total_samples
    while samples < total:
        epoch = clock.epoch(samples)
        if not growth.depends_on_measurement:
            batch = growth.checked_next_batch(initial, batch, epoch, {})
        starts.append(StageStart(epoch, batch / base_batch))
        steps = _steps_of(clock, initial, growth, samples, batch)
        stage = Stage(samples, steps, batch, tuple(starts), clock, schedule)
        yield stage
        if growth.depends_on_measurement:
            return
        samples = stage.end(steps - 1)


def _steps_of(clock: Clock, initial: int, growth: Growth, first: int, batch: int) -> int:
    """Steps of `batch` samples from sample `first` on, up to the end of the run, the first step of
    a larger batch, or the first that depends on what is measured.
    """
    left = -(-(clock.total_samples - first) // batch)

    def may_differ(step: int) -> bool:
        epoch = clock.epoch(first + step * batch)
        if growth.depends_on_measurement:
            return growth.acts_between(clock.epoch(first), epoch)
        return growth.next_batch(initial, batch, epoch, {}) != batch

    # Batches only grow, so this is a search: milestones may be many more than steps, and most of
    # them may round to no change.
    return 1 + bisect_left(range(1, left), True, key=may_differ)


def outline(
    clock: Clock, base_batch: int, initial: int, growth: Growth, schedule: LRSchedule
) -> list[StageOutline]:
    """The stages of a run; the arguments are those of `stages`."""
    outlines: list[StageOutline] = []
    for stage in stages(clock, base_batch, initial, growth, schedule):
        steps, end = stage.steps, stage.end(stage.steps - 1)
        outlines.append(
            StageOutline(
                stage=len(outlines),
                start=clock.epoch(stage.first_sample),
                end=clock.epoch(end),
                steps=steps,
                global_batch=stage.global_batch,
                last_batch=end - stage.start(steps - 1),
                first_lr=stage.lr(0),
                highest_lr=highest_lr(stage),
                last_lr=stage.lr(steps - 1),
                full_lr=full_lr_epoch(schedule.warmup, stage.starts),
                open_end=growth.depends_on_measurement and end < clock.total_samples,
            )
        )
    return outlines


def highest_lr(stage: Stage) -> float:
    """The highest lr of a stage's steps.

    Warmup and decay bound the lr of any range of steps. The range with the highest bound is split
    in two until no bound exceeds the highest lr that was seen. This needs some tens of splits where
    the lr rises before it falls, and about √steps where it rises and falls at once. The result is
    exact, unless so many steps have nearly the same lr that 20,000 splits do not tell them apart:
    then no step's lr exceeds it by more than one part in 10⁹.
    """
    last = stage.steps - 1
    highest = max(stage.lr(0), stage.lr(last))
    ranges = [(-stage.highest_possible_lr(0, last), 0, last)]
    splits = 0
    while ranges and -ranges[0][0] > highest * (1 + (splits >= _EXACT_SPLITS) * _TOLERANCE):
        splits += 1
        _, low, high = heapq.heappop(ranges)
        middle = (low + high) // 2
        highest = max(highest, stage.lr(middle), stage.lr(middle + 1))
        for first, final in ((low, middle), (middle + 1, high)):
            bound = stage.highest_possible_lr(first, final)
            if bound > highest and first < final:
                heapq.heappush(ranges, (-bound, first, final))
    return highest


def curve(
    clock: Clock,
    base_batch: int,
    initial: int,
    growth: Growth,
    schedule: LRSchedule,
    points: int = 400,
) -> list[tuple[float, int, float]]:
    """Epoch, global batch and lr of about `points` steps of each stage, in order, first and last
    among them.
    """
    curve_points = []
    for stage in stages(clock, base_batch, initial, growth, schedule):
        for step in sorted({number * (stage.steps - 1) // points for number in range(points + 1)}):
            epoch = clock.epoch(stage.start(step))
            curve_points.append((epoch, stage.global_batch, stage.lr(step)))
    return curve_points
