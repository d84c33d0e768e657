"""The analysis `lr_range`: known ranges lie between the minimum and the maximum width."""

import dataclasses
import json

import numpy as np
import pytest
from support.simulated_studies import setup_of, trials

from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.lr_range import lr_range
from hvdlarge.study.analysis.sections import LrRange
from hvdlarge.study.results import Range

SECTION = LrRange(within=0.02)


def bowl(rates, best, width, lower=False):
    """A parabola in log10(rate) that loses 0.02 at half the width from its best."""
    sign = 1 if lower else -1
    return [(r, float(0.9 + sign * 0.02 * (np.log10(r / best) / (width / 2)) ** 2)) for r in rates]


def found(setup, runs, section=SECTION):
    finding = lr_range(section, setup, by_cell(setup, runs))
    json.dumps(finding.facts, allow_nan=False)
    assert len({len(row) for row in finding.table}) <= 1
    return finding


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("width", [0.6, 1.0, 1.7])
def test_the_width_of_a_bowl_is_bracketed(width, lower):
    setup = setup_of({"arm": ["a"]}, lower=lower)
    rates = np.geomspace(0.01, 10, 40)
    fact = found(setup, trials(("a",), bowl(rates, rates[20], width, lower))).facts["ranges"][0]
    assert fact["minimum_width"] <= width + 1e-9
    assert width <= fact["maximum_width"] + 1e-9
    assert (
        fact["maximum_width"] - fact["minimum_width"] <= 2 * 3 / 39 + 1e-9
    )  # two gaps of the grid
    assert fact["isolated"] == 0


def test_a_wider_range_is_told_beyond_the_gaps():
    setup = setup_of({"arm": ["momentum", "lars"]})
    rates = np.geomspace(0.01, 10, 24)
    runs = trials(("momentum",), bowl(rates, 0.3, 0.6)) + trials(("lars",), bowl(rates, 0.5, 1.5))
    verdict = found(setup, runs).verdict
    assert verdict.startswith("Range of lr.base (one seed): momentum 0.2")
    assert verdict.endswith("; lars widest.")
    close = trials(("momentum",), bowl(rates, 0.3, 1.4)) + trials(("lars",), bowl(rates, 0.5, 1.5))
    assert found(setup, close).verdict.endswith("; widest undecided: momentum and lars.")


def test_diverged_trials_bound_the_range_and_are_counted():
    setup = setup_of({"arm": ["a"]})
    runs = trials(
        ("a",), [(0.1, 0.5), (0.2, 0.9), (0.4, 0.9), (0.5, 0.89), (1.0, None), (2.0, None)]
    )
    finding = found(setup, runs)
    fact = finding.facts["ranges"][0]
    assert (fact["below"], fact["low"], fact["high"], fact["above"]) == (0.1, 0.2, 0.5, 1.0)
    assert (fact["isolated"], fact["failed"], fact["good"], fact["trials"]) == (0, 2, 3, 6)


def test_the_range_is_the_unbroken_stretch_around_the_best():
    setup = setup_of({"arm": ["a"]})
    values = [(0.1, 0.89), (0.2, None), (0.4, 0.89), (0.5, 0.9), (1.0, 0.5), (2.0, 0.89)]
    fact = found(setup, trials(("a",), values)).facts["ranges"][0]
    assert (fact["below"], fact["low"], fact["high"], fact["above"]) == (0.2, 0.4, 0.5, 1.0)
    assert (fact["isolated"], fact["good"]) == (2, 2)
    assert fact["maximum_width"] == pytest.approx(np.log10(1.0 / 0.2))


def test_an_arm_that_is_bad_at_any_rate_is_not_compared():
    """At chance all rates are as good as the best: a wide range that means nothing."""
    setup = setup_of({"arm": ["chance", "lars", "sgd"]})
    rates = np.geomspace(0.01, 10, 24)
    runs = trials(("chance",), [(rate, 0.1) for rate in rates])
    runs += trials(("lars",), bowl(rates, 0.5, 1.5)) + trials(("sgd",), bowl(rates, 0.3, 0.6))
    verdict = found(setup, runs).verdict
    assert "lars widest; not compared, worse at best: chance (0.1)." in verdict
    assert (
        "chance 0.01 to 10 (at least 3.00 decades, unbounded below and above, best 0.1)" in verdict
    )


