"""The analysis `compare`: rates of false positives, power, edges, failures, unfinished studies."""

import json

import numpy as np
import pytest
from support.simulated_studies import NOISES, noisy, repetitions, setup_of

from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.compare import compare
from hvdlarge.study.analysis.differences import difference, judge
from hvdlarge.study.analysis.sections import Compare

BASELINE = Compare(baseline={"arm": "a"})


def found(section, setup, runs):
    finding = compare(section, setup, by_cell(setup, runs))
    json.dumps(finding.facts, allow_nan=False)
    assert len({len(row) for row in finding.table}) == 1
    return finding


def outcomes(finding):
    return {each["arm"][-1]: each["outcome"] for each in finding.facts["comparisons"]}


@pytest.mark.parametrize(
    ("section", "kind"), [*((BASELINE, kind) for kind in NOISES), (Compare(), "skewed")]
)
def test_false_positives_of_equal_arms(kind, section):
    """Of 200 studies with three equal arms, those in which any is called better or worse."""
    setup = setup_of({"arm": ["a", "b", "c"]})
    false = 0
    for seed in range(200):
        runs = noisy(setup, [0.9] * 3, noise=0.01, seed=seed, kind=kind, shared=0.02)
        facts = compare(section, setup, by_cell(setup, runs)).facts["comparisons"]
        false += any(each["better"] or each["worse"] for each in facts)
    assert false / 200 < 0.08


@pytest.mark.parametrize("lower", [False, True])
def test_a_clear_difference_is_found(lower):
    """Twice the noise of a difference, with 8 seeds, in two comparisons: in 27 of 28 studies."""
    setup = setup_of({"arm": ["a", "b", "c"]}, lower=lower)
    right = 0
    for seed in range(28):
        runs = noisy(setup, [0.9, 0.93, 0.9], noise=0.01, seed=seed, shared=0.1)
        right += outcomes(found(BASELINE, setup, runs))["b"] == ("worse" if lower else "better")
    assert right >= 27


def test_pairing_removes_what_seeds_share():
    setup = setup_of({"arm": ["a", "b"]})
    finding = found(BASELINE, setup, noisy(setup, [0.9, 0.91], noise=1e-4, shared=0.1))
    assert outcomes(finding) == {"b": "better"}
    assert finding.facts["comparisons"][0]["gain"]["mean"] == pytest.approx(0.01, abs=2e-4)
    assert finding.verdict.startswith("b against a: gain +0.0")


def test_non_inferiority_within_a_tolerance():
    setup = setup_of({"arm": ["a", "near", "far", "unclear"]})
    means = [0.9, 0.895, 0.85, 0.89]
    section = Compare(baseline={"arm": "a"}, tolerance=0.01)
    finding = found(section, setup, noisy(setup, means, noise=0.001, seed=2))
    assert outcomes(finding) == {
        "near": "worse, within tolerance",
        "far": "worse, beyond tolerance",
        "unclear": "worse, tolerance undecided",
    }


def test_non_inferiority_is_seldom_claimed_at_the_tolerance():
    """Half of the false positives of a p-value of two sides."""
    setup = setup_of({"arm": ["a", "b"]})
    false = 0
    for seed in range(300):
        cells = by_cell(setup, noisy(setup, [0.9, 0.89], noise=0.01, seed=seed))
        gain = difference(setup, cells[("b",)], cells[("a",)], 0.95, tolerance=0.01)
        false += bool(judge([gain], 0.95)[0].within)
    assert false / 300 < 0.05


@pytest.mark.parametrize(("rate", "end"), [(9.9, "upper end, 10"), (0.0101, "lower end, 0.01")])
def test_best_rates_at_the_edge_make_a_comparison_void(rate, end):
    setup = setup_of({"arm": ["a", "b", "c"]})
    values = {arm: 0.9 + 0.01 * np.arange(8) + 0.1 * k for k, arm in enumerate("abc")}
    runs = [
        run
        for arm in "abc"
        for run in repetitions((arm,), values[arm], lr=rate if arm == "b" else 0.5)
    ]
    finding = found(BASELINE, setup, runs)
    assert outcomes(finding)["b"].startswith("void: b has its best lr.base")
    assert end in finding.verdict
    assert "void" in finding.verdict
    assert outcomes(finding)["c"] == "better"
    void = finding.facts["comparisons"][0]
    assert [void[key] for key in ("better", "worse", "within")] == [False, False, None]
    # The baseline at the edge: every comparison is void
    runs = [
        run
        for arm in "abc"
        for run in repetitions((arm,), values[arm], lr=rate if arm == "a" else 0.5)
    ]
    assert all(
        text.startswith("void: a has") for text in outcomes(found(BASELINE, setup, runs)).values()
    )


def test_a_cell_with_failures_is_neither_better_nor_within_tolerance():
    setup = setup_of({"arm": ["a", "b"]})
    base = repetitions(("a",), 0.5 + 0.001 * np.arange(8))
    runs = base + repetitions(("b",), [*(0.9 + 0.001 * np.arange(7) ** 2), None])
    finding = found(Compare(baseline={"arm": "a"}, tolerance=0.1), setup, runs)
    fact = finding.facts["comparisons"][0]
    assert (fact["better"], fact["within"]) == (False, False)
    assert "1 of 8 of b failed" in finding.verdict
    assert any("7, 1 failed" in row for row in finding.table)
    assert any("1 diverged of 8" in note for note in finding.notes)


