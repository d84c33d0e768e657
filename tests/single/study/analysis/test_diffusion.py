"""The analysis `diffusion`: known exponents and slopes are recovered within their intervals."""

import json
import math

import numpy as np
import pytest
from support.simulated_studies import points, repetitions, setup_of

from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.diffusion import (
    _judged,
    constant_stretch,
    diffusion,
    fit_growth,
)
from hvdlarge.study.analysis.sections import Diffusion

TIMES = np.unique(np.geomspace(10, 3000, 40).astype(int))


def found(setup, runs, section=None):
    finding = diffusion(section or Diffusion(), setup, by_cell(setup, runs))
    json.dumps(finding.facts, allow_nan=False)
    assert len({len(row) for row in finding.table}) <= 1
    return finding


def simulated(curve, spread, seed, seeds=8):
    """Distances whose parameter differs from seed to seed, with noise of 1 %."""
    rng = np.random.default_rng(seed)
    return repetitions(
        ("a",),
        [0.9] * seeds,
        distance=[
            points(TIMES, curve(spread * rng.normal()) * (1 + 0.01 * rng.normal(size=len(TIMES))))
            for _ in range(seeds)
        ],
    )


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_powers_are_within_their_intervals(power):
    setup = setup_of({"arm": ["a"]})
    inside = better = 0
    for seed in range(25):
        runs = simulated(lambda more: 0.7 * TIMES ** (power + more), 0.01, seed)
        fact = found(setup, runs).facts["cells"][0]
        inside += fact["power"]["low"] <= power <= fact["power"]["high"]
        better += fact["better"] == "power"
    assert inside >= 22
    assert better == 25


@pytest.mark.parametrize("slope", [4.0])
def test_slopes_of_the_logarithm_are_within_their_intervals(slope):
    setup = setup_of({"arm": ["a"]})
    inside = better = 0
    for seed in range(25):
        runs = simulated(lambda more: slope * (1 + more) * np.log(TIMES) + 0.2, 0.03, seed)
        fact = found(setup, runs).facts["cells"][0]
        inside += fact["slope"]["low"] <= slope <= fact["slope"]["high"]
        better += fact["better"] == "log"
    assert inside >= 22
    assert better == 25


def test_each_cell_has_its_description():
    setup = setup_of({"batch.base": [32, 1024]})
    rng = np.random.default_rng(0)

    def noisy(curve):
        return [points(TIMES, curve * (1 + 0.01 * rng.normal(size=len(TIMES)))) for _ in range(8)]

    runs = repetitions(("32",), [0.9] * 8, distance=noisy(2 * np.log(TIMES) + 1))
    runs += repetitions(("1024",), [0.9] * 8, distance=noisy(TIMES**0.5))
    finding = found(setup, runs)
    assert [each["better"] for each in finding.facts["cells"]] == ["log", "power"]
    assert "a · ln t + b is better in batch.base 32 (slope 1.99" in finding.verdict
    assert "; a · t^p is better in batch.base 1024 (power 0.5" in finding.verdict
    assert finding.verdict.endswith("]) (intervals 95 %).")
    assert "p = " not in finding.verdict  # p is a p-value elsewhere


def test_neither_is_better_by_chance():
    """Of 200 studies with 8 runs each: log errors with mean 0, of runs that follow either curve."""
    rng = np.random.default_rng(0)
    noise = 1 + 0.01 * rng.normal(size=(100, len(TIMES)))
    curves = [3 * np.log(TIMES) + 1, TIMES**0.5]
    runs = [fit_growth(TIMES, curves[k % 2] * noise[k]) for k in range(100)]
    centre = np.mean([run.gap for run in runs])
    runs = [run._replace(gap=run.gap - centre) for run in runs]
    cell = by_cell(setup_of({"arm": ["a"]}), [])[("a",)]
    decided = 0
    for _ in range(200):
        drawn = [runs[k] for k in rng.integers(100, size=8)]
        decided += _judged(Diffusion(), [(cell, drawn)])[0].better != ""
    # At the nominal 5 %, as many or fewer with a probability of 99.9 %
    shares = [math.comb(200, k) * 0.05**k * 0.95 ** (200 - k) for k in range(201)]
    most = int(np.searchsorted(np.cumsum(shares), 0.999))
    assert (most, decided <= most) == (21, True)