def test_batches_are_compared_separately_unless_the_section_says_otherwise():
    setup = setup_of({"batch.base": [32, 64, 128], "arm": ["lars", "sgd"]})
    rates = np.geomspace(0.01, 10, 24)
    runs = []
    for batch, arm in setup.cells:
        width = 1.7 if arm == "lars" else 0.6 + (batch == "128")
        runs += trials((batch, arm), bowl(rates, 0.3, width))
    verdict = found(setup, runs).verdict
    assert verdict.startswith("Range of lr.base (one seed). At batch.base 32: lars 0.0")
    assert " widest. At 64: lars 0.0" in verdict
    assert verdict.endswith(" widest. At 128: widest undecided: lars and sgd.")
    together = LrRange(within=0.02, separately=[])
    assert found(setup, runs, together).verdict.count("At ") == 0
    by_arm = LrRange(within=0.02, separately=["arm"])
    assert "At lars: widest undecided: batch.base 32," in found(setup, runs, by_arm).verdict


def test_trials_that_have_not_ended_are_said():
    setup = setup_of({"arm": ["a", "b"]}, trials=4)
    runs = trials(("a",), [(0.1, 0.5), (0.2, 0.9), (0.4, 0.9)])
    runs += trials(("b",), [(0.1, 0.5), (0.2, 0.9), (0.4, 0.9), (0.5, 0.9)])
    assert "Trials that have not ended yet: a (3 of 4)." in found(setup, runs).notes


def test_a_range_without_bad_trials_beside_it_is_unbounded():
    setup = setup_of({"arm": ["a"]})
    finding = found(setup, trials(("a",), [(0.1, 0.9), (1.0, 0.9), (2.0, 0.1)]))
    assert "at least 1.00 decades, unbounded below" in finding.verdict
    assert finding.facts["ranges"][0]["maximum_width"] is None


def test_ranges_on_a_linear_scale_have_the_unit_of_the_key():
    setup = setup_of({"arm": ["a"]})
    setup = dataclasses.replace(setup, ranges={("a",): {"lr.base": Range(0.0, 3.0, False)}})
    fact = found(setup, trials(("a",), [(0.0, 0.1), (1.0, 0.9), (2.0, 0.9), (3.0, 0.1)])).facts
    assert (fact["ranges"][0]["minimum_width"], fact["ranges"][0]["maximum_width"]) == (1.0, 3.0)


def test_a_trial_exactly_within_is_good():
    setup = setup_of({"arm": ["a"]})
    fact = found(setup, trials(("a",), [(0.1, 0.88), (0.2, 0.9), (0.4, 0.879)])).facts["ranges"][0]
    assert fact["low"] == 0.1


def test_unfinished_studies():
    setup = setup_of({"arm": ["a", "b"]})
    assert "no range" in found(setup, []).verdict
    assert "no range" in found(setup, trials(("a",), [(0.1, None)] * 9)).verdict
    finding = found(setup, trials(("a",), [(0.1, 0.5), (0.2, 0.9), (0.4, None)]))
    assert any("none finished: b" in note for note in finding.notes)
    untuned = setup_of({"arm": ["a"]}, tuned=False)
    assert "Not tuned over lr.base themselves: a." in found(untuned, []).notes
    same = found(setup, trials(("a",), [(0.1, 0.5)] * 4))
    assert same.facts["ranges"][0]["minimum_width"] == 0


def test_many_cells_have_a_panel_for_each_group_and_one_of_all_ranges():
    setup = setup_of({"batch.base": [32, 64, 128], "arm": ["momentum", "lars", "lamb"]})
    rates = np.geomspace(0.01, 10, 12)
    runs = [run for cell in setup.cells for run in trials(cell, bowl(rates, rates[6], 1.0))]
    *groups, all_ranges = found(setup, runs).plot.panels
    assert [panel.title for panel in groups] == [f"batch.base {b}" for b in (32, 64, 128)]
    for panel in groups:
        assert [series.label for series in panel.series] == ["momentum", "lars", "lamb"]
    assert len(all_ranges.names) == len(all_ranges.series) == 9
    assert [series.style for series in all_ranges.series] == [0, 1, 2] * 3  # as in the curves
    few = [run for run in runs if run.cell[0] != "128"]
    assert len(found(setup, few).plot.panels) == 2
