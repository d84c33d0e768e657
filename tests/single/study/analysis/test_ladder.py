"""The analysis `ladder`: what each step adds is found, and what a broken step means is said."""

import dataclasses
import json

import numpy as np
import pytest
from support.simulated_studies import noisy, repetitions, setup_of

from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.intervals import p_value
from hvdlarge.study.analysis.ladder import ladder
from hvdlarge.study.analysis.sections import Ladder

SECTION = Ladder(factor="recipe")
STEPS = ["plain", "warmup", "lars", "smoothing"]


def found(setup, runs, section=SECTION):
    finding = ladder(section, setup, by_cell(setup, runs))
    json.dumps(finding.facts, allow_nan=False)
    assert len({len(row) for row in finding.table}) <= 1
    return finding


def test_what_each_step_adds():
    setup = setup_of({"recipe": STEPS})
    finding = found(setup, noisy(setup, [0.5, 0.6, 0.8, 0.75], noise=0.004, shared=0.05))
    adds = [each["gain"]["mean"] for each in finding.facts["steps"]]
    assert adds == pytest.approx([0.1, 0.2, -0.05], abs=0.006)
    assert [each["outcome"] for each in finding.facts["steps"]] == ["better", "better", "worse"]
    assert [each["base"] for each in finding.facts["steps"]] == [[step] for step in STEPS[:-1]]
    whole = finding.facts["whole"][0]
    assert (whole["base"], whole["better"]) == (["plain"], True)
    assert finding.verdict.startswith("2 of 3 steps add something (95 %): warmup +0.1")
    assert ", lars +0.2" in finding.verdict or ", lars +0.1" in finding.verdict
    assert "; smoothing -0.0" in finding.verdict
    assert "worse; all together +0.2" in finding.verdict


def test_equal_steps_add_nothing():
    setup = setup_of({"recipe": STEPS})
    false = 0
    for seed in range(60):
        cells = by_cell(setup, noisy(setup, [0.5] * 4, noise=0.01, seed=seed))
        steps = ladder(SECTION, setup, cells).facts["steps"]
        false += any(each["better"] or each["worse"] for each in steps)
    assert false <= 7  # of 60; 5 % are 3


def test_a_ladder_of_each_batch_from_a_step_on():
    setup = setup_of({"batch.base": [512, 4096], "recipe": STEPS})
    runs = noisy(setup, [0.5, 0.6, 0.7, 0.8] * 2, noise=0.001)
    finding = found(setup, runs, Ladder(factor="recipe", steps=STEPS[1:]))
    assert len(finding.facts["steps"]) == 4
    assert "At batch.base 512: 2 of 2 steps add something (95 %): lars +0." in finding.verdict
    assert len(finding.plot.panels[0].series) == 2


def test_the_steps_are_those_that_are_named_in_their_order():
    setup = setup_of({"recipe": [*STEPS, "control"]})
    runs = noisy(setup, [0.5, 0.6, 0.8, 0.75, 0.9], noise=0.004)
    finding = found(setup, runs, Ladder(factor="recipe", steps=["lars", "plain", "warmup"]))
    facts = finding.facts["steps"]
    assert [(each["base"], each["arm"]) for each in facts] == [
        (["lars"], ["plain"]),
        (["plain"], ["warmup"]),
    ]
    assert [each["outcome"] for each in facts] == ["worse", "better"]
    assert [row[1] for row in finding.table[1:]] == ["lars", "plain", "warmup"]


def test_a_step_that_the_study_excludes_is_not_credited_to_the_next():
    setup = setup_of({"batch.base": [512, 4096], "recipe": STEPS})
    cells = tuple(c for c in setup.cells if c not in (("512", "warmup"), ("4096", "smoothing")))
    setup = dataclasses.replace(setup, cells=cells)
    finding = found(setup, noisy(setup, [0.5, 0.7, 0.8, 0.5, 0.6, 0.7], noise=0.001))
    assert "At batch.base 512: 2 of 2 steps add something (95 %): lars over plain +0.2" in (
        finding.verdict
    )
    assert "At batch.base 4096: 2 of 2 steps add something (95 %): warmup +0.1" in finding.verdict
    assert finding.verdict.count(" over ") == 1
    assert [row[1] for row in finding.table[1:]] == [
        "plain", "lars over plain", "smoothing", "plain", "warmup", "lars"]  # fmt: skip
    assert finding.notes[2:] == [
        "batch.base 512, lars is compared with plain, as the study leaves out warmup there: what it "
        "adds includes what these would."
    ]
    assert finding.plot.panels[0].names == tuple(STEPS)


def test_more_ladders_have_shorter_verdicts():
    setup = setup_of({"batch.base": [1, 2, 4], "recipe": ["a", "b", "c"]})
    verdict = found(setup, noisy(setup, [0.5, 0.5, 0.9] * 3, noise=0.01, seed=1)).verdict
    assert "b +" not in verdict
    assert verdict.count("1 of 2 steps adds something (95 %): c +0.") == 3


def test_a_step_that_fails():
    setup = setup_of({"recipe": STEPS[:3]})
    spread = 0.001 * np.arange(8) ** 2
    runs = repetitions(("plain",), 0.5 + spread) + repetitions(("warmup",), [None] * 8)
    runs += repetitions(("lars",), [*(0.8 + spread[:7]), None])
    finding = found(setup, runs)
    assert "not comparable: warmup (8 of 8 failed)" in finding.verdict
    assert not finding.facts["whole"][0]["better"]
    assert finding.verdict.endswith("Failed: lars (1 of 8).")


def test_an_edge_makes_its_steps_void():
    setup = setup_of({"recipe": STEPS[:3]})
    runs = repetitions(("plain",), [0.1, 0.2, 0.3]) + repetitions(
        ("warmup",), [0.3, 0.4, 0.6], lr=10.0
    )
    finding = found(setup, [*runs, *repetitions(("lars",), [0.4, 0.6, 0.7])])
    assert [each["outcome"][:4] for each in finding.facts["steps"]] == ["void", "void"]
    assert finding.verdict.count("upper end of its range") == 1
    assert "; 2 steps void" in finding.verdict


def test_unfinished_studies():
    setup = setup_of({"recipe": STEPS})
    finding = found(setup, repetitions(("lars",), [0.5] * 8))
    assert finding.verdict.endswith("not comparable: no repetition yet.")
    assert "no repetition of warmup yet" in {row[-1] for row in finding.table}
    finding = found(setup, [])
    assert finding.plot is None
    assert "no repetition" in finding.verdict
    assert found(setup, [run for c in setup.cells for run in repetitions(c, [None] * 2)]).verdict


def test_p_values_are_corrected_for_all_steps_those_that_have_not_ended_too():
    setup = setup_of({"recipe": STEPS})
    runs = noisy(setup, [0.5, 0.502, 0.504, 0.5], noise=0.002)
    of_all = found(setup, runs).facts["steps"][0]["p"]
    first = found(setup, [r for r in runs if r.cell[0] in ("plain", "warmup")]).facts["steps"][0]
    alone = p_value(
        [b.value - a.value for a, b in zip(runs[:8], runs[8:16], strict=True)], precise=False
    )
    assert first["p"] == pytest.approx(3 * alone)
    assert of_all <= first["p"]
