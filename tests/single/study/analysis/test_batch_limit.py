"""The analysis `batch_limit`: known limits are found, on and off the grid, exactly and in noise."""

import dataclasses
import json

import numpy as np
import pytest
from support.simulated_studies import noisy, points, repetitions, setup_of

from hvdlarge.study.analysis.batch_limit import batch_limit, find_limits
from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.finding import rounded
from hvdlarge.study.analysis.sections import BatchLimit

BATCHES = [32, 64, 128, 256, 512, 1024, 2048]
SECTION = BatchLimit(batch="batch.base", tolerance=0.01)


def curve(limit, lower=False):
    """A result that falls by 0.02 for each doubling from half a doubling before the limit on."""
    sign = 1 if lower else -1
    return [0.5 + sign * 0.02 * max(0.0, np.log2(batch / limit) + 0.5) for batch in BATCHES]


def limit_of(facts):
    return f"{rounded(facts['estimate'])} [{rounded(facts['low'])}, {rounded(facts['high'])}]"


def found(setup, runs, section=SECTION):
    finding = batch_limit(section, setup, by_cell(setup, runs))
    json.dumps(finding.facts, allow_nan=False)
    assert len({len(row) for row in finding.table}) <= 1
    return finding


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("limit", [256, 300, 450, 724])
def test_known_limits_are_found_without_noise(limit, lower):
    setup = setup_of({"batch.base": BATCHES}, lower=lower)
    facts = found(setup, noisy(setup, curve(limit, lower), shared=0.05)).facts["limits"][0]
    kink = 2**0.5  # where the curve bends within a step, its chord lies beside it
    assert limit / kink <= facts["estimate"] <= limit * kink
    within = [b for b in BATCHES if np.log2(b / limit) < -1e-9]
    beyond = [b for b in BATCHES if np.log2(b / limit) > 1e-9]
    assert (facts["shown"], facts["excluded"]) == (within[-1], beyond[0])


@pytest.mark.parametrize("limit", [362, 512])
def test_known_limits_are_within_the_interval_in_noise(limit):
    """A straight line in ln(batch), which the interpolation follows: at most 3 of 25 miss."""
    setup = setup_of({"batch.base": BATCHES})
    slope = 0.01 / np.log2(limit / 32)
    means = [0.5 - slope * np.log2(batch / 32) for batch in BATCHES]
    inside, ratios, shown = 0, [], 0
    for seed in range(25):
        runs = noisy(setup, means, noise=0.001, seed=seed, shared=0.01)
        each = find_limits(SECTION, setup, by_cell(setup, runs))[0]
        inside += each.low <= limit * 1.02 and (each.high or 1e9) >= limit / 1.02
        ratios.append(each.estimate / limit)
        shown += each.shown > limit
    assert inside >= 22
    assert 0.9 < np.median(ratios) < 1.1
    assert shown <= 2  # batches beyond the limit are seldom shown to be within


def test_all_batches_are_fine():
    setup = setup_of({"batch.base": BATCHES})
    finding = found(setup, noisy(setup, [0.5] * 7, noise=0.001))
    facts = finding.facts["limits"][0]
    assert (facts["all_within"], facts["estimate"], facts["excluded"]) == (True, None, None)
    assert finding.verdict == (
        "Limit within 0.01 of batch 32 (95 %): all batches are within it, up to 2048."
    )


def test_no_batch_is_fine():
    setup = setup_of({"batch.base": BATCHES})
    finding = found(setup, noisy(setup, [0.5] + [0.4] * 6, noise=0.001))
    facts = finding.facts["limits"][0]
    assert (facts["shown"], facts["excluded"]) == (32, 64)
    assert 32 < facts["estimate"] < 64
    assert "; no larger batch is shown to be within it, 64 is not." in finding.verdict
    assert facts["low"] <= facts["estimate"] <= facts["high"]


def test_the_limit_of_each_arm_and_another_baseline():
    setup = setup_of({"arm": ["a", "b"], "batch.base": BATCHES})
    runs = noisy(setup, curve(200) + curve(800), noise=0.0005)
    finding = found(setup, runs)
    assert [each["shown"] for each in finding.facts["limits"]] == [128, 512]
    first, second = finding.facts["limits"]
    assert finding.verdict == (
        f"Limit within 0.01 of batch 32 (95 %): a {limit_of(first)}; b {limit_of(second)}."
    )
    section = BatchLimit(batch="batch.base", tolerance=0.01, baseline=128)
    limits = found(setup, runs, section).facts["limits"]
    assert [each["batches"][0] for each in limits] == [128, 128]


