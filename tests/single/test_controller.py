"""The controller against the stream law, its outline, and the channel."""

import dataclasses
import itertools
import json

import pytest

from hvdlarge.comm.solo import SoloChannel
from hvdlarge.config.job_file import read_job
from hvdlarge.controller import Controller, DecisionFeed
from hvdlarge.reporting.describe import growth_line, stage_table
from hvdlarge.schedule.decay import (
    CosineDecay,
    ExponentialDecay,
    MultistepDecay,
    OneCycle,
    PolynomialDecay,
)
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.growth import AdaBatchGrowth, NoGrowth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.schedule.progress import Clock
from hvdlarge.schedule.warmup import LegwWarmup, LinearWarmup, NoWarmup


def all_of(plan):
    controller = Controller(plan)
    return list(iter(controller.decide, None))


def make_plan(
    size=203, epochs=7.3, initial=20, growth=None, lr_schedule=None, micro=8, world_size=3
):
    return Plan(
        clock=Clock(size, epochs),
        base_batch=20,
        initial_batch=initial,
        micro_batch=micro,
        growth=growth or AdaBatchGrowth(factor=2.5, every_epochs=2, max=400),
        lr_schedule=lr_schedule
        or LRSchedule(0.5, "sqrt", LegwWarmup(epochs=0.7), PolynomialDecay()),
        world_size=world_size,
    )


PLANS = {
    "grows past the data set": make_plan(),
    "no growth": make_plan(growth=NoGrowth(), epochs=3),
    "one step": make_plan(initial=5000, epochs=1),
    "jump": make_plan(
        lr_schedule=LRSchedule(
            1, "linear", LinearWarmup(epochs=3), MultistepDecay(gamma=0.5, every_epochs=2)
        )
    ),
    "at marks": make_plan(growth=AdaBatchGrowth(factor=4, at_epochs=(0.01, 0.02, 3))),
    "growth too small for the rounding at first": make_plan(
        initial=4, growth=AdaBatchGrowth(factor=1.1, every_epochs=0.5)
    ),
    "growth beyond what a record holds": make_plan(
        growth=AdaBatchGrowth(factor=3, every_epochs=0.2), epochs=200, micro=None
    ),
    "growth too small for the rounding at most marks": make_plan(
        growth=AdaBatchGrowth(factor=1.0001, every_epochs=0.001)
    ),
    "no warmup": make_plan(lr_schedule=LRSchedule(1, "linear", NoWarmup())),
    "one cycle": make_plan(lr_schedule=LRSchedule(1, "linear", NoWarmup(), OneCycle()), epochs=40),
    "cosine": make_plan(lr_schedule=LRSchedule(1, "sqrt", LegwWarmup(epochs=0.2), CosineDecay())),
    "exponential": make_plan(
        lr_schedule=LRSchedule(1, "none", LinearWarmup(epochs=1), ExponentialDecay(gamma=0.8))
    ),
    "decay inside the warmup": make_plan(
        lr_schedule=LRSchedule(
            1, "linear", LinearWarmup(epochs=5), MultistepDecay(gamma=0.3, every_epochs=1.3)
        ),
        growth=NoGrowth(),
    ),
    "a peak that moves": make_plan(
        lr_schedule=LRSchedule(
            1, "sqrt", LinearWarmup(epochs=6), PolynomialDecay(after_warmup=False)
        ),
        growth=NoGrowth(),
    ),
    "digits.yaml": read_job("jobs/digits.yaml").plan(1437, 2),
    "digits_lstm.yaml": read_job("jobs/digits_lstm.yaml").plan(1437, 2),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_steps_follow_each_other_without_gap_and_end_with_the_last_sample(plan):
    decisions = all_of(plan)
    seen = 0
    for number, decision in enumerate(decisions):
        assert decision.step == number
        assert decision.samples_seen == seen
        assert decision.epoch == seen / plan.clock.dataset_size
        assert decision.is_last == (number == len(decisions) - 1)
        assert decision.global_batch == decision.stage_batch or decision.is_last
        assert decision.lr >= 0
        assert Decision.from_bytes(decision.to_bytes()) == decision
        seen += decision.global_batch
    assert seen == plan.clock.total_samples


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_outline_is_what_the_controller_does(plan):
    decisions = all_of(plan)
    stages = plan.stages
    for stage, group in itertools.groupby(decisions, lambda decision: decision.stage):
        steps, outlined = list(group), stages[stage]
        assert (outlined.stage, outlined.steps) == (stage, len(steps))
        assert outlined.start == steps[0].epoch
        assert outlined.global_batch == steps[0].stage_batch
        assert outlined.last_batch == steps[-1].global_batch
        assert outlined.first_lr == steps[0].lr
        assert outlined.last_lr == steps[-1].lr
        highest = max(decision.lr for decision in steps)
        assert outlined.highest_lr == highest
    assert len(stages) == decisions[-1].stage + 1


def test_batch_and_rate_change_in_the_same_step_under_adabatch():
    plan = make_plan(
        size=1000, epochs=6, initial=20, growth=AdaBatchGrowth(factor=2, every_epochs=2),
        lr_schedule=LRSchedule(0.1, "linear", NoWarmup(), MultistepDecay(gamma=0.375, every_epochs=2)),
    )  # fmt: skip
    pairs = sorted({(decision.stage_batch, round(decision.lr, 12)) for decision in all_of(plan)})
    assert pairs == [(20, 0.1), (40, 0.075), (80, 0.05625)]


def test_a_million_steps_are_outlined_without_taking_them():
    plan = make_plan(
        size=10**9, epochs=90, initial=1024, growth=AdaBatchGrowth(every_epochs=20, max=16384)
    )
    assert sum(stage.steps for stage in plan.stages) > 10**7


def test_auto_shares_a_step_evenly():
    plan = make_plan(micro=None, world_size=3)
    assert {decision.micro_batch for decision in all_of(plan) if decision.global_batch == 20} == {7}


def test_the_feed_announces_each_decision_once_and_ahead():
    plan, announced = PLANS["grows past the data set"], []
    feed = DecisionFeed(SoloChannel(), Controller(plan), ahead=4, on_decision=announced.append)
    followed = []
    while (decision := feed.next()) is not None:
        followed.append(decision)
        ahead = [known.step - decision.step for known in announced][-1]
        assert ahead == min(4, len(all_of(plan)) - 1 - decision.step)
    assert followed == announced == all_of(plan)
    assert feed.next() is None


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_controller_goes_on_from_any_position_as_if_it_had_never_stopped(plan):
    whole = all_of(plan)
    for stop in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1} & set(range(len(whole))):
        for ahead in (0, 1, 5):
            controller = Controller(plan)
            given = [controller.decide() for _ in range(min(len(whole), stop + 1 + ahead))]
            position = controller.progress_after(given[stop])
            assert position.samples_seen == whole[stop].samples_seen + whole[stop].global_batch
            again = Controller(
                plan, RunProgress.from_plain(json.loads(json.dumps(position.to_plain())))
            )
            assert list(iter(again.decide, None)) == whole[stop + 1 :]
            assert again.final_progress() == controller_at_end(plan)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 0.9), (1, 0.23), (2, 1)])
