"""`studies/publish.py --check`: a repetition of a study against its published results."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from support.simulated_studies import noisy, setup_of

from hvdlarge.study.folder import RunName, StudyFolder, record_json, write_setup

PROGRAM = Path(__file__).parents[4] / "studies" / "publish.py"
SETUP = setup_of({"arm": [*"abcdef"]})
MEANS = [0.9, 0.91, 0.92, 0.93, 0.94, 0.95]


@pytest.fixture(scope="module")
def publish():
    spec = importlib.util.spec_from_file_location("publish", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(publish, tmp_path, monkeypatch, capsys):
    """Compares results with published ones: the exit code, and what was printed."""
    monkeypatch.setattr(publish, "PAGES", tmp_path)

    def run(published, repeated, name="study", setup=SETUP):
        lines = "".join(record_json(each) for each in published)
        (tmp_path / f"{SETUP.name}.jsonl").write_text(lines)
        folder = StudyFolder(tmp_path / name)
        folder.open({"name": SETUP.name, "cells": {}, "seeds": []}, extend=False)
        write_setup(folder.path, setup, [])
        for each in repeated:
            folder.write_record(RunName(each.cell[0], each.kind, each.number), each)
        return publish.check(folder.path), capsys.readouterr().out

    return run


def test_the_same_results_are_reproduced_but_for_rounding(check):
    runs = noisy(SETUP, MEANS, noise=0.01)
    same = [dataclasses.replace(run, value=run.value + 1e-12) for run in runs]
    code, text = check(runs, same)
    assert code == 0
    assert "6 cells compared, 0 not reproduced, 0 not repeated; 6 new means in the" in text


def test_point_intervals_hold_their_value_but_for_rounding(check):
    runs = [dataclasses.replace(run, value=0.1) for run in noisy(SETUP, MEANS)]
    code, text = check(runs, [dataclasses.replace(run, value=0.1 + 1e-16) for run in runs])
    assert (code, text.count("inside")) == (0, 6)


def test_a_cell_that_differs_is_named(check):
    runs = noisy(SETUP, MEANS, noise=0.01)
    other = noisy(SETUP, [*MEANS[:3], 0.9, *MEANS[4:]], noise=0.01, seed=2)
    code, text = check(runs, other)
    assert code == 1
    assert [line[0] for line in text.splitlines() if "NOT REPRODUCED, p" in line] == ["d"]
    assert "1 not reproduced" in text


def test_cells_with_fewer_finished_repetitions_are_not_reproduced(check):
    runs = noisy(SETUP, MEANS, noise=0.01)
    fewer = [r for r in runs if r.cell != ("b",) and (r.cell, r.number) != (("c",), 3)]
    code, text = check(runs, fewer)
    assert code == 1
    assert "b: no mean, published" in text
    assert "NOT REPRODUCED, 0 of 8 repetitions finished" in text
    assert "NOT REPRODUCED, 7 of 8 repetitions finished" in text
    assert "2 not reproduced" in text


def test_what_was_not_published_is_said(check):
    runs = noisy(SETUP, MEANS, noise=0.01)
    code, text = check([run for run in runs if run.cell != ("f",)], runs)
    assert (code, "f: new, not published" in text) == (0, True)
    failed = [r if r.cell != ("f",) else dataclasses.replace(r, state="failed") for r in runs]
    code, text = check(failed, runs, "failed")
    assert (code, "f: no published repetition finished" in text) == (0, True)
    assert check([], runs, "nothing")[0] == 1


def of_cells(arms):
    return dataclasses.replace(SETUP, cells=tuple((arm,) for arm in arms))


def test_a_repetition_of_some_cells_is_checked_and_the_others_are_listed(check):
    runs = noisy(SETUP, MEANS, noise=0.01)
    some = [run for run in runs if run.cell[0] in "ac"]
    code, text = check(runs, some, setup=of_cells("ac"))
    assert code == 0
    lines = text.splitlines()
    assert [line[0] for line in lines if line.endswith(": published, not repeated")] == [*"bdef"]
    assert "2 cells compared, 0 not reproduced, 4 not repeated" in lines[-1]
    changed = [dataclasses.replace(run, value=run.value + 0.1) for run in some]
    assert check(runs, changed, "changed", of_cells("ac"))[0] == 1


def test_a_study_that_repeats_no_published_cell_reproduces_nothing(check):
    runs = noisy(SETUP, MEANS, noise=0.01)
    code, text = check([r for r in runs if r.cell < ("c",)], runs[-8:], setup=of_cells("f"))
    assert (code, text.count("not repeated\n"), "f: new, not published" in text) == (1, 2, True)


def test_repetitions_are_paired_by_seed_not_by_number(check):
    runs = noisy(SETUP, MEANS, noise=0.01)
    moved = [dataclasses.replace(run, number=7 - run.number) for run in runs]
    assert check(runs, moved)[0] == 0
    other = [dataclasses.replace(run, seed=run.seed + 100) for run in runs]
    code, text = check(runs, other, "other")
    assert code == 1
    assert text.count("0 of 8 repetitions finished with the published seeds") == 6


@pytest.fixture
def study(publish, tmp_path, monkeypatch):
    """A finished study beside its page, which has trials and a figure of before."""
    monkeypatch.setattr(publish, "PAGES", tmp_path / "pages")
    publish.PAGES.mkdir()
    (publish.PAGES / "simulated.md").write_text(f"above {publish.BEGIN} {publish.END} below")
    (publish.PAGES / "simulated.jsonl").write_text("before")
    (publish.PAGES / "simulated-1-old.png").write_text("before")
    folder = StudyFolder(tmp_path / "study")
    folder.open({"name": SETUP.name, "cells": {}, "seeds": []}, extend=False)
    write_setup(folder.path, SETUP, [{"kind": "compare"}])
    for each in noisy(SETUP, MEANS, noise=0.01):
        folder.write_record(RunName(each.cell[0], each.kind, each.number), each)
    return folder.path


def published_by(program, monkeypatch, folder):
    monkeypatch.setattr(program.sys, "argv", ["publish.py", str(folder)])
    return program.main()


def test_a_finished_study_is_published_between_the_marks(publish, study, monkeypatch):
    assert published_by(publish, monkeypatch, study) == 0
    page = (publish.PAGES / "simulated.md").read_text()
    assert page.startswith(f"above {publish.BEGIN}\n\n| arm |")
    assert page.endswith(f"{publish.END} below")
    assert len((publish.PAGES / "simulated.jsonl").read_text().splitlines()) == 48
    assert not (publish.PAGES / "simulated-1-old.png").exists()


@pytest.mark.parametrize("page", ["no marks", "<!-- results --> only", None, "unfinished"])
def test_nothing_is_written_without_marks_or_of_an_unfinished_study(
    publish, study, monkeypatch, page, capsys
):
    path = publish.PAGES / "simulated.md"
    if page is None:
        path.unlink()
    elif page == "unfinished":
        next((study / "runs" / "c").glob("*3.json")).unlink()
    else:
        path.write_text(page)
    before = {each.name: each.read_bytes() for each in publish.PAGES.iterdir()}
    assert published_by(publish, monkeypatch, study) == 2
    assert {each.name: each.read_bytes() for each in publish.PAGES.iterdir()} == before
    error = capsys.readouterr().err
    assert ("c (7 of 8); go on with it" if page == "unfinished" else publish.END) in error


def test_a_study_that_was_not_published_is_said(publish, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publish, "PAGES", tmp_path)
    folder = StudyFolder(tmp_path / "study")
    folder.open({"name": SETUP.name, "cells": {}, "seeds": []}, extend=False)
    write_setup(folder.path, SETUP, [])
    assert publish.check(folder.path) == 1
    assert "nothing of simulated is published" in capsys.readouterr().out


def test_too_few_seeds_are_compared_as_they_are(check):
    runs = [run for run in noisy(SETUP, MEANS, noise=0.01) if run.number < 2]
    assert check(runs, runs)[0] == 0
    code, text = check(runs, [dataclasses.replace(run, value=0.5) for run in runs], "other")
    assert (code, text.count("too few seeds for a test (2)")) == (1, 6)


def test_a_faithful_repetition_seldom_gives_a_false_alarm(publish):
    """Of 200 repetitions of six cells; nominal 5 %. The means leave the intervals in one of seven."""
    false = outside = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        first, second = rng.normal(0.9, 0.01, (2, 6, 8))
        p_values = publish.holm([publish.p_value([*each]) for each in second - first])
        texts = [
            publish._difference([*each], 8, p)
            for each, p in zip(second - first, p_values, strict=True)
        ]
        false += any(texts)
        outside += sum(
            not publish._place(publish.interval([*old], 0.95), [*new])[1]
            for old, new in zip(first, second, strict=True)
        )
    assert false / 200 < 0.08
    assert 0.1 < outside / 1200 < 0.18
