"""The analysis `compare`: rates of false positives, power, edges, failures, unfinished studies."""

import dataclasses
import json

import numpy as np
import pytest
from support.simulated_studies import LR, NOISES, noisy, repetitions, setup_of

from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.compare import compare
from hvdlarge.study.analysis.differences import difference, judge
from hvdlarge.study.analysis.finding import mean_and_ends
from hvdlarge.study.analysis.intervals import Interval
from hvdlarge.study.analysis.sections import Compare
from hvdlarge.study.analysis.verdicts import group_places

SPREAD = 0.01 * np.random.default_rng(3).normal(size=8)
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
    assert finding.verdict.startswith("Against a (gain, 95 %): b +0.0")
    assert finding.verdict.endswith("], better.")


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


@pytest.mark.parametrize(
    ("others", "sign", "outcome"),
    [(0.0, -1, "worse, beyond tolerance"), (-0.01, 1, "better, within tolerance")],
)
def test_what_the_correction_of_one_family_shows_holds_in_the_other(others, sign, outcome):
    """The arm's own p-value is multiplied by 24 in one family; in the other those of all other arms
    are smaller, which leaves it as it is.
    """
    names = [f"arm {number}" for number in range(23)]
    setup = setup_of({"arm": ["a", "b", *names]})
    gains = sign * np.array([0.097, 0.133, 0.128, 0.239, 0.197, 0.164, 0.081, 0.103])
    around = 1e-4 * np.random.default_rng(1).normal(size=(23, 8))
    runs = repetitions(("a",), 0.7 + SPREAD) + repetitions(("b",), 0.7 + SPREAD + gains)
    for name, more in zip(names, around, strict=True):
        runs += repetitions((name,), 0.7 + SPREAD + others + more)
    finding = found(Compare(baseline={"arm": "a"}, tolerance=0.01), setup, runs)
    (fact,) = [each for each in finding.facts["comparisons"] if each["arm"] == ["b"]]
    assert max(fact["p"], fact["p_within"]) > 0.05 > min(fact["p"], fact["p_within"])
    assert fact["outcome"] == outcome


def test_non_inferiority_is_seldom_claimed_at_the_tolerance():
    """Half of the false positives of a p-value of two sides."""
    setup = setup_of({"arm": ["a", "b"]})
    false = 0
    for seed in range(300):
        cells = by_cell(setup, noisy(setup, [0.9, 0.89], noise=0.01, seed=seed))
        gain = difference(setup, cells[("b",)], cells[("a",)], 0.95, tolerance=0.01)
        false += bool(judge([gain], 0.95)[0].within)
    assert false / 300 < 0.05


@pytest.mark.parametrize(
    ("rate", "end"), [(9.9, "upper end of its range, 10"), (0.0101, "lower end of its range, 0.01")]
)
def test_best_rates_at_the_edge_make_a_comparison_void(rate, end):
    setup = setup_of({"arm": ["a", "b", "c"]})
    values = {arm: 0.9 + 0.01 * np.arange(8) + 0.1 * k for k, arm in enumerate("abc")}
    runs = [
        run
        for arm in "abc"
        for run in repetitions((arm,), values[arm], lr=rate if arm == "b" else 0.5)
    ]
    finding = found(BASELINE, setup, runs)
    assert outcomes(finding)["b"] == "void: best settings of b at an edge"
    (note,) = [note for note in finding.notes if "b has lr.base" in note]
    assert end in note
    assert finding.verdict.count(end) == 1
    assert f"void: b has lr.base {rate:.4g}, near the {end}" in finding.verdict
    assert "b +" not in finding.verdict  # no gain
    assert outcomes(finding)["c"] == "better"
    void = finding.facts["comparisons"][0]
    assert [void[key] for key in ("better", "worse", "within")] == [False, False, None]
    # The baseline at the edge: every comparison is void
    runs = [
        run
        for arm in "abc"
        for run in repetitions((arm,), values[arm], lr=rate if arm == "a" else 0.5)
    ]
    finding = found(BASELINE, setup, runs)
    assert set(outcomes(finding).values()) == {"void: best settings of a at an edge"}
    assert finding.table[1][-1] == "reference; best settings at an edge"
    assert sum("a has lr.base" in note for note in finding.notes) == 1
    assert finding.verdict == (
        f"Against a (gain, 95 %): all 2 void: a has lr.base {rate:.4g}, near the {end}."
    )


def test_a_cell_with_failures_is_neither_better_nor_within_tolerance():
    setup = setup_of({"arm": ["a", "b"]})
    base = repetitions(("a",), 0.5 + 0.001 * np.arange(8))
    runs = base + repetitions(("b",), [*(0.9 + 0.001 * np.arange(7) ** 2), None])
    finding = found(Compare(baseline={"arm": "a"}, tolerance=0.1), setup, runs)
    fact = finding.facts["comparisons"][0]
    assert (fact["better"], fact["within"]) == (False, False)
    assert finding.verdict.endswith("; failed: b (1 of 8).")
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
    assert verdict.startswith("Against a (gain, 95 %): 1 better: b +0.0")
    assert "; 1 worse: c -0.0" in verdict
    assert verdict.endswith("; 5 no difference shown.")


