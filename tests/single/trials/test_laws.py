"""A minute of the laws' trial: jobs drawn at random, always the same ones, and every case that once broke a law."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from trials import laws
from trials.cases import cases
from trials.judge import Verdict

FOUND = sorted((Path(__file__).parents[3] / "trials" / "found").glob("*.json"))


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.stem)
def test_what_once_broke_a_law_holds_now(file):
    found = json.loads(file.read_text(encoding="utf-8"))
    verdict = laws.judge_on_threads(found["case"])
    assert verdict.kind == found["verdict"], verdict.reason


def test_jobs_drawn_at_random_hold_the_laws(tmp_path):
    # All of them, however slow the machine: pytest's own limit ends what hangs
    tally = laws.Tally(tmp_path / "found.jsonl", shrink_seconds=0, until=time.monotonic() + 10_000)
    tally.draw(120, seed=2017, judged=laws.judge_on_threads)
    assert not tally.violations, "\n".join(tally.lines(1))
    assert tally.jobs == 120
    assert tally.kinds["held"] >= 70
    assert all(
        tally.laws[law] >= least
        for law, least in {"0 reference": 70, "1 world": 40, "2 resume": 20, "3 exact": 8}.items()
    )
    assert tally.kinds["refused"] >= 5
    assert tally.kinds["chaotic"] <= 12


@settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_every_case_is_plain_json(case):
    assert json.loads(json.dumps(case)) == case


# --- the tally


def never():
    return time.monotonic() + 60


def test_a_violation_is_made_smaller_and_written_down(tmp_path):
    def judged(case):
        bad = case["workers"] > 1 and len(case["job"]["model"]["args"]["blocks"]) > 1
        return (
            Verdict("violation", [], f"law 1 world: differs by {case['seed']}")
            if bad
            else Verdict("held", ["0 reference"])
        )

    tally = laws.Tally(tmp_path / "found.jsonl", shrink_seconds=20, until=never())
    tally.draw(40, seed=1, judged=judged)
    (violation,) = tally.violations.values()
    assert violation["case"]["workers"] == 2
    assert violation["case"]["seed"] == 0
    assert violation["case"]["job"]["model"]["args"]["blocks"] == [{"kind": "linear"}] * 2
    written = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert written[-1] == violation
    assert tally.jobs == 40
    assert tally.kinds["violation"] == sum(tally.times.values()) > 1


def test_kinds_of_violations_are_told_apart(tmp_path):
    def judged(case):
        return Verdict(
            "violation", [], f"law {case['workers'] % 2} world: a.{case['seed']} differs"
        )

    tally = laws.Tally(tmp_path / "found.jsonl", shrink_seconds=0, until=never())
    tally.draw(30, seed=1, judged=judged)
    assert sorted(tally.violations) == ["law # world: # differs"] or len(tally.violations) == 1


def test_time_is_kept(tmp_path):
    tally = laws.Tally(tmp_path / "found.jsonl", shrink_seconds=0, until=time.monotonic() - 1)
    tally.draw(30, seed=1, judged=lambda case: Verdict("held"))
    assert tally.jobs == 0


def test_tallies_of_processes_are_put_together(tmp_path):
    tallies = []
    for number in range(2):
        tally = laws.Tally(tmp_path / "found.jsonl", shrink_seconds=0, until=never())
        tally.draw(
            5,
            seed=number,
            judged=lambda case, number=number: (
                Verdict("violation", [], f"of process {'ab'[number]}")
                if number
                else Verdict("held", ["0"])
            ),
        )
        tallies.append(tally)
    tallies[0].add(tallies[1])
    assert (tallies[0].jobs, tallies[0].kinds["held"], tallies[0].kinds["violation"]) == (10, 5, 5)
    assert tallies[0].laws["0"] == 5
    assert list(tallies[0].violations) == ["of process b"]
    assert "VIOLATION (5 times) of process b" in "\n".join(tallies[0].lines(1.0))