def test_no_cell_is_worse_than_one_with_failures_but_may_be_better():
    setup = setup_of({"arm": ["a", "b", "c"]})
    flattered = repetitions(("a",), [*(0.7 + 0.001 * np.arange(7)), None])
    runs = [
        *flattered,
        *repetitions(("b",), 0.5 + 0.001 * np.arange(8) ** 2),
        *repetitions(("c",), 0.9 + 0.001 * np.arange(8) ** 2),
    ]
    facts = {e["arm"][0]: e for e in found(BASELINE, setup, runs).facts["comparisons"]}
    assert (facts["b"]["worse"], facts["c"]["better"]) == (False, True)


def test_the_best_arm_is_the_reference_unless_it_has_failures():
    setup = setup_of({"arm": ["a", "b", "c"]})
    runs = [
        *repetitions(("a",), 0.5 + 0.001 * np.arange(8)),
        *repetitions(("b",), [0.99] * 7 + [None]),
        *repetitions(("c",), 0.7 + 0.001 * np.arange(8) ** 2),
    ]
    finding = found(Compare(), setup, runs)
    assert {each["base"][0] for each in finding.facts["comparisons"]} == {"c"}
    assert finding.facts["compared"] == 3  # all pairs, as the reference was chosen by its result


def test_arms_within_the_levels_of_another_factor():
    setup = setup_of({"batch.base": [32, 64], "arm": ["a", "b"]})
    runs = noisy(setup, [0.9, 0.95, 0.9, 0.85], noise=0.003)
    for section in (
        BASELINE,
        Compare(by="arm", baseline={"arm": "a"}),
        Compare(within=["batch.base"], by=["arm"], baseline={"arm": "a"}),
    ):
        finding = found(section, setup, runs)
        assert [each["outcome"] for each in finding.facts["comparisons"]] == ["better", "worse"]
        assert [each["base"] for each in finding.facts["comparisons"]] == [["32", "a"], ["64", "a"]]


def test_many_comparisons_are_summed_up():
    setup = setup_of({"arm": [*"abcdefgh"]})
    means = [0.9, 0.95, 0.85, *[0.9] * 5]
    verdict = found(BASELINE, setup, noisy(setup, means, noise=0.003, seed=1)).verdict
    assert verdict.startswith("Of 7 comparisons, 1 better: b (+0.0")
    assert "1 worse: c (-0.0" in verdict
    assert "5 without a difference" in verdict


def test_pairs_are_those_that_finished_in_both():
    setup = setup_of({"arm": ["a", "b"]})
    runs = repetitions(("a",), [1, 2, 3, 4, 5, 6]) + repetitions(("b",), [2, 3, 4, 5])
    fact = found(BASELINE, setup, runs).facts["comparisons"][0]
    assert (fact["gain"]["seeds"], fact["gain"]["mean"]) == (4, 1.0)


def test_too_few_seeds_have_no_interval():
    setup = setup_of({"arm": ["a", "b"]}, seeds=2)
    finding = found(BASELINE, setup, noisy(setup, [0.5, 0.9], noise=0.001))
    assert "too few seeds: 2 seeds in both, 3 needed" in finding.verdict
    assert finding.facts["comparisons"][0]["p"] is None
    assert finding.facts["comparisons"][0]["gain"]["low"] is None


def test_too_many_comparisons_for_the_seeds_are_said():
    setup = setup_of({"arm": [*"abcdefgh"]}, seeds=3)
    finding = found(BASELINE, setup, noisy(setup, [0.1] + [0.9] * 7, noise=0.001))
    assert any("at least 4 seeds are needed" in note for note in finding.notes)


def test_ties_and_identical_values():
    setup = setup_of({"arm": ["a", "b", "c"]})
    runs = [
        run
        for arm, v in zip("abc", (0.5, 0.5, 0.75), strict=True)
        for run in repetitions((arm,), [v] * 8)
    ]
    finding = found(Compare(baseline={"arm": "a"}, tolerance=0.01), setup, runs)
    assert outcomes(finding) == {
        "b": "no difference shown, within tolerance",
        "c": "better, within tolerance",
    }
    assert {each["base"][0] for each in found(Compare(), setup, runs).facts["comparisons"]} == {"c"}


@pytest.mark.parametrize("section", [BASELINE, Compare()])
def test_unfinished_studies(section):
    setup = setup_of({"arm": ["a", "b"]})
    assert "nothing to compare" in found(section, setup, []).verdict
    assert (
        "All 16 repetitions failed"
        in found(
            section, setup, [r for c in setup.cells for r in repetitions(c, [None] * 8)]
        ).verdict
    )
    finding = found(section, setup, repetitions(("a",), [0.1, 0.2, 0.4]))
    assert "no repetition of b yet" in finding.verdict
    assert any("a (3 of 8) and b (0 of 8)" in note for note in finding.notes)
    half = repetitions(("a",), [0.1, 0.2, 0.4]) + repetitions(("b",), [None] * 3)
    assert "all 3 repetitions of b failed" in found(section, setup, half).verdict


def test_a_single_cell():
    setup = setup_of({})
    finding = found(Compare(), setup, repetitions((), [0.1, 0.2, 0.3, 0.5]))
    assert finding.verdict.startswith("simulated: accuracy 0.275 [")
    assert finding.facts["comparisons"] == []
