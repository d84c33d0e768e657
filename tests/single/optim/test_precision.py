"""Precisions and loss scales."""

import math

import pytest
import torch
from support.counting import CountingReplica

from hvdlarge.exits import DivergedError, JobError
from hvdlarge.optim.interface import GradientNorms
from hvdlarge.optim.precision import LossScaler, Precision, precisions_of, scale_for_compression
from hvdlarge.replica.train_state import TrainState
from hvdlarge.resilience.nonfinite import LossScalingPolicy, StopPolicy
from hvdlarge.schedule.decision import Decision

CPU = torch.device("cpu")
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


@pytest.mark.parametrize(
    ("precision", "computed"),
    [("fp32", "float32"), ("fp64", "float64"), ("bf16", "bfloat16"), ("fp16", "float16")],
)
def test_products_are_computed_in_the_precision_and_weights_kept_in_32_bits_at_least(
    precision, computed
):
    arithmetic = Precision(precision, CPU)
    layer = torch.nn.Linear(4, 3).to(arithmetic.weights)
    with arithmetic.autocast():
        outputs = layer(torch.ones(2, 4, dtype=arithmetic.weights))
        loss = torch.nn.functional.cross_entropy(outputs, torch.tensor([0, 1]))
    assert outputs.dtype == getattr(torch, computed)
    loss.backward()
    assert (
        layer.weight.dtype
        == layer.weight.grad.dtype
        == (torch.float64 if precision == "fp64" else torch.float32)
    )
    assert loss.dtype == layer.weight.dtype


def test_a_precision_that_the_device_lacks_is_refused_with_those_it_has():
    with pytest.raises(
        JobError,
        match="precision: tf32 is not supported on a CPU; supported: fp32, bf16, fp16, fp64",
    ):
        Precision("tf32", CPU)
    assert "tf32" not in precisions_of(CPU)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 48, 64, 65])
def test_the_part_for_compression_is_a_power_of_two_no_less_than_the_number_of_workers(workers):
    scale = scale_for_compression("fp16", workers)
    assert workers <= scale < 2 * workers
    assert math.frexp(scale)[0] == 0.5
    assert scale_for_compression("none", workers) == 1


@pytest.mark.parametrize("weight", [1e-3, 0.7, 1.0, 3.0, 512.0, 10_000.5])
def test_the_weight_of_a_sample_is_divided_out_before_compression_by_a_power_of_two(weight):
    scale = scale_for_compression("fp16", 4, weight)
    assert 0.7 <= scale / 4 * weight <= 1.42
    assert math.frexp(scale)[0] == 0.5
    assert scale_for_compression("none", 4, weight) == 1


def test_scaling_and_unscaling_round_nothing():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1000))
    target = torch.randn(1000)

    def gradient(scale):
        weight.grad = None
        scale.scaled((weight - target).square().mean()).backward()
        scale.unscale([weight, torch.nn.Parameter(torch.zeros(2))])  # one without a gradient too
        return weight.grad.clone()

    assert torch.equal(gradient(LossScaler()), gradient(LossScaler(static=8.0, dynamic=2.0**16)))


def follow(policy, replica, steps):
    """What becomes of steps, each given as the gradients that are not finite in it."""
    applied = []
    for not_finite in steps:
        policy.before_step(replica)
        norms = GradientNorms(dict.fromkeys(not_finite, math.inf) | {"another": 1.0})
        applied.append(policy.check(DECISION, replica, norms))
    return applied


def test_an_overflow_leaves_the_step_out_and_halves_the_scale():
    scale, state, replica = LossScaler(static=4.0), TrainState(), CountingReplica()
    policy = LossScalingPolicy(StopPolicy(), scale, state)
    assert scale.value == 4 * 2**16
    assert follow(policy, replica, [["w"], ["w"], [], []]) == [False, False, True, True]
    assert (scale.dynamic, replica.statistics.restored) == (2**14, 2)
    assert (state.loss_scale, state.steps_at_loss_scale, state.overflows) == (2**14, 2, 2)


def test_two_thousand_clean_steps_double_the_scale_up_to_its_limit():
    scale, state, replica = (
        LossScaler(),
        TrainState(loss_scale=2.0**23, steps_at_loss_scale=1990),
        CountingReplica(),
    )
    policy = LossScalingPolicy(StopPolicy(), scale, state)
    follow(policy, replica, [[]] * 9)
    assert scale.dynamic == 2**23
    follow(policy, replica, [[]])
    assert (scale.dynamic, state.steps_at_loss_scale) == (2**24, 0)
    follow(policy, replica, [[]] * 2000)
    assert scale.dynamic == 2**24


def test_without_any_scaling_left_the_jobs_own_policy_judges():
    scale, replica = LossScaler(), CountingReplica()
    policy = LossScalingPolicy(StopPolicy(), scale, TrainState(loss_scale=2.0))
    assert follow(policy, replica, [["w"]]) == [False]
    with pytest.raises(DivergedError, match="gradient of w is not finite at step 3"):
        follow(policy, replica, [["w"]])