def test_exact_curves_are_no_division_by_zero():
    growth = fit_growth(TIMES, 2.0 * TIMES**0.5)
    assert growth.power == pytest.approx(0.5, abs=1e-6)
    assert growth.gap > 5
    assert fit_growth(TIMES, 2.0 * np.log(TIMES) + 1).gap < -5
    assert fit_growth(TIMES, np.zeros(len(TIMES))) is None
    assert fit_growth(TIMES[:6], TIMES[:6] ** 0.5) is None


def test_points_close_in_time_have_enough_in_both_parts():
    times = np.arange(1000, 1013)
    assert fit_growth(times, times**0.5).power == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("rates", "first", "last"),
    [
        ([0.1] * 10, 100, 1000),
        ([0.1, 0.2, 0.3, *[0.4] * 5, 0.2, 0.2], 400, 800),
        ([*[0.1] * 3, None, *[0.1] * 6], 500, 1000),
        ([0.1] * 5 + [0.2] * 5, 100, 500),  # the first of equal ones
        ([None] * 10, 100, 1000),
    ],
)
def test_the_stretch_of_constant_rate(rates, first, last):
    steps = np.arange(100, 1001, 100)
    stretch = constant_stretch(points(steps, steps, lr=rates), 0.0, None)
    assert (stretch[0].step, stretch[-1].step) == (first, last)


def test_the_stretch_is_within_the_epochs_of_the_section():
    steps = np.arange(100, 1001, 100)
    stretch = constant_stretch(points(steps, steps), 3.0, 7.0)
    assert [point.step for point in stretch] == [300, 400, 500, 600, 700]
    stretch = constant_stretch(points(steps, steps), 3.0, None, 550)
    assert [point.step for point in stretch] == [300, 400, 500]


def test_what_is_left_out_is_said():
    setup = setup_of({"arm": ["a", "b", "c"]})
    runs = simulated(lambda more: TIMES ** (0.5 + more), 0.01, 0)
    runs += repetitions(("b",), [0.9, None, 0.9], distance=[points([1, 2, 3], [1, 2, 3])] * 3)
    runs += repetitions(("c",), [0.9] * 2)
    finding = found(setup, runs)
    assert len(finding.facts["cells"]) == 1
    notes = " ".join(finding.notes)
    assert "Fewer than 12 points at a constant rate: b (2 repetitions)" in notes
    assert "Failed repetitions are left out: b (1 repetition)" in notes
    assert "Without distances (log.distances of the job): c (2 repetitions)" in notes


def test_unfinished_studies():
    setup = setup_of({"arm": ["a"]})
    assert found(setup, []).verdict.endswith("no fit.")
    assert found(setup, repetitions(("a",), [None] * 8)).plot is None
    two = found(setup, simulated(lambda more: TIMES**0.5, 0.0, 0, seeds=2))
    assert two.verdict.startswith("too few seeds to decide (error of a · ln t + b ")
    assert ", power 0.5" in two.verdict
    assert "Repetitions that have not ended yet: a (2 of 8)." in two.notes
    assert two.facts["cells"][0]["power"]["mean"] == pytest.approx(0.5, abs=0.02)


def test_many_cells_are_counted_with_the_smallest_and_the_largest_power():
    setup = setup_of({"model": ["mlp", "convnet"], "batch.base": [16, 64, 1437], "epochs": [60]})
    rng = np.random.default_rng(0)
    runs = []
    for place, cell in enumerate(setup.cells):
        seeds = 2 if cell[0] == "convnet" else 8
        curves = [
            points(TIMES, TIMES ** (0.25 + 0.1 * place) * (1 + 0.01 * rng.normal(size=len(TIMES))))
            for _ in range(seeds)
        ]
        runs += repetitions(cell, [0.9] * seeds, distance=curves)
    verdict = found(setup, runs).verdict
    better, few = verdict.split("; ")
    assert better.startswith("a · t^p is better in 3 cells, power from 0.2")
    assert "(mlp at batch.base 16) to 0.4" in better
    assert better.endswith("(mlp at batch.base 1437)")
    assert few.startswith("too few seeds to decide in 3 cells, power from 0.5")
    assert "undecided" not in verdict


def test_large_ratios_of_errors_are_numbers():
    setup = setup_of({"arm": ["a"]})
    verdict = found(setup, simulated(lambda more: TIMES ** (0.8 + more), 0.0, 0)).verdict
    assert "e+0" not in verdict
    assert "times as large), power 0.8" in verdict
