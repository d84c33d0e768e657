"""The analysis `lr_range`: known ranges lie between the least and the most width."""

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
    assert fact["least_width"] <= width + 1e-9
    assert width <= fact["most_width"] + 1e-9
    assert fact["most_width"] - fact["least_width"] <= 2 * 3 / 39 + 1e-9  # two gaps of the grid
    assert fact["bad_inside"] == 0


def test_a_wider_range_is_told_beyond_the_gaps():
    setup = setup_of({"arm": ["momentum", "lars"]})
    rates = np.geomspace(0.01, 10, 24)
    runs = trials(("momentum",), bowl(rates, 0.3, 0.6)) + trials(("lars",), bowl(rates, 0.5, 1.5))
    assert "lars has the widest range" in found(setup, runs).verdict
    close = trials(("momentum",), bowl(rates, 0.3, 1.4)) + trials(("lars",), bowl(rates, 0.5, 1.5))
    assert "undecided" in found(setup, close).verdict


def test_diverged_trials_bound_the_range_and_are_counted():
    setup = setup_of({"arm": ["a"]})
    runs = trials(
        ("a",), [(0.1, 0.5), (0.2, 0.9), (0.4, None), (0.5, 0.9), (1.0, None), (2.0, None)]
    )
    finding = found(setup, runs)
    fact = finding.facts["ranges"][0]
    assert (fact["below"], fact["low"], fact["high"], fact["above"]) == (0.1, 0.2, 0.5, 1.0)
    assert (fact["bad_inside"], fact["failed"], fact["good"], fact["trials"]) == (1, 3, 2, 6)


def test_a_range_without_bad_trials_beside_it_is_open():
    setup = setup_of({"arm": ["a"]})
    finding = found(setup, trials(("a",), [(0.1, 0.9), (1.0, 0.9), (2.0, 0.1)]))
    assert "at least 1.00 decades, open below" in finding.verdict
    assert finding.facts["ranges"][0]["most_width"] is None


def test_ranges_on_a_linear_scale_have_the_unit_of_the_key():
    setup = setup_of({"arm": ["a"]})
    setup = dataclasses.replace(setup, ranges={("a",): {"lr.base": Range(0.0, 3.0, False)}})
    fact = found(setup, trials(("a",), [(0.0, 0.1), (1.0, 0.9), (2.0, 0.9), (3.0, 0.1)])).facts
    assert (fact["ranges"][0]["least_width"], fact["ranges"][0]["most_width"]) == (1.0, 3.0)


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
    assert same.facts["ranges"][0]["least_width"] == 0