def test_a_batch_with_failures_is_not_within():
    setup = setup_of({"batch.base": [32, 64, 128]})
    runs = noisy(setup, [0.5] * 3, noise=0.001)
    runs = [run for run in runs if run.cell != ("128",)]
    runs += repetitions(("128",), [0.5, 0.5001, 0.4999, 0.5, 0.5, 0.5002, 0.5, None])
    finding = found(setup, runs)
    assert finding.facts["limits"][0]["shown"] == 64
    assert "128 is not (1 of 8 failed at 128)" in finding.verdict


def test_edges_make_the_limit_void_unless_they_are_beyond_it():
    setup = setup_of({"batch.base": BATCHES})
    runs = noisy(setup, curve(200), noise=0.0005)

    def with_edge(cell):
        return [
            dataclasses.replace(r, settings={"lr.base": 10.0}) if r.cell == cell else r
            for r in runs
        ]

    for batch in ("128", "256"):
        assert found(setup, with_edge((batch,))).verdict == (
            "Limit within 0.01 of batch 32 (95 %): void: "
            f"batch.base {batch} has lr.base 10, the upper end of its range."
        )
    assert "void" not in found(setup, with_edge(("2048",))).verdict
    runs = [run for run in runs if run.cell != ("64",)] + repetitions(("64",), [0.5, None])
    verdict = found(setup, with_edge(("32",))).verdict
    assert verdict.endswith("the upper end of its range; failed: batch.base 64 (1 of 2).")


def test_other_epochs_are_said():
    setup = setup_of({"batch.base": [32, 64]})
    runs = repetitions(("32",), [0.5, 0.51, 0.52]) + repetitions(
        ("64",), [0.5, 0.51, 0.52], epochs=20.0
    )
    assert any("10 to 20" in note for note in found(setup, runs).notes)


def test_a_larger_batch_that_is_fine_again_is_said():
    setup = setup_of({"batch.base": [32, 64, 128]})
    finding = found(setup, noisy(setup, [0.5, 0.4, 0.5], noise=0.001))
    assert finding.facts["limits"][0]["shown"] == 32
    assert any("128 would be within tolerance" in note for note in finding.notes)


@pytest.mark.parametrize(
    "section", [SECTION, BatchLimit(batch="batch.base", tolerance=0.0, target=0.4)]
)
def test_unfinished_studies(section):
    setup = setup_of({"batch.base": [32, 64, 128]})
    assert "no repetition of batch 32, the baseline, yet" in found(setup, [], section).verdict
    everything = [r for c in setup.cells for r in repetitions(c, [None] * 8)]
    words = "all 8 repetitions of batch 32, the baseline, failed"
    assert words in found(setup, everything, section).verdict
    assert "1 of 3 seeds" in found(setup, repetitions(("32",), [0.5]), section).verdict
    assert found(setup, repetitions(("64",), [0.5] * 8), section).verdict
    assert found(setup, repetitions(("32",), [0.5] * 8), section).facts["limits"][0]["shown"] == 32
    one = setup_of({"batch.base": [32]})
    assert "no arm has two batches" in found(one, repetitions(("32",), [0.5] * 8), section).verdict


def test_equal_results_are_within_a_tolerance_of_0():
    setup = setup_of({"batch.base": [32, 64]})
    section = BatchLimit(batch="batch.base", tolerance=0.0)
    runs = [run for cell in setup.cells for run in repetitions(cell, [0.5] * 8)]
    assert found(setup, runs, section).facts["limits"][0]["all_within"]


def test_steps_to_a_target_are_part_of_it():
    setup = setup_of({"batch.base": [32, 64, 128]})
    runs = []
    for batch in (32, 64, 128):
        steps = np.arange(1, 200)
        curves = [points(steps, steps * batch / 3200 * (1 + 0.01 * seed)) for seed in range(8)]
        runs += repetitions((str(batch),), [0.9] * 8, curve=curves)
    finding = found(setup, runs, BatchLimit(batch="batch.base", tolerance=0.01, target=1.0))
    assert "perfect scaling from 32 to 128" in finding.verdict
    assert finding.table[0][-3:] == (
        "steps to the target",
        "per doubling from the batch before",
        "its region",
    )
    assert len(finding.plot.panels) == 2


