"""Learning rates: the vectors of AdaBatch and LEGW, and the laws that hold for every schedule."""

import itertools
import math

import pytest

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
from hvdlarge.schedule.scaling import scale
from hvdlarge.schedule.warmup import (
    LegwWarmup,
    LinearWarmup,
    NoWarmup,
    StageStart,
    full_lr_epoch,
    multiplier,
)

EXACT = 1e-12


def stages(*pairs):
    return [StageStart(epoch, factor) for epoch, factor in pairs]


# --- AdaBatch, FACTS 6.A


@pytest.mark.parametrize(("fixed", "factor", "adaptive"), [(0.375, 2, 0.75), (0.25, 2, 0.5), (0.1, 2, 0.2), (0.1, 4, 0.4), (0.1, 8, 0.8)])  # fmt: skip
def test_a_growth_with_linear_scaling_turns_the_fixed_decay_into_the_papers(
    fixed, factor, adaptive
):
    rate = LRSchedule(1.0, "linear", NoWarmup(), MultistepDecay(gamma=fixed, every_epochs=20))
    before = rate.lr(stages((0, 1)), 19.9, 19.95, 100)
    after = rate.lr(stages((0, 1), (20, factor)), 20.0, 20.05, 100)
    assert after / before == pytest.approx(adaptive, rel=EXACT)


def test_the_rates_and_rates_per_sample_of_both_arms():
    growth = AdaBatchGrowth(factor=2, every_epochs=20, max=2048)
    rate = LRSchedule(0.01, "linear", NoWarmup(), MultistepDecay(gamma=0.375, every_epochs=20))
    adaptive, fixed, per_sample, begun = [], [], [], []
    for epoch in (0, 20, 40, 60, 80):
        batch = growth.next_batch(128, 128, epoch, {})
        begun.append(StageStart(epoch, batch / 128))
        adaptive.append(rate.lr(begun, epoch, epoch + 0.1, 100))
        fixed.append(rate.lr(stages((0, 1)), epoch, epoch + 0.1, 100))
        per_sample.append(adaptive[-1] / batch)
        assert adaptive[-1] / batch == pytest.approx(fixed[-1] / 128, rel=EXACT)
    assert adaptive == pytest.approx([0.01, 0.0075, 0.005625, 0.00421875, 0.0031640625], rel=EXACT)
    assert fixed == pytest.approx(
        [0.01, 0.00375, 0.00140625, 0.00052734375, 0.00019775390625], rel=EXACT
    )
    assert per_sample == pytest.approx(
        [7.8125e-5, 2.9296875e-5, 1.0986328125e-5, 4.119873046875e-6, 1.544952392578125e-6],
        rel=EXACT,
    )


def test_imagenet_with_factor_8():
    rate = LRSchedule(0.1, "linear", NoWarmup(), MultistepDecay(gamma=0.1, every_epochs=30))
    begun, rates = [], []
    for epoch, batch in ((0, 8192), (30, 65536), (60, 524288)):
        begun.append(StageStart(epoch, batch / 256))
        rates.append(rate.lr(begun, epoch, epoch, 90))
    assert rates == pytest.approx([3.2, 2.56, 2.048], rel=EXACT)


# --- LEGW, FACTS 4.3 and 6.B


@pytest.mark.parametrize(
    ("batch", "peak", "warmup"),
    [(512, 2**2, 0.15625), (1024, 2**2.5, 0.3125), (2048, 2**3, 0.625), (4096, 11.313708498984761, 1.25), (8192, 2**4, 2.5),
     (16384, 2**4.5, 5), (32768, 2**5, 10), (65536, 45.254833995939045, 20)],
)  # fmt: skip
def test_the_legw_table(batch, peak, warmup):
    factor = batch / 1024
    policy = LegwWarmup(epochs=10 / 2**5)
    rate = LRSchedule(2**2.5, "sqrt", policy)
    assert policy.length(factor) == pytest.approx(warmup, rel=EXACT)
    assert rate.lr(stages((0, factor)), 89, 89, 90) == pytest.approx(peak, rel=EXACT)
    assert policy.length(factor) * 1_281_167 / batch == pytest.approx(
        390.98, abs=0.005
    )  # iterations never change


def test_multiplying_the_iterations_by_k_would_be_another_rule():
    policy, steps_per_epoch = LegwWarmup(epochs=0.3125), 1_281_167 / 1024
    base_iterations = policy.length(1) * steps_per_epoch
    wrong = (
        base_iterations * 32 / (steps_per_epoch / 32)
    )  # k times as many iterations: k² times as many epochs
    assert policy.length(32) == pytest.approx(10)
    assert wrong == pytest.approx(320)


