"""`hvdlarge report` of a study: whatever has ended, in words, as JSON, or as one page."""

import json

import pytest
from support.simulated_studies import repetitions, setup_of

from hvdlarge.report import main
from hvdlarge.study.folder import RunName, StudyFolder, write_setup


@pytest.fixture
def study(tmp_path):
    setup = setup_of({"arm": ["one", "two"]}, seeds=4)
    folder = StudyFolder(tmp_path / "simulated")
    folder.open({"name": "simulated", "cells": {}, "seeds": []}, extend=False)
    write_setup(folder.path, setup, [{"kind": "compare"}])
    values = {"one": [0.9, 0.91, 0.92, 0.905], "two": [0.8, 0.81, None, 0.805]}
    for arm, each in values.items():
        for result in repetitions((arm,), each):
            folder.write_record(RunName(arm, result.kind, result.number), result)
    return folder.path


def test_one_page_with_a_figure(study, capsys):
    assert main([str(study)]) == 0
    page = (study / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "data:image/png;base64," in page
    (picture,) = (study / "report").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "two" in capsys.readouterr().out


def test_by_its_name_in_runs(study, monkeypatch, capsys):
    study.parent.joinpath("runs").mkdir()
    study.rename(study.parent / "runs" / "simulated")
    monkeypatch.chdir(study.parent)
    assert main(["simulated", "--text"]) == 0
    assert "simulated" in capsys.readouterr().out
    assert not (study.parent / "runs/simulated/report.html").exists()


def test_as_json(study, capsys):
    assert main([str(study), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ended"] == 8
    assert found["findings"][0]["kind"] == "compare"


def test_a_study_that_has_just_begun_has_a_report(study, capsys):
    for path in (study / "runs").glob("*/*.json"):
        path.unlink()
    assert main([str(study)]) == 0
    assert (study / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["another"], "has no further runs or studies"),
        (["--target", "accuracy=0.9"], "has no --target"),
        (["--watch", "5"], "has no --watch"),
        (["--out", "page.txt"], "must end with .html"),
        (["--out", "/nowhere/page.html"], "does not exist"),
    ],
)
def test_what_a_study_has_not_is_refused(study, more, message, capsys):
    assert main([str(study), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_report_that_cannot_be_written_hides_no_verdict(study, capsys):
    """As on a full disk: exit code 74, with the words for `hvdlarge study` too, which has no --out."""
    (study / "report.html").mkdir()
    assert main([str(study)]) == 74
    printed = capsys.readouterr()
    assert "Against one, the best mean" in printed.out
    assert f"the report {study}/report.html could not be written (Is a directory)" in printed.err
    assert "bytes are free there; the results are in" in printed.err
    assert f"`hvdlarge report {study} --out FILE`" in printed.err
    out = study.parent / "elsewhere.html"
    assert main([str(study), "--out", str(out)]) == 0
    assert out.exists()
    out.with_suffix("").rename(study.parent / "moved")
    out.with_suffix("").write_text("a file where the figures would go")
    assert main([str(study), "--out", str(out)]) == 74


def test_a_damaged_setup_is_named(study, capsys):
    (study / "setup.json").write_text('{"setup": {}, "analysis": []}')
    assert main([str(study)]) == 2
    assert "setup.json is damaged" in capsys.readouterr().err
    write_setup(study, setup_of({"arm": ["one"]}), [{"kind": "compare", "confidenc": 2}])
    assert main([str(study)]) == 2
    assert "another version of hvdlarge" in capsys.readouterr().err
