"""The torch scheduler for a loop of one's own gives the rates of the engine's controller."""

import copy
import json
import re

import pytest
import torch
from support.launching import ROOT

import hvdlarge
from hvdlarge.config.job_file import read_job
from hvdlarge.config.planning import plan_run
from hvdlarge.controller import Controller
from hvdlarge.optim.lr_scheduler import LRScheduler
from hvdlarge.optim.param_groups import set_lr
from hvdlarge.schedule.decay import (
    ConstantDecay,
    CosineDecay,
    ExponentialDecay,
    MultistepDecay,
    OneCycle,
    PolynomialDecay,
)
from hvdlarge.schedule.growth import AdaBatchGrowth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.warmup import LegwWarmup, LinearWarmup, NoWarmup, StageStart

RULES = [
    LRSchedule(4.0, "sqrt", LegwWarmup(0.5), PolynomialDecay()),
    LRSchedule(1.0, "linear", NoWarmup(), MultistepDecay(gamma=0.375, every_epochs=2)),
    LRSchedule(0.3, "none", LinearWarmup(1.5), CosineDecay()),
    LRSchedule(0.3, "linear", LinearWarmup(1.5, on_growth="ramp"), ExponentialDecay()),
    LRSchedule(2.0, decay=OneCycle()),
]


def optimizer_of(factors=(1.0,)):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr_factor": factor} for factor in factors
    ]
    return torch.optim.SGD(groups, lr=77.0)


def taken(scheduler, *batch):
    """Take a step, and count it."""
    scheduler.optimizer.step()
    scheduler.step(*batch)


@pytest.mark.parametrize("name", ["digits", "digits_lstm"])
def test_a_shipped_jobs_rates_and_batches_come_out_step_by_step(name):
    job = read_job(str(ROOT / f"jobs/{name}.yaml"))
    plan = plan_run(job, 1437, 1)
    scheduler = LRScheduler(
        optimizer_of(), plan.lr_schedule, 1437, job.epochs, job.batch.base, job.batch.first,
        job.batch.growth,
    )  # fmt: skip
    for decision in iter(Controller(plan).decide, None):
        assert not scheduler.finished
        assert scheduler.epoch == decision.epoch
        assert scheduler.global_batch == decision.global_batch
        assert scheduler.get_last_lr() == [decision.lr]
        taken(scheduler)
    assert scheduler.finished


@pytest.mark.parametrize("schedule", RULES, ids=lambda rule: type(rule.decay).__name__)
def test_a_constant_batch_follows_the_schedule_with_plain_steps(schedule):
    """As HF's Trainer and Lightning call it, whose last step of an epoch may be a smaller one: it is counted in full."""
    scheduler = LRScheduler(optimizer_of(), schedule, 640, 5.0, base_batch=32, global_batch=128)
    for step in range(25):
        start, end = step * 128 / 640, (step + 1) * 128 / 640
        assert scheduler.get_last_lr() == [schedule.lr([StageStart(0.0, 4.0)], start, end, 5.0)]
        taken(scheduler)
    for _ in range(3):  # a loop may go on
        taken(scheduler)
    assert scheduler.get_last_lr()[0] >= 0


@pytest.mark.parametrize("schedule", RULES[:4], ids=lambda rule: type(rule.decay).__name__)
def test_batches_that_the_loop_gives_are_those_of_a_growth(schedule):
    growth = AdaBatchGrowth(every_epochs=1, max=128)
    grown = LRScheduler(optimizer_of(), schedule, 640, 4.0, 32, growth=growth)
    told = LRScheduler(optimizer_of(), schedule, 640, 4.0, 32)
    while not grown.finished:
        assert told.get_last_lr() == grown.get_last_lr()
        taken(grown)
        taken(told, grown.global_batch)
    assert told.finished


