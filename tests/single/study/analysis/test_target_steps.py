"""Steps to a target: interpolation, regions, and the critical batch of known curves."""

import dataclasses

import numpy as np
import pytest
from support.simulated_studies import points, repetitions, setup_of

from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.target_steps import (
    EARLY,
    _critical,
    critical_text,
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
    falling = run_with([10, 20, 30], [0.9, 0.5, 0.1])
    assert steps_to(falling, 0.3, lower_is_better=True) == pytest.approx(25)
    assert steps_to(run_with([], []), 0.3, lower_is_better=True) is None


def test_a_target_that_the_first_evaluation_has_reached_is_not_measured():
    """Evaluations once an epoch would make the steps to it fall as 1 / batch."""
    assert steps_to(run_with([10, 20, 30], [0.2, 0.6, 0.5]), 0.1, lower_is_better=False) == EARLY
    assert steps_to(run_with([10, 20], [float("nan"), 0.6]), 0.5, lower_is_better=False) == EARLY
    setup = setup_of({"batch.base": BATCHES[:4]})
    runs = []
    for batch in BATCHES[:4]:
        per_epoch = 4096 // batch
        late = [points([per_epoch, 2 * per_epoch], [0.5, 1.1 + 0.1 * seed]) for seed in range(6)]
        curves = [points([per_epoch], [0.9])] * 8 if batch < 256 else late + [late[0][1:]] * 2
        runs += repetitions((str(batch),), [0.9] * 8, curve=curves)
    cells = [*by_cell(setup, runs).values()]
    found = measure_steps("", [float(b) for b in BATCHES[:4]], cells, setup, 0.8, 0.95)
    assert found.early == (8, 8, 8, 2)
    assert found.missed == (0,) * 4
    assert found.regions == ("",) * 4
    assert [each.seeds for each in found.falls] == [0] * 4
    assert (found.steps[3].seeds, found.critical.batch.seeds) == (6, 0)
    assert found.facts()["early"] == [8, 8, 8, 2]
    assert table(found)[32.0] == ("—, 8 reached it before the first evaluation", "—", "—")
    assert steps_text(found, setup) == (
        "steps to the target: no two neighbouring batches with the steps of the same seed; "
        "reached before the first evaluation at 32 (8), 64 (8), 128 (8), 256 (2)"
    )


def test_values_that_are_not_finite_are_not_interpolated():
    run = run_with([10, 20, 30], [0.2, float("nan"), 0.6])
    assert steps_to(run, 0.5, lower_is_better=False) == 30


@pytest.mark.parametrize("critical", [50.0, 400.0, 3000.0])
def test_a_known_critical_batch_is_recovered(critical):
    steps = [700 * (1 + critical / batch) for batch in BATCHES]
    batch, bound = fit_critical_batch(BATCHES, steps)
    assert (batch, bound) == (pytest.approx(critical, rel=1e-5), "")


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
        found = measured(critical, noise=0.1, seed=seed)[1].critical.batch
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
    assert (
        "perfect scaling from 32 to 128, diminishing returns from 128 to 2048, maximum from 2048 to "
        "4096, critical batch 400 ["
    ) in text
    assert [area.label for area in steps_panels([found], setup, 1.0)[0].areas] == [
        "perfect scaling", "diminishing returns", "maximum"]  # fmt: skip


def of_slopes(slopes, seeds=8, spread=0.0):
    """Steps that fall as 2^-slope from each batch to the next, with slopes that differ by seed."""
    setup = setup_of({"batch.base": BATCHES[: len(slopes) + 1]}, seeds=seeds)
    rng = np.random.default_rng(1)
    logs = [[10.0] * seeds]
    for slope in slopes:
        logs.append([log - slope - spread * rng.normal() for log in logs[-1]])
    runs = []
    for (batch,), steps in zip(setup.cells, logs, strict=True):
        curves = [points([1, 10**6], [2**-log, 10**6 * 2**-log]) for log in steps]
        runs += repetitions((batch,), [0.9] * seeds, curve=curves)
    cells = [*by_cell(setup, runs).values()]
    sizes = [float(batch) for (batch,) in setup.cells]
    return setup, measure_steps("", sizes, cells, setup, 1.0, 0.95)


@pytest.mark.parametrize(
    ("slope", "region"),
    [(0.85, "perfect scaling"), (0.75, "diminishing returns"), (0.25, "diminishing returns"),
     (0.15, "maximum")],
)  # fmt: skip
def test_a_region_is_named_only_if_the_whole_interval_lies_in_it(slope, region):
    assert of_slopes([slope], spread=0.01)[1].regions == ("", region)
    assert of_slopes([slope], spread=0.5)[1].regions == ("", "undecided")
    assert of_slopes([slope], seeds=2)[1].regions == ("", "undecided")  # no interval


def test_stretches_of_one_region_are_those_without_another_between():
    setup, found = of_slopes([1.0, 0.5, 1.0, 1.0])
    text = steps_text(found, setup)
    assert (
        "perfect scaling from 32 to 64, diminishing returns from 64 to 128, perfect scaling from "
        "128 to 512"
    ) in text
    assert [(area.low, area.high) for area in steps_panels([found], setup, 1.0)[0].areas] == [
        (32, 64), (64, 128), (128, 512)]  # fmt: skip


def test_a_stretch_does_not_go_over_a_batch_that_missed_the_target():
    setup, found = measured(1e9, miss=(256,))
    assert found.regions[3:5] == ("", "")
    assert "perfect scaling from 32 to 128, perfect scaling from 512 to 4096" in steps_text(
        found, setup
    )


def test_undecided_stretches_are_said_and_not_shaded():
    setup, found = of_slopes([1.0, 0.8, 0.8], spread=0.1)
    assert "undecided from 64 to 256" in steps_text(found, setup)
    assert [area.high for area in steps_panels([found], setup, 1.0)[0].areas] == [64]


@pytest.mark.parametrize(
    ("critical", "words"),
    [(1e9, "critical batch far above 4096"), (1e-3, "critical batch far below 32")],
)
def test_curves_that_do_not_bend_have_no_critical_batch(critical, words):
    setup, found = measured(critical)
    assert found.critical.batch == (None, None, None, 8)
    assert steps_text(found, setup).endswith(words)


def test_a_bound_of_one_seed_leaves_no_number():
    """Its own largest batch decides where the bound is, not that of the others."""
    straight = dict(enumerate(10 - np.log([32, 64, 128])))
    bent = dict(enumerate(np.log([700 * (1 + 400 / batch) for batch in BATCHES])))
    logs = [
        {seed: curve[k] for seed, curve in enumerate([straight, bent, bent, bent]) if k in curve}
        for k in range(len(BATCHES))
    ]
    found = _critical(BATCHES, logs, 0.95)
    assert found == ((None, None, None, 4), (), (128,))
    setup, steps = measured(400.0)
    steps = dataclasses.replace(steps, critical=found)
    assert steps_text(steps, setup).endswith("critical batch far above 128 in 1 of 4 seeds")
    both = dataclasses.replace(steps, critical=found._replace(below=(32, 64)))
    assert critical_text(both) == "far below 64 in 2 of 4 seeds and far above 128 in 1 of 4 seeds"
    assert [guide.label for guide in steps_panels([steps], setup, 1.0)[0].guides] == []


def test_repetitions_that_do_not_reach_the_target_are_counted():
    setup, found = measured(400.0, miss=(32, 64))
    assert found.missed == (8, 8, 0, 0, 0, 0, 0, 0)
    assert found.steps[0].mean is None
    assert "did not reach it at 32 (8), 64 (8)" in steps_text(found, setup)
    assert table(found)[32.0] == ("—, 8 did not reach it", "—", "—")
    setup, found = measured(400.0, miss=BATCHES)
    assert steps_text(found, setup) == "no repetition reached the target of accuracy"