def test_pairs_are_those_that_finished_in_both():
    setup = setup_of({"arm": ["a", "b"]})
    runs = repetitions(("a",), [1, 2, 3, 4, 5, 6]) + repetitions(("b",), [2, 3, 4, 5])
    fact = found(BASELINE, setup, runs).facts["comparisons"][0]
    assert (fact["gain"]["seeds"], fact["gain"]["mean"]) == (4, 1.0)


def test_too_few_seeds_have_no_interval():
    setup = setup_of({"arm": ["a", "b"]}, seeds=2)
    finding = found(BASELINE, setup, noisy(setup, [0.5, 0.9], noise=0.001))
    assert finding.verdict.endswith("not comparable: b (too few seeds, 2).")
    assert outcomes(finding)["b"] == "too few seeds: 2 seeds in both, 3 needed"
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
    assert "not comparable: b (no repetition yet)" in finding.verdict
    assert any("a (3 of 8) and b (0 of 8)" in note for note in finding.notes)
    half = repetitions(("a",), [0.1, 0.2, 0.4]) + repetitions(("b",), [None] * 3)
    assert "not comparable: b (3 of 3 failed)" in found(section, setup, half).verdict


def test_a_single_cell():
    setup = setup_of({})
    finding = found(Compare(), setup, repetitions((), [0.1, 0.2, 0.3, 0.5]))
    assert finding.verdict.startswith("Mean accuracy (95 %): simulated 0.28 [")
    assert finding.facts["comparisons"] == []


def test_arms_that_cannot_be_compared_are_not_equal():
    """The baseline failed at one batch, and an arm has not begun: neither is a small difference."""
    setup = setup_of({"batch.base": [32, 64], "arm": [*"abcdef"]})
    runs = [
        run
        for cell in setup.cells
        if cell != ("32", "f")
        for run in repetitions(cell, [None] * 8 if cell == ("64", "a") else 0.5 + 0.01 * SPREAD)
    ]
    verdict = found(BASELINE, setup, runs).verdict
    assert "At batch.base 32: 4 no difference shown; 1 not comparable: f (no repetition" in verdict
    assert verdict.endswith("At 64: all 5 not comparable: a (8 of 8 failed).")


def test_failures_of_arms_and_references_are_named_once():
    setup = setup_of({"arm": [*"abcdefg"]})
    values = dict.fromkeys("abcdefg", 0.5 + 0.01 * SPREAD)
    values |= {"a": [*values["a"][:7], None], "c": [None] * 8}
    runs = [run for arm, each in values.items() for run in repetitions((arm,), each)]
    verdict = found(BASELINE, setup, runs).verdict
    assert verdict.endswith("1 not comparable: c (8 of 8 failed); failed: a (1 of 8).")


def test_an_edge_that_several_cells_share_is_named_once():
    setup = setup_of({"batch.base": [32, 64], "arm": [*"abcdef"]})
    first = ("32", "a")
    setup = dataclasses.replace(
        setup, ranges={first: {"lr.base": LR}}, tuned_at=dict.fromkeys(setup.cells, first)
    )
    runs = [run for cell in setup.cells for run in repetitions(cell, 0.5 + SPREAD, lr=10)]
    finding = found(BASELINE, setup, runs)
    edge = "batch.base 32, a has lr.base 10, the upper end of its range"
    assert finding.verdict == (
        f"Against a (gain, 95 %). At batch.base 32: all 5 void. At 64: all 5 void. Void: {edge}."
    )
    assert [note for note in finding.notes if edge in note] == [
        f"{edge}: a wider search may find better ones."
    ]


def test_edges_of_several_cells_have_the_levels_they_share_once():
    setup = setup_of({"batch.base": [32, 64], "arm": ["a", "b", "c"]})
    runs = [
        run
        for cell in setup.cells
        for run in repetitions(cell, 0.5 + SPREAD, lr=10 if cell[0] == "32" else 1)
    ]
    assert "Void: lr.base at the upper end of its range at batch.base 32: a (10), b (10) and c (10)." in found(BASELINE, setup, runs).verdict  # fmt: skip


def test_all_are_better_has_the_smallest_and_the_largest():
    setup = setup_of({"arm": [*"abcdef"]})
    means = [0.5, 0.62, 0.61, 0.63, 0.65, 0.64]
    verdict = found(BASELINE, setup, noisy(setup, means, noise=0.001)).verdict
    assert verdict.startswith("Against a (gain, 95 %): all 5 better, from c +0.1")
    assert " to e +0.1" in verdict


