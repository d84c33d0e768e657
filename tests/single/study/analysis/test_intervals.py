"""Intervals and p-values of means over seeds: against direct computation, and by their rates."""

import itertools

import numpy as np
import pytest
from support.simulated_studies import NOISES

from hvdlarge.study.analysis.intervals import (
    holm,
    interval,
    many_comparisons,
    p_value,
    seeds_needed,
)

WEIGHTS = [sign * size**0.5 for sign in (1, -1) for size in (0.5, 1, 1.5)]


def reference_p(values, mean):
    """All 6^n draws, as the formula of the module says."""
    u = np.asarray(values) - mean

    def statistic(x):
        with np.errstate(divide="ignore"):
            return np.abs(x.mean(-1)) / (x.std(-1, ddof=1) / len(u) ** 0.5)

    drawn = statistic(u * np.array([*itertools.product(WEIGHTS, repeat=len(u))]))
    return np.mean(drawn >= statistic(u) * (1 - 1e-7))


@pytest.mark.parametrize("seeds", [3, 4])
@pytest.mark.parametrize("mean", [-0.7, 0.0, 0.31])
def test_p_values_with_few_seeds_are_exact(seeds, mean):
    values = np.random.default_rng(seeds).normal(0.3, 1, seeds)
    assert p_value([*values], mean) == pytest.approx(reference_p(values, mean), abs=1e-12)


def test_p_values_with_more_seeds_are_near_the_exact_ones():
    values = np.random.default_rng(6).normal(0.6, 1, 6)
    assert p_value([*values]) == pytest.approx(reference_p(values, 0.0), abs=0.02)


def test_clear_differences_have_p_values_that_many_comparisons_leave_clear():
    """Of 30 arms there are 435 pairs."""
    values = [*np.random.default_rng(0).normal(5, 1, 8)]
    assert 0 < p_value(values) < 0.05 / 435
    assert p_value(values) == p_value(values)


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_holds_the_means_that_are_not_rejected(seeds, confidence):
    values = [*np.random.default_rng(seeds).normal(5, 2, seeds)]
    found = interval(values, confidence)
    width = found.high - found.low
    for end, inward in ((found.low, width), (found.high, -width)):
        assert p_value(values, end + 1e-3 * inward) > 1 - confidence
        assert p_value(values, end - 1e-3 * inward) <= 1 - confidence
    assert found.low < found.mean < found.high


def test_intervals_move_and_stretch_with_the_values():
    values = np.random.default_rng(3).normal(size=8)
    one, other = interval([*values], 0.95), interval([*(1e6 - 0.01 * values)], 0.95)
    assert other.low == pytest.approx(1e6 - 0.01 * one.high, abs=1e-6)
    assert other.high == pytest.approx(1e6 - 0.01 * one.low, abs=1e-6)


@pytest.mark.parametrize(("confidence", "needed"), [(0.9, 3), (0.95, 3), (0.99, 4), (0.999, 5)])
def test_too_few_seeds_have_no_interval(confidence, needed):
    assert seeds_needed(confidence) == needed
    values = [0.1 * each**2 for each in range(needed)]
    assert interval(values, confidence).known
    assert not interval(values[:-1], confidence).known
    assert interval(values[:-1], confidence).mean == pytest.approx(np.mean(values[:-1]))


def test_nothing_has_no_mean():
    assert interval([], 0.95) == (None, None, None, 0)
    assert p_value([1.0, 2.0]) is None


def test_identical_values():
    assert interval([0.1] * 8, 0.95)[:3] == pytest.approx((0.1, 0.1, 0.1))
    assert p_value([0.0] * 3) == 1.0
    assert p_value([0.1 + 0.2] * 3, 0.3) == 1.0  # equal but for rounding
    assert p_value([0.5] * 3) == pytest.approx(6.0**-2)


def test_the_same_values_have_the_same_interval():
    values = [*np.random.default_rng(1).normal(size=12)]
    assert interval(values, 0.95) == interval(values, 0.95)
    assert interval(values, 0.95).low == pytest.approx(interval(values[::-1], 0.95).low, abs=0.05)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("seeds", [3, 4, 5, 8])
def test_false_positives_of_paired_differences(kind, seeds):
    rng = np.random.default_rng(seeds)
    pairs = (NOISES[kind](rng, (2, seeds)) for _ in range(600))
    false = sum(p_value([*(one - other)]) <= 0.05 for one, other in pairs)
    assert false / 600 < 0.08


def test_many_comparisons_need_more_draws():
    """Where the smallest p-value, 1/5,000, times their number is above a tenth of 1 - confidence."""
    assert [many_comparisons(n, 0.95) for n in (1, 25, 26, 435)] == [False, False, True, True]
    assert [many_comparisons(n, 0.99) for n in (5, 6)] == [False, True]


def test_holm_against_its_definition():
    p_values = [0.01, 0.04, None, 0.03, 0.005]
    assert holm(p_values) == pytest.approx([0.03, 0.06, None, 0.06, 0.02], nan_ok=True)
    assert holm([0.01, 0.02], comparisons=6) == pytest.approx([0.06, 0.1])
    assert holm([0.4, 0.9]) == [0.8, 0.9]
    assert holm([]) == []