def test_intervals_that_are_not_known_are_not_shown():
    """Batches with two seeds so far have an estimate, but no interval."""
    setup = setup_of({"batch.base": [32, 64, 128]})
    runs = noisy(setup, [0.5, 0.5, 0.4], noise=0.001)
    two = [run for run in runs if run.number < 2]
    finding = found(setup, two)
    facts = finding.facts["limits"][0]
    assert (facts["known"], facts["low"], facts["high"]) == (False, None, None)
    assert f"{rounded(facts['estimate'])} (no interval), undecided" in finding.verdict
    later = [run for run in runs if run.number < 2 or run.cell != ("128",)]
    finding = found(setup, later)
    assert finding.facts["limits"][0]["known"] is False
    assert "(no interval); batches up to 64 are shown to be within it" in finding.verdict


def test_an_interval_goes_no_further_than_the_results():
    """Nothing is known of batch 1024 yet: the limit is not beyond it, but beyond 256."""
    setup = setup_of({"batch.base": [64, 256, 1024]})
    runs = noisy(setup, [0.5, 0.488, 0.4], noise=0.006, seed=4)
    finding = found(setup, [run for run in runs if run.cell != ("1024",)])
    facts = finding.facts["limits"][0]
    assert (facts["high"], facts["known"]) == (None, True)
    assert ", > 256]" in finding.verdict


def test_failures_of_the_baseline_are_said_where_all_is_within():
    setup = setup_of({"batch.base": [32, 64]})
    runs = repetitions(("32",), [*(0.5 + 0.001 * np.arange(7)), None])
    runs += repetitions(("64",), 0.5 + 0.001 * np.arange(8))
    assert found(setup, runs).verdict == (
        "Limit within 0.01 of batch 32 (95 %): above 64, but 1 of 8 repetitions of batch 32, the "
        "baseline, failed."
    )


def test_several_arms_have_a_clause_each():
    setup = setup_of({"batch.base": [64, 256, 1437], "arm": [*"abcdef"]})
    means = [*[0.9] * 6, *[0.9] * 5, 0.8, *[0.9] * 2, 0.8, *[0.9] * 3]
    runs = noisy(setup, means, noise=0.001)
    failed = ("1437", "d")
    runs = [run for run in runs if run.cell != failed] + repetitions(failed, [None] * 8)
    runs = [
        dataclasses.replace(run, settings={"lr.base": 10.0}) if run.cell == ("64", "e") else run
        for run in runs
    ]
    runs = [run for run in runs if run.cell != ("64", "f")]
    finding = found(setup, runs)
    limit = limit_of(next(each for each in finding.facts["limits"] if each["arm"] == "c"))
    assert finding.verdict == (
        "Limit within 0.01 of batch 64 (95 %): above 1437 for a and b; "
        f"c {limit}; d above 256, 8 of 8 failed at 1437; "
        "f: no repetition of batch 64, the baseline, yet; "
        "void: batch.base 64, e has lr.base 10, the upper end of its range."
    )
    assert finding.title == "Largest batch that loses at most 0.01 of accuracy"


def test_arms_without_the_baseline_are_named():
    setup = setup_of({"batch.base": [32, 64], "arm": ["a", "b"]})
    cells = tuple(cell for cell in setup.cells if cell != ("32", "b"))
    setup = dataclasses.replace(setup, cells=cells)
    runs = noisy(setup, [0.5] * 3, noise=0.001)
    section = BatchLimit(batch="batch.base", tolerance=0.01, baseline=32)
    assert "Without the baseline or a batch above it: b." in found(setup, runs, section).notes


def test_limits_of_many_arms_have_a_panel_with_their_intervals():
    arms = ["a", "b", "c", "d"]
    for count in (3, 4):
        setup = setup_of({"batch.base": BATCHES, "arm": arms[:count]})
        means = [mean for mean in curve(300) for _ in range(count)]
        finding = found(setup, noisy(setup, means, noise=0.001))
        gains, *rest = finding.plot.panels
        guides = [guide.label for guide in gains.guides if guide.axis == "x"]
        if count == 3:
            assert (len(guides), rest) == (3, [])
            continue
        (limits,) = rest
        assert guides == []
        assert "estimated limits" in finding.plot.caption
        assert limits.names == ("a", "b", "c", "d")
        for series, fact in zip(limits.series, finding.facts["limits"], strict=True):
            ends = [fact[key] for key in ("estimate", "low", "high")]
            assert [series.x[0], series.low[0], series.high[0]] == ends