def test_a_loop_may_be_ahead_of_its_growth():
    for growth, batches in (
        (None, [400, 400]),
        (AdaBatchGrowth(every_epochs=1, max=800), [400, 800]),
    ):
        arguments = {} if growth is None else {"growth": growth}
        scheduler = LRScheduler(optimizer_of(), RULES[0], 800, 8.0, 100, **arguments)
        taken(scheduler, 400)
        seen = []
        for _ in range(16):
            taken(scheduler)
            seen.append(scheduler.global_batch)
        assert (seen[0], max(seen)) == tuple(batches)


def test_a_step_cut_short_is_no_new_stage():
    schedule = LRSchedule(1.0, "linear", LinearWarmup(2.0))
    scheduler = LRScheduler(optimizer_of(), schedule, 100, 3.0, 32)
    for batch in (32, 32, 4, 32):  # the fourth step of an epoch has what is left of it
        taken(scheduler, batch)
    assert scheduler.epoch == 1.0
    assert scheduler.get_last_lr() == [schedule.lr([StageStart(0.0, 1.0)], 1.0, 1.32, 3.0)]


def test_each_group_has_its_factor():
    scheduler = LRScheduler(optimizer_of((1.0, 0.5)), LRSchedule(0.2), 100, 1.0, 10)
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == [0.2, 0.1]


@pytest.mark.parametrize("at", [0, 1, 50, 100])
def test_a_loop_goes_on_from_the_state_of_its_schedule(at):
    def built():
        growth = AdaBatchGrowth(every_epochs=2, max=256)
        return LRScheduler(optimizer_of(), RULES[0], 640, 6.0, 32, growth=growth)

    whole = built()
    for _ in range(at):
        taken(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = built()
    resumed.load_state_dict(copy.deepcopy(state))
    while not whole.finished:
        assert resumed.get_last_lr() == whole.get_last_lr()
        assert [group["lr"] for group in resumed.optimizer.param_groups] == resumed.get_last_lr()
        taken(whole)
        taken(resumed)
    assert resumed.finished


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_batch": 0}, "a batch has at least 1 sample, got 0"),
        ({"global_batch": -1}, "a batch has at least 1 sample, got -1"),
        ({"dataset_size": 0}, "dataset_size must be at least 1"),
        ({"epochs": 0.0}, "has no sample in it"),
        ({"growth": AdaBatchGrowth(every_epochs=1, max=8)}, "growth.max is 8, below the first"),
    ],
)
def test_values_that_no_run_can_have_are_refused(values, words):
    given = {"dataset_size": 100, "epochs": 1.0, "base_batch": 10} | values
    with pytest.raises(ValueError, match=words):
        LRScheduler(optimizer_of(), LRSchedule(0.1, decay=ConstantDecay()), **given)
    scheduler = LRScheduler(optimizer_of(), LRSchedule(0.1), 100, 1.0, 10)
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        scheduler.step(0)


def test_it_is_a_scheduler_of_torch():
    scheduler = LRScheduler(optimizer_of(), LRSchedule(0.1), 100, 1.0, 10)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert hvdlarge.LRScheduler is LRScheduler


def test_the_loop_of_the_documentation_trains():
    page = (ROOT / "docs/schedules.md").read_text()
    (loop,) = re.findall(r"```python\n(import torch\n.*?)```", page, flags=re.DOTALL)
    names: dict = {}
    exec(loop, names)
    assert names["scheduler"].finished
    assert names["scheduler"].global_batch > 32
    assert names["loss"].item() < 1.5


def test_a_rate_that_is_a_tensor_stays_that_tensor():
    optimizer = optimizer_of()
    scheduler = LRScheduler(optimizer, LRSchedule(0.1), 100, 10.0, 10)
    optimizer.step()
    scheduler.step()
    state = scheduler.state_dict()
    rates = [torch.tensor(7.0) for _ in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] is rate
        assert rate.item() == pytest.approx(scheduler.get_last_lr()[0])
    set_lr(optimizer, 0.25)
    assert all(
        group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True)
    )
    assert rates[0].item() == 0.25
