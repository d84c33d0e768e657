"""Steps to a target: interpolation, regions, and the critical batch of known curves."""

import numpy as np
import pytest
from support.simulated_studies import points, repetitions, setup_of

from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.target_steps import (
    fit_critical_batch,
    measure_steps,
    steps_panels,
    steps_text,
    steps_to,
    table,
)

BATCHES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def run_with(steps, values):
    return repetitions((), [0.5], curve=points(steps, values))[0]


def test_the_target_is_reached_between_two_evaluations():
    run = run_with([10, 20, 30], [0.2, 0.6, 0.5])
    assert steps_to(run, 0.5, lower_is_better=False) == pytest.approx(17.5)
    assert steps_to(run, 0.6, lower_is_better=False) == 20
    assert steps_to(run, 0.7, lower_is_better=False) is None
    assert steps_to(run, 0.1, lower_is_better=False) == 10
    falling = run_with([10, 20, 30], [0.9, 0.5, 0.1])
    assert steps_to(falling, 0.3, lower_is_better=True) == pytest.approx(25)
    assert steps_to(run_with([], []), 0.3, lower_is_better=True) is None


def test_values_that_are_not_finite_are_not_interpolated():
    run = run_with([10, 20, 30], [0.2, float("nan"), 0.6])
    assert steps_to(run, 0.5, lower_is_better=False) == 30


@pytest.mark.parametrize("critical", [50.0, 400.0, 3000.0])
def test_a_known_critical_batch_is_recovered(critical):
    steps = [700 * (1 + critical / batch) for batch in BATCHES]
    assert fit_critical_batch(BATCHES, steps) == pytest.approx(critical, rel=1e-5)


def measured(critical, noise=0.0, seed=0, miss=()):
    setup = setup_of({"batch.base": BATCHES})
    rng = np.random.default_rng(seed)
    runs = []
    for batch in BATCHES:
        curves = []
        for _ in range(8):
            steps = 700 * (1 + critical / batch) * np.exp(noise * rng.normal())
            at = np.linspace(1, 2 * steps, 24).astype(int)
            curves.append(points(at, at / steps * (0.4 if batch in miss else 1)))
        runs += repetitions((str(batch),), [0.9] * 8, curve=curves)
    cells = [*by_cell(setup, runs).values()]
    return setup, measure_steps("", [float(b) for b in BATCHES], cells, setup, 1.0, 0.95)


@pytest.mark.parametrize("critical", [50.0, 400.0, 3000.0])
def test_the_critical_batch_is_within_its_interval_in_noise(critical):
    inside = 0
    for seed in range(8):
        found = measured(critical, noise=0.1, seed=seed)[1].critical
        inside += found.low <= critical <= found.high
    assert inside >= 7


def test_regions_follow_the_critical_batch():
    """The slope between B and 2 B is 0.8 near B_crit / 4 and 0.2 near 4 B_crit."""
    setup, found = measured(400.0)
    region = dict(zip(BATCHES, found.regions, strict=True))
    assert region[32] == ""
    assert [region[b] for b in (64, 128)] == ["perfect scaling"] * 2
    assert [region[b] for b in (256, 512, 1024, 2048)] == ["diminishing returns"] * 4
    assert region[4096] == "maximum"
    assert found.falls[1].mean == pytest.approx((1 + 400 / 32) / (1 + 400 / 64), rel=0.01)
    text = steps_text(found, setup)
    assert "perfect scaling up to 128, diminishing returns at 256 to 2048, maximum at 4096" in text
    assert [area.label for area in steps_panels([found], setup, 1.0)[0].areas] == [
        "perfect scaling", "diminishing returns", "maximum"]  # fmt: skip


@pytest.mark.parametrize(
    ("critical", "bound", "words"), [(1e9, "high", "far above 4096"), (1e-3, "low", "far below 32")]
)
def test_curves_that_do_not_bend_have_no_critical_batch(critical, bound, words):
    setup, found = measured(critical)
    assert found.bound == bound
    assert words in steps_text(found, setup)


def test_repetitions_that_do_not_reach_the_target_are_counted():
    setup, found = measured(400.0, miss=(32, 64))
    assert found.missed == (8, 8, 0, 0, 0, 0, 0, 0)
    assert found.steps[0].mean is None
    assert "did not reach it at 32 (8), 64 (8)" in steps_text(found, setup)
    assert table(found)[32.0] == ("—, 8 did not reach it", "—", "—")
    setup, found = measured(400.0, miss=BATCHES)
    assert steps_text(found, setup) == "no repetition reached the target of accuracy"
