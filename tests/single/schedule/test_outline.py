"""The outline against every step of the run that it describes."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlarge.schedule.decay import (
    ConstantDecay,
    CosineDecay,
    ExponentialDecay,
    MultistepDecay,
    OneCycle,
    PolynomialDecay,
)
from hvdlarge.schedule.growth import AdaBatchGrowth, Growth, NoGrowth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.outline import highest_lr, outline, stages
from hvdlarge.schedule.progress import Clock, milestones_reached
from hvdlarge.schedule.warmup import LegwWarmup, LinearWarmup, NoWarmup

FRACTIONS = st.floats(0, 1, allow_subnormal=False)
LENGTHS = st.floats(0.01, 40)
BOOLEANS = st.booleans()
MILESTONES = st.lists(LENGTHS, min_size=1, max_size=30, unique=True).map(sorted).map(tuple)
ON_GROWTH = st.sampled_from(["jump", "ramp"])
DECAYS = st.one_of(
    st.just(ConstantDecay()),
    st.builds(MultistepDecay, gamma=st.floats(0.01, 1), every_epochs=LENGTHS),
    st.builds(MultistepDecay, gamma=st.floats(0.01, 1), milestones=MILESTONES),
    st.builds(
        ExponentialDecay, gamma=st.floats(0.01, 1), every_epochs=LENGTHS, after_warmup=BOOLEANS
    ),
    st.builds(
        PolynomialDecay, power=st.floats(0.1, 30), end_factor=FRACTIONS, after_warmup=BOOLEANS
    ),
    st.builds(CosineDecay, end_factor=FRACTIONS, after_warmup=BOOLEANS),
    st.builds(
        OneCycle, peak=st.floats(0.01, 0.5), start_factor=st.floats(0.1, 1), end_factor=st.just(0.1)
    ),
)
WARMUPS = st.one_of(
    st.just(NoWarmup()),
    st.builds(LinearWarmup, epochs=st.floats(0, 40), on_growth=ON_GROWTH),
    st.builds(LegwWarmup, epochs=st.floats(0, 10), on_growth=ON_GROWTH),
)
GROWTHS = st.one_of(
    st.just(NoGrowth()),
    st.builds(AdaBatchGrowth, factor=st.floats(1.01, 8), every_epochs=LENGTHS),
    st.builds(AdaBatchGrowth, factor=st.floats(1.01, 8), at_epochs=MILESTONES),
)
SCHEDULES = st.builds(
    LRSchedule, st.just(0.1), st.sampled_from(["none", "linear", "sqrt"]), WARMUPS, DECAYS
)


@settings(max_examples=300, deadline=None)
@given(schedule=SCHEDULES, growth=GROWTHS, size=st.integers(1, 3000), epochs=st.floats(1, 40))
def test_the_highest_lr_of_a_stage_is_that_of_its_highest_step_for_every_policy(
    schedule, growth, size, epochs
):
    clock = Clock(size, epochs)
    for stage in itertools.islice(
        stages(clock, 20, max(5, clock.total_samples // 5000), growth, schedule), 20
    ):
        assert highest_lr(stage) == max(map(stage.lr, range(stage.steps)))


class Counted:
    """A schedule that counts what it is asked."""

    def __init__(self, schedule, asked):
        self.schedule, self.asked = schedule, asked

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self.schedule, name)


@pytest.mark.parametrize(
    "decay",
    [PolynomialDecay(after_warmup=False), CosineDecay(after_warmup=False, end_factor=0.5),
     ExponentialDecay(gamma=0.9, after_warmup=False), PolynomialDecay(power=20, end_factor=0.3, after_warmup=False)],
    ids=repr,
)  # fmt: skip
def test_the_highest_lr_while_warmup_and_decay_work_against_each_other_is_cheap_in_a_long_run(
    decay,
):
    """90 million steps, half of them in the warmup."""
    schedule = LRSchedule(1, "none", LinearWarmup(epochs=45), decay)
    clock = Clock(10**6, 90)
    (stage,) = stages(clock, 1, 1, NoGrowth(), schedule)
    asked = []
    highest = highest_lr(stage._replace(schedule=Counted(schedule, asked)))
    assert len(asked) <= 150_000
    # A smooth maximum is flat, and the end of a warmup a corner: one step in 1,000 is as high to
    # seven digits
    sampled = max(stage.lr(step) for step in range(0, stage.steps, 1000))
    assert sampled <= highest == pytest.approx(sampled, rel=1e-7)


@dataclass(frozen=True)
class EveryEpochs(Growth):
    """Acts on measurements every so many epochs, or at every step."""

    depends_on_measurement = True
    every_epochs: float | None = None

    def next_batch(self, initial, current, epoch, measured):
        """Never asked for by an outline."""
        raise AssertionError

    def acts_between(self, before, epoch):
        """At milestones."""
        if self.every_epochs is None:
            return super().acts_between(before, epoch)
        reached = [milestones_reached(at, self.every_epochs, None) for at in (before, epoch)]
        return reached[1] > reached[0]


@pytest.mark.parametrize(
    ("every_epochs", "steps", "open_end"), [(2, 21, True), (None, 1, True), (10, 74, False)]
)
def test_the_outline_of_a_growth_by_measurement_ends_at_its_first_point(
    every_epochs, steps, open_end
):
    """203 samples in batches of 20: step 21 is the first that begins at epoch 2 or later."""
    (stage,) = outline(
        Clock(203, 7.2), 20, 20, EveryEpochs(every_epochs), LRSchedule(1, "none", NoWarmup())
    )
    assert (stage.steps, stage.open_end) == (steps, open_end)
    assert stage.end == (steps * 20 / 203 if open_end else 1462 / 203)
    assert stage.last_batch == (20 if open_end else 2)