def test_warmup_and_polynomial_decay_meet_the_published_points():
    rate = LRSchedule(32.0, "none", LinearWarmup(epochs=391), PolynomialDecay(power=2))
    one = stages((0, 1))
    for t, expected in ((0, 0), (100, 8.184143), (391, 32), (1955, 8), (3519, 0)):
        assert rate.lr(one, t, t, 3519) == pytest.approx(expected, abs=5e-7)


def test_polynomial_decay_can_be_measured_from_the_start():
    decay = PolynomialDecay(power=2, after_warmup=False)
    assert decay.factor(50, 10, 100) == 0.25
    assert PolynomialDecay(power=2, end_factor=0.1).factor(100, 10, 100) == pytest.approx(0.1)
    assert (
        PolynomialDecay(power=1).factor(5, 200, 100) == 1.0
    )  # a warmup longer than the run never decays


# --- Laws


POLICIES = [
    policy(epochs=length, on_growth=on_growth)
    for policy in (LinearWarmup, LegwWarmup)
    for length in (0.0, 0.25, 3.0)
    for on_growth in ("ramp", "jump")
] + [NoWarmup()]
RUNS = [
    stages((0, 1)),
    stages((0, 8)),
    stages((0, 0.5), (1, 1)),
    stages((0, 1), (0.5, 2), (1.5, 4), (1.6, 64)),
    stages((0, 4), (5, 8), (6, 16), (7, 32)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("scaling", ["none", "linear", "sqrt"])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_the_multiplier_never_falls_and_comes_to_the_scale_of_the_batch(policy, scaling, run):
    last = -1.0
    for epoch in (number / 64 for number in range(64 * 200)):
        begun = [stage for stage in run if stage.epoch <= epoch]
        value = multiplier(policy, scaling, begun, epoch)
        assert value >= last - 1e-12
        last = value
    full = full_lr_epoch(policy, run)
    assert multiplier(policy, scaling, run, full) == pytest.approx(
        scale(scaling, run[-1].batch_factor), rel=EXACT
    )


@pytest.mark.parametrize(
    "policy",
    [p for p in POLICIES if getattr(p, "epochs", 0) > 0 and p.on_growth == "ramp"],
    ids=repr,
)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_ramp_has_no_jump_anywhere(policy, run):
    steepest = max(scale("linear", stage.batch_factor) for stage in run) / 0.01
    for epoch in (number / 1024 for number in range(1, 1024 * 12)):
        begun = [stage for stage in run if stage.epoch <= epoch]
        earlier = [stage for stage in run if stage.epoch <= epoch - 1 / 1024]
        step = multiplier(policy, "linear", begun, epoch) - multiplier(
            policy, "linear", earlier, epoch - 1 / 1024
        )
        assert step <= steepest / 1024


def test_the_ramp_of_a_growth_has_the_length_that_the_design_gives():
    policy = LegwWarmup(epochs=1.0)
    inside = stages((0, 1), (0.5, 4))  # growth during the warmup: until w0·k' = 4
    assert full_lr_epoch(policy, inside) == 4.0
    assert multiplier(policy, "sqrt", inside, 0.5) == pytest.approx(0.5)
    assert multiplier(policy, "sqrt", inside, 2.25) == pytest.approx(0.5 + 1.5 / 2)
    late = stages((0, 1), (50, 4))  # long after it: over w0·(k' − k) = 3 epochs
    assert full_lr_epoch(policy, late) == 53.0
    assert multiplier(policy, "sqrt", late, 51.5) == pytest.approx(1.5)


def test_a_jump_inside_a_warmup_multiplies_at_once():
    policy = LinearWarmup(epochs=5, on_growth="jump")
    before = multiplier(policy, "linear", stages((0, 1)), 2.0)
    after = multiplier(policy, "linear", stages((0, 1), (2, 2)), 2.0)
    assert after == pytest.approx(2 * before, rel=EXACT)


def test_k_of_1_is_the_baseline():
    for policy, scaling in itertools.product(POLICIES, ("none", "linear", "sqrt")):
        for epoch in (0.1, 1.0, 7.0):
            one = multiplier(policy, scaling, stages((0, 1)), epoch)
            assert one == multiplier(policy, "none", stages((0, 1)), epoch)


def test_the_first_step_moves_and_the_step_that_completes_the_warmup_has_the_full_lr():
    rate = LRSchedule(1.0, "none", LinearWarmup(epochs=1.0), ConstantDecay())
    one, steps = stages((0, 1)), 10
    rates = [rate.lr(one, step / steps, (step + 1) / steps, 5) for step in range(12)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[8] < 1.0


def test_a_warmup_is_linear_and_continuous_at_its_end():
    rate = LRSchedule(1.0, "sqrt", LegwWarmup(epochs=0.5), PolynomialDecay(power=2))
    one = stages((0, 4))
    end = 2.0
    assert rate.lr(one, end / 2, end / 2, 10) == pytest.approx(1.0)
    assert rate.lr(one, end - 1e-9, end - 1e-9, 10) == pytest.approx(
        rate.lr(one, end + 1e-9, end + 1e-9, 10), rel=1e-8
    )


@pytest.mark.parametrize("base", [0, -1, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(base):
    with pytest.raises(ValueError, match="base"):
        LRSchedule(base)


@pytest.mark.parametrize("gamma", [0, 1.1, -0.5])
def test_a_decay_that_is_none_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        MultistepDecay(gamma=gamma, every_epochs=1)


# --- the other decays


DECAYS = {
    "constant": ConstantDecay(),
    "multistep": MultistepDecay(gamma=0.3, every_epochs=7),
    "exponential": ExponentialDecay(gamma=0.9, every_epochs=1.5),
    "exponential from the start": ExponentialDecay(gamma=0.9, after_warmup=False),
    "polynomial": PolynomialDecay(power=1.7, end_factor=0.01),
    "polynomial from the start": PolynomialDecay(after_warmup=False),
    "cosine": CosineDecay(end_factor=0.02),
    "cosine from the start": CosineDecay(after_warmup=False),
}


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_a_decay_never_rises_and_stays_between_0_and_1(decay):
    factors = [decay.factor(epoch / 50, 2.0, 30.0) for epoch in range(1501)]
    assert all(0 <= after <= before <= 1 for before, after in itertools.pairwise(factors))
    if getattr(decay, "after_warmup", True):
        assert decay.factor(2.0, 2.0, 30.0) == 1.0


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize(
    "warmup", [LinearWarmup(epochs=2), LegwWarmup(epochs=0.5)], ids=["linear", "legw"]
)
def test_the_rate_is_continuous_where_the_warmup_ends(decay, warmup):
    rate, begun = LRSchedule(1.0, "sqrt", warmup, decay), stages((0, 4))
    before, after = (rate.lr(begun, at, at, 30.0) for at in (2.0 - 1e-9, 2.0 + 1e-9))
    assert before == pytest.approx(after, rel=1e-7)


def test_the_decays_against_independent_forms():
    """exp and log in place of powers, a sine in place of the cosine."""
    for epoch in (2.0, 3.7, 11.1, 29.9, 30.0):
        exponential = math.exp(math.log(0.9) * (epoch - 2) / 1.5)
        assert DECAYS["exponential"].factor(epoch, 2.0, 30.0) == pytest.approx(
            exponential, rel=EXACT
        )
        cosine = 0.02 + 0.98 * math.sin(math.pi / 2 * (1 - (epoch - 2) / 28)) ** 2
        assert DECAYS["cosine"].factor(epoch, 2.0, 30.0) == pytest.approx(cosine, rel=EXACT)


def test_one_cycle_rises_falls_and_fades():
    cycle = OneCycle(peak=0.3, start_factor=0.1, end_factor=0.001)
    factors = [cycle.factor(epoch / 100, 0.0, 10.0) for epoch in range(1001)]
    peak = factors.index(max(factors))
    assert (peak, factors[0], factors[peak], factors[2 * peak], factors[-1]) == (
        300, pytest.approx(0.1), 1.0, pytest.approx(0.1), pytest.approx(0.001),
    )  # fmt: skip
    assert all(after >= before for before, after in itertools.pairwise(factors[: peak + 1]))
    assert all(after <= before for before, after in itertools.pairwise(factors[peak:]))
    assert max(abs(after - before) for before, after in itertools.pairwise(factors)) < 0.005
    assert OneCycle(peak=0.5, start_factor=0.1, end_factor=0.1).factor(
        10.0, 0.0, 10.0
    ) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExponentialDecay(gamma=0), lambda: ExponentialDecay(gamma=1.1), lambda: ExponentialDecay(every_epochs=0),
        lambda: CosineDecay(end_factor=-0.1), lambda: CosineDecay(end_factor=2), lambda: OneCycle(peak=0),
        lambda: OneCycle(peak=0.6), lambda: OneCycle(start_factor=0), lambda: OneCycle(start_factor=0.1, end_factor=0.2),
    ],
)  # fmt: skip
def test_values_that_no_decay_can_follow_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
