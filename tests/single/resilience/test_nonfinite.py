"""What a step whose mean gradients are not finite does, by policy."""

import math

import pytest
import torch
from support.counting import CountingReplica

from hvdlarge.comm.solo import SoloChannel
from hvdlarge.exits import DivergedError
from hvdlarge.models.losses import FromModel
from hvdlarge.optim.interface import GradientNorms
from hvdlarge.optim.precision import LossScaler
from hvdlarge.replica.objective import WeightedMean, loss_value
from hvdlarge.replica.train_state import TrainState
from hvdlarge.resilience.nonfinite import (
    LossScalingPolicy,
    RollBack,
    RollbackPolicy,
    SkipPolicy,
    StopPolicy,
)
from hvdlarge.schedule.decision import Decision

DECISION = Decision(
    step=3,
    samples_seen=96,
    epoch=0.5,
    stage=0,
    stage_batch=32,
    global_batch=32,
    micro_batch=8,
    lr=0.1,
    is_last=False,
)
FINITE, NOT_FINITE = ({"w": 1.0, "another": size} for size in (2.0, math.inf))


def check(policy, gradients):
    replica = CountingReplica()
    policy.before_step(replica)
    return policy.check(DECISION, replica, GradientNorms(gradients)), replica.statistics.restored


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        (StopPolicy(), DivergedError),
        (RollbackPolicy(limit=1, lr_factor=0.5), RollBack),
        (RollbackPolicy(limit=1, lr_factor=0.5, rolled_back=1), DivergedError),
        (SkipPolicy(limit=1, skipped=1), DivergedError),
    ],
)
def test_policy_not_finite_gradient_ends_the_step_it_belongs_to(policy, error):
    assert check(policy, FINITE) == (True, 0)
    with pytest.raises(error, match="gradient of another is not finite at step 3"):
        check(policy, NOT_FINITE)


def test_skip_within_its_limit_puts_the_running_statistics_back():
    policy = SkipPolicy(limit=1)
    assert check(policy, NOT_FINITE) == (False, 1)
    assert policy.skipped == 1


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        (StopPolicy(), DivergedError),
        (SkipPolicy(limit=5), DivergedError),
        (RollbackPolicy(limit=1, lr_factor=0.5), RollBack),
    ],
)
def test_policy_loss_that_is_not_finite_ends_the_run_or_rolls_back(policy, error):
    with pytest.raises(error, match="the loss is nan at step 3"):
        policy.check_loss(DECISION, math.nan)


def test_loss_scale_grows_after_finite_steps_only():
    """A step that the other policy skips, at the lowest scale, is none of them."""
    before = LossScaler.STEPS_BEFORE_GROWTH - 1
    state = TrainState(loss_scale=1.0, steps_at_loss_scale=before)
    policy = LossScalingPolicy(SkipPolicy(limit=5), LossScaler(1.0), state)
    assert check(policy, NOT_FINITE)[0] is False
    assert (state.loss_scale, state.steps_at_loss_scale) == (1.0, 0)
    state.steps_at_loss_scale = before
    assert check(policy, FINITE)[0] is True
    assert (state.loss_scale, state.steps_at_loss_scale) == (2.0, 0)


def test_a_mean_over_no_target_is_named_as_the_cause():
    """Of a model that divides by the number of its targets, in a micro-batch that has none."""

    def masked_mean(weight, targets):
        counted = (targets != -100).double()
        return {"loss": (weight * counted).sum() / counted.sum()}

    replica, weight = CountingReplica(), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    loss, averaging = FromModel(labels="labels"), WeightedMean(SoloChannel())
    replica.averaging = averaging
    for targets in (torch.tensor([1, 2, -100]), torch.full((3,), -100)):
        value = loss_value(loss(masked_mean(weight, targets), {"labels": targets}))
        averaging.share(value, 1, 2).backward()
    averaging.factor(2)
    assert weight.grad.isnan().any()
    norms = GradientNorms({"w": float(weight.grad.norm())})
    with pytest.raises(DivergedError, match="a micro-batch of this step had weight 0, such as one"):
        StopPolicy().check(DECISION, replica, norms)