@pytest.mark.parametrize("left", [1, 2, 7])
def test_decisions_in_hand_when_the_length_of_a_run_changes_give_way_to_those_of_the_new_length(
    before, after, left
):
    """Resumed `left` steps before the end that comes first, with more decisions in hand than steps are left."""
    plans = [
        make_plan(
            size=1437, epochs=epochs, initial=32, growth=NoGrowth(), lr_schedule=LRSchedule(1)
        )
        for epochs in (before, after)
    ]
    short, whole = min(map(all_of, plans), key=len), all_of(plans[1])
    controller = Controller(plans[0])
    position = controller.progress_after(
        [controller.decide() for _ in all_of(plans[0])][len(short) - 1 - left]
    )
    again = Controller(
        plans[1], RunProgress.from_plain(json.loads(json.dumps(position.to_plain())))
    )
    feed = DecisionFeed(SoloChannel(), again, ahead=3, on_decision=lambda decision: None)
    assert list(iter(feed.next, None)) == whole[len(short) - left :]
    assert again.final_progress() == controller_at_end(plans[1])


def controller_at_end(plan):
    controller = Controller(plan)
    while controller.decide() is not None:
        pass
    return controller.final_progress()


def test_positions_are_kept_at_every_growth():
    plan = PLANS["grows past the data set"]
    whole = all_of(plan)
    for step in range(1, len(whole)):
        controller = Controller(plan)
        for _ in range(step):
            last = controller.decide()
        again = Controller(plan, controller.progress_after(last))
        assert again.decide() == whole[step]


def test_a_lower_rate_after_a_rollback_and_another_number_of_workers():
    plan = PLANS["jump"]
    whole = all_of(plan)
    controller = Controller(plan)
    position = controller.progress_after([controller.decide() for _ in range(7)][4])
    lower = Controller(plan, dataclasses.replace(position, lr_factor=0.25))
    assert [decision.lr for decision in iter(lower.decide, None)] == [
        decision.lr * 0.25 for decision in whole[5:]
    ]
    shared = make_plan(micro=None, world_size=3)
    controller = Controller(shared)
    given = [controller.decide() for _ in range(4)]
    other = Controller(
        dataclasses.replace(shared, world_size=2), controller.progress_after(given[0])
    )
    assert [other.decide().micro_batch for _ in range(3)] == [
        -(-d.global_batch // 2) for d in all_of(shared)[1:4]
    ]


def test_only_rank_0_has_a_controller():
    with pytest.raises(ValueError, match="rank 0"):
        DecisionFeed(SoloChannel(), None, ahead=1, on_decision=print)


def test_the_lines_for_the_user_say_the_arithmetic():
    plan = PLANS["digits.yaml"]
    table = stage_table(plan)
    assert "32 = 16 × 1 × 2" in table[1]
    assert "512 = 16 × 16 × 2" in table[5]
    decisions = all_of(plan)
    first = next(decision for decision in decisions if decision.stage == 1)
    line = growth_line(plan, 32, decisions[first.step - 1].lr, first)
    assert line.startswith("epoch 6.01: the global batch grows from 32 to 64 = 16 × 2 × 2; lr ")


def test_a_growth_in_the_last_shorter_step_says_the_arithmetic_of_its_stage():
    plan = make_plan(micro=None, world_size=2)
    last = all_of(plan)[-1]
    short = dataclasses.replace(last, global_batch=3, micro_batch=2, stage_batch=64)
    assert " to 64 = 32 × 1 × 2; " in growth_line(plan, 32, None, short)


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize("largest", [1, 7, 64, None])
def test_a_step_that_is_shared_evenly_has_no_larger_micro_batch_than_fits(workers, largest):
    plan = dataclasses.replace(
        make_plan(micro=None, world_size=workers), largest_micro_batch=largest
    )
    assert plan.fingerprint() == make_plan(micro=None).fingerprint()
    for decision in all_of(plan):
        layout = plan.layout(decision)
        share = -(-decision.global_batch // workers)
        assert decision.micro_batch <= min(share, largest or share)
        # No more passes than that takes.
        assert layout.accumulation_steps == -(-share // min(share, largest or share))
