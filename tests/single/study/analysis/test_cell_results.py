"""Results by cell: values, failures, best settings and the edges of searched ranges."""

import dataclasses

import pytest
from support.simulated_studies import LR, repetitions, setup_of, trials

from hvdlarge.study.analysis.cells import by_cell, edge_of, edge_sentence, groups, label_of
from hvdlarge.study.results import Range

LINEAR = Range(1.0, 11.0, False)


@pytest.mark.parametrize(
    ("value", "searched", "end"),
    [
        (0.01, LR, "lower"),
        (0.0114, LR, "lower"),  # 2 % of three decades: a factor of 1.148
        (0.0116, LR, None),
        (8.6, LR, None),
        (8.75, LR, "upper"),
        (10.0, LR, "upper"),
        (1.19, LINEAR, "lower"),
        (1.21, LINEAR, None),
        (10.79, LINEAR, None),
        (10.81, LINEAR, "upper"),
        (0.0, Range(0.0, 1.0, False), None),  # no key can be below 0
        (1.0, Range(0.0, 1.0, False), "upper"),
        (0.5, Range(0.5, 0.5, False), None),
        (True, LR, None),
        ("auto", LR, None),
    ],
)
def test_edges(value, searched, end):
    found = edge_of("lr.base", value, searched)
    assert (None if found is None else found.end) == end


def test_cells_that_use_settings_tuned_elsewhere_have_their_edges():
    setup = setup_of({"batch.base": [32, 64]})
    first, second = setup.cells
    setup = dataclasses.replace(
        setup, ranges={first: {"lr.base": LR}}, tuned_at={first: first, second: first}
    )
    cells = by_cell(setup, trials(first, [(9.9, 0.9), (1.0, 0.8)]))
    assert cells[second].settings == {"lr.base": 9.9}
    assert edge_sentence(cells[second]) == (
        "batch.base 32 has lr.base 9.9, near the upper end of its range, 10"
    )
    at_end = by_cell(setup, trials(first, [(10.0, 0.9)]))[first]
    assert edge_sentence(at_end) == "batch.base 32 has lr.base 10, the upper end of its range"


def test_best_settings_are_those_of_the_repetitions_or_else_of_the_best_trial():
    for lower, best in ((False, 2.0), (True, 0.3)):
        setup = setup_of({"arm": ["a"]}, lower=lower)
        runs = trials(("a",), [(0.3, 0.1), (2.0, 0.9), (5.0, None)])
        assert by_cell(setup, runs)[("a",)].settings == {"lr.base": best}
        runs += repetitions(("a",), [0.5], lr=0.7)
        assert by_cell(setup, runs)[("a",)].settings == {"lr.base": 0.7}


def test_failures_are_counted_and_values_that_are_not_finite_are_failures():
    setup = setup_of({"arm": ["a"]})
    found = by_cell(setup, repetitions(("a",), [0.5, None, float("nan"), 0.7]))[("a",)]
    assert (dict(found.values), found.failures, found.mean) == ({0: 0.5, 3: 0.7}, 2, 0.6)


def test_results_of_unknown_cells_are_left_out_and_order_does_not_matter():
    setup = setup_of({"arm": ["a", "b"]})
    runs = repetitions(("a",), [0.1, 0.2]) + repetitions(("gone",), [0.3])
    assert by_cell(setup, runs) == by_cell(setup, runs[::-1])
    assert by_cell(setup, runs)[("b",)].mean is None


def test_labels_and_groups():
    setup = setup_of({"batch.base": [32, 64], "arm": ["a", "b"]})
    assert label_of(setup, ("32", "a")) == "batch.base 32, a"
    assert label_of(setup, ("32", "a"), without=["arm"]) == "batch.base 32"
    assert label_of(setup_of({}), ()) == "simulated"
    assert groups(setup, ["arm"]) == {
        ("32",): [("32", "a"), ("32", "b")],
        ("64",): [("64", "a"), ("64", "b")],
    }
