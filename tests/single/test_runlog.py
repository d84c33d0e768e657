import json
import os

import pytest

from hvdlarge.controller import Controller
from hvdlarge.exits import CannotSave, JobError
from hvdlarge.job import read_job
from hvdlarge.runlog import RunLog, make_run_folder


@pytest.fixture
def plan():
    return read_job("jobs/digits.yaml").plan(1437, 2)


def begin(folder, plan):
    job = folder.parent / "given.yaml"
    job.write_text("name: given\n")
    return RunLog.begin(folder, job, "name: resolved\n", {"world_size": 2}, plan)


def test_a_run_folder_holds_what_it_promises(tmp_path, plan, capsys):
    (tmp_path / "deep").mkdir()
    log = begin(tmp_path / "deep" / "run", plan)
    decisions = list(iter(Controller(plan).decide, None))
    for decision in decisions:
        log.decision(decision)
    log.metrics({"step": 0, "loss": 1.0})
    log.finish({"loss": 0.5, "accuracy": 0.99}, {})
    log.close()
    folder = tmp_path / "deep" / "run"
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "job.yaml", "job.resolved.yaml", "environment.json", "metrics.jsonl", "decisions.jsonl", "summary.json", "checkpoints",
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    assert len(lines) == len(decisions)
    assert [line["grew_from"] for line in lines if "grew_from" in line] == [32, 64, 128, 256]
    assert lines[0]["lr"] == decisions[0].lr
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["accuracy"], summary["steps"], summary["growths"], summary["samples_seen"]) == (0.99, 524, 4, 43110)
    assert "accuracy 0.9900" in capsys.readouterr().out


def test_an_earlier_run_is_set_aside_and_never_overwritten(tmp_path, plan):
    for number in range(3):
        log = begin(tmp_path / "run", plan)
        log.close()
        (tmp_path / "run" / "mark").write_text(str(number))
        assert log.set_aside == (None if number == 0 else str(tmp_path / f"run.{number}"))
    assert [(tmp_path / name / "mark").read_text() for name in ("run.1", "run.2", "run")] == ["0", "1", "2"]


def test_a_second_run_of_the_same_name_is_refused_while_the_first_goes_on(tmp_path, plan):
    log = begin(tmp_path / "run", plan)
    with pytest.raises(JobError, match=f"in use by process {os.getpid()} on "):
        begin(tmp_path / "run", plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.yaml", "run"]
    log.metrics({"step": 0})
    log.close()
    begin(tmp_path / "run", plan).close()


def test_what_is_not_finite_is_still_json(tmp_path, plan):
    log = begin(tmp_path / "run", plan)
    log.metrics({"step": 0, "loss": float("nan"), "lr": float("inf")})
    log.close()
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text()) == {"step": 0, "loss": "nan", "lr": "inf"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(JobError, match="holds no run"):
        make_run_folder(tmp_path / "run")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="cannot be made"):
        make_run_folder(tmp_path / "file")
    with pytest.raises(JobError, match="cannot be made"):
        make_run_folder(tmp_path / "file" / "below")


def test_progress_lines_are_rate_limited(tmp_path, plan, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("hvdlarge.runlog.time.monotonic", lambda: now)
    log = begin(tmp_path / "run", plan)
    for decision in iter(Controller(plan).decide, None):
        now += 1.0
        log.progress(decision, decision.samples_seen + decision.global_batch, 0.1)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert 10 < len(lines) < 40
    assert "samples/s" in lines[0]
    assert lines[0].startswith("epoch ")
    assert lines[0].endswith("left")


class Unsaveable:
    """Stands for a disk that fails in the middle of a file."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    from hvdlarge.checkpoint import save

    target = tmp_path / "last.pt"
    save(target, {"model": {}, "step": 1})
    before = target.read_bytes()
    with pytest.raises(CannotSave, match="bytes are free"):
        save(target, {"model": {"weight": Unsaveable()}})
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]