def test_the_verdict_of_the_study_of_limits_is_short():
    """Seven optimizers at three batches, without failures: a clause for each batch."""
    arms = ["momentum", "lars", "lamb", "adagrad", "rmsprop", "adam", "adamw"]
    setup = setup_of({"batch.base": [64, 256, 1437], "arm": arms})
    means = [0.98, 0.98, 0.98, 0.96, 0.97, 0.98, 0.98, *[0.97] * 6, 0.99, *[0.9], *[0.95] * 6]
    section = Compare(baseline={"arm": "momentum"}, within=["batch.base"], tolerance=0.01)
    verdict = found(section, setup, noisy(setup, means, noise=0.002)).verdict
    assert len(verdict) <= 320
    assert "; 2 worse (1 beyond 0.01): rmsprop, most adagrad -0.0" in verdict
    assert "At 1437: all 6 better, most " in verdict
    assert [verdict.count(f"At {place}: ") for place in ("batch.base 64", "256", "1437")] == [1] * 3


def test_titles_name_the_reference():
    setup = setup_of({"batch.base": [32, 64], "arm": ["a", "b"]})
    sections = [
        (BASELINE, "arm against a, at each batch.base"),
        (Compare(baseline={"arm": "b"}), "arm against b, at each batch.base"),
        (Compare(baseline={"arm": "a", "batch.base": 32}), "batch.base and arm against batch.base 32, a"),
        (Compare(by="batch.base"), "batch.base against the best mean, at each arm"),
    ]  # fmt: skip
    assert [found(section, setup, []).title for section, _ in sections] == [t for _, t in sections]


def test_outcomes_with_a_tolerance_in_words():
    setup = setup_of({"arm": ["a", "near", "far", "up", "wide"]})
    runs = noisy(setup, [0.9, 0.895, 0.85, 0.95, 0.9], noise=0.001, seed=2)
    runs = [run for run in runs if run.cell != ("wide",)]
    runs += repetitions(("wide",), 0.9 + 0.03 * np.array([-1, 1, -1, 1, -1, 1, -1, 1.1]))
    verdict = found(Compare(baseline={"arm": "a"}, tolerance=0.01), setup, runs).verdict
    words = [part.rpartition("], ")[2] for part in verdict[:-1].split("; ")]
    assert words == ["worse, within 0.01", "worse, beyond 0.01", "better", "undecided"]


def test_the_only_group_that_has_begun_is_named():
    setup = setup_of({"batch.base": [32, 64], "arm": ["a", "b"]})
    runs = [r for r in noisy(setup, [0.9, 0.95, 0.9, 0.9], noise=0.001) if r.cell[0] == "32"]
    verdict = found(Compare(within=["batch.base"]), setup, runs).verdict
    assert verdict.startswith("Against the best mean (gain, 95 %). At batch.base 32 against b: a -")


def test_names_of_groups_are_shortened_to_numbers_only():
    assert group_places(["batch.base 64", "batch.base 256"]) == ["batch.base 64", "256"]
    for names in (["warm up", "warm down"], ["a 1", "b 2"], ["x, a 1", "x, a 2"], ["a", "b"], []):
        assert group_places(names) == names


def test_groups_without_the_baseline_are_said():
    setup = setup_of({"batch.base": [32, 64], "arm": ["a", "b"]})
    cells = tuple(cell for cell in setup.cells if cell != ("64", "a"))
    setup = dataclasses.replace(setup, cells=cells)
    finding = found(BASELINE, setup, noisy(setup, [0.9, 0.9, 0.9], noise=0.01))
    assert "Not compared, as the baseline is not there: batch.base 64." in finding.notes
    assert finding.facts["compared"] == 1


def test_few_seeds_of_one_arm_do_not_hide_the_others():
    setup = setup_of({"arm": [*"abcdefgh"]})
    runs = noisy(setup, [0.1] + [0.9] * 7, noise=0.001)
    finding = found(BASELINE, setup, [r for r in runs if r.cell != ("c",) or r.number < 3])
    (note,) = [note for note in finding.notes if "however large" in note]
    assert note == (
        "With fewer than 4 seeds no difference among 7 comparisons can be shown, however large: "
        "c (3)."
    )
    assert outcomes(finding)["b"] == "better"


def test_many_comparisons_have_more_draws():
    """With 5,000 draws the smallest p-value, times 435 pairs of 30 arms, is 0.087."""
    setup = setup_of({"arm": [f"{place:02}" for place in range(30)]})
    finding = found(Compare(), setup, noisy(setup, [0.9] * 29 + [0.99], noise=0.001))
    assert finding.facts["compared"] == 435
    assert {each["worse"] for each in finding.facts["comparisons"]} == {True}


def test_numbers_are_as_exact_as_their_intervals():
    assert mean_and_ends(Interval(0.00123, -0.00612, 0.00891, 8), True) == "+0.001 [-0.006, +0.009]"
    assert mean_and_ends(Interval(12345.0, 11620.0, 13090.0, 8)) == "12300 [11600, 13100]"
    assert mean_and_ends(Interval(0.5, 0.5, 0.5, 8)) == "0.5 [0.5, 0.5]"
    assert mean_and_ends(Interval(0.123456, None, None, 2), True) == "+0.123 (no interval: 2 seeds)"
    assert mean_and_ends(Interval(None, None, None, 0)) == "—"
