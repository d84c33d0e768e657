import json
import os
import time

import pytest

from hvdlarge.config.job_file import read_job
from hvdlarge.config.validation import RESERVED_RESULTS
from hvdlarge.controller import Controller
from hvdlarge.exits import JobError
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.telemetry.run_folder import (
    FolderLock,
    Sums,
    holds_run,
    make_folder,
    set_aside,
    write_documents,
)
from hvdlarge.telemetry.run_log import RunLog


@pytest.fixture
def plan():
    return read_job("jobs/digits.yaml").plan(1437, 2)


def begin(folder, plan, offsets=None, progress=None):
    job = folder.parent / "given.yaml"
    job.write_text("name: given\n")
    make_folder(folder)
    FolderLock(folder).release()  # refuses a folder that is in use
    progress = progress or RunProgress()
    write_documents(
        folder, job, "name: resolved\n", {"world_size": 2, "versions": {}}, progress, []
    )
    return RunLog(folder, plan, offsets or {}, progress, TrainState())


def test_a_run_folder_holds_what_it_promises(tmp_path, plan, capsys):
    (tmp_path / "deep").mkdir()
    log = begin(tmp_path / "deep" / "run", plan)
    decisions = list(iter(Controller(plan).decide, None))
    for decision in decisions:
        log.decision(decision)
    log.metrics({"step": 0, "loss": 1.0})
    log.finish(
        TrainState(results={"loss": 0.5, "accuracy": 0.99}), at_end(plan), 1000, Sums(4000, 10)
    )
    log.close()
    folder = tmp_path / "deep" / "run"
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "job.yaml", "job.resolved.yaml", "environment.json", "metrics.jsonl", "decisions.jsonl", "summary.json",
        "starts.jsonl",
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    assert len(lines) == len(decisions)
    assert [line["grew_from"] for line in lines if "grew_from" in line] == [32, 64, 128, 256]
    assert lines[0]["lr"] == decisions[0].lr
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["accuracy"], summary["steps"], summary["growths"], summary["samples_seen"]) == (
        0.99,
        524,
        4,
        43110,
    )
    assert "accuracy 0.9900" in capsys.readouterr().out


def test_metrics_are_shown_by_their_names(tmp_path, plan, capsys):
    log = begin(tmp_path / "run", plan)
    log._pause = 0.0
    results = {"loss": 0.5, "test_loss": 0.6, "accuracy": 0.5, "perplexity": 12.0}
    log.evaluated(results)
    log.progress(Controller(plan).decide(), 32, 0.5)
    assert "| loss 0.5000 | accuracy 0.5000 | perplexity 12.0000 |" in capsys.readouterr().out
    log.finish(TrainState(results=results), at_end(plan), 1000, Sums(4000, 10))
    assert "done: accuracy 0.5000, perplexity 12.0000, loss 0.5000" in capsys.readouterr().out
    log.close()


def test_no_metric_may_take_the_name_of_another_figure(tmp_path, plan):
    log = begin(tmp_path / "run", plan)
    log.finish(TrainState(results={"loss": 0.5}), at_end(plan), 1000, Sums(4000, 10))
    log.close()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {name for name in summary if not name.endswith("_seconds")} <= RESERVED_RESULTS


def at_end(plan):
    controller = Controller(plan)
    while controller.decide() is not None:
        pass
    return controller.final_progress()


def test_a_log_goes_on_where_its_checkpoint_was(tmp_path, plan):
    controller = Controller(plan)
    log = begin(tmp_path / "run", plan)
    whole = [controller.decide() for _ in range(400)]
    for decision in whole[:100]:
        log.decision(decision)
        log.metrics({"step": decision.step})
    offsets = log.offsets()
    for decision in whole[100:150]:  # of a part that was killed before it was saved
        log.decision(decision)
        log.metrics({"step": decision.step})
    log.close()
    log = begin(tmp_path / "run", plan, offsets, Controller(plan).progress_after(whole[99]))
    for decision in whole[100:]:
        log.decision(decision)
        log.metrics({"step": decision.step})
    log.close()
    for name in ("decisions", "metrics"):
        lines = [
            json.loads(line) for line in (tmp_path / f"run/{name}.jsonl").read_text().splitlines()
        ]
        assert [line["step"] for line in lines] == list(range(400))
    assert len((tmp_path / "run/starts.jsonl").read_text().splitlines()) == 2


def test_a_summary_when_a_run_goes_on_from_its_end_is_removed(tmp_path, plan):
    log = begin(tmp_path / "run", plan)
    log.finish(TrainState(results={"loss": 0.5}), at_end(plan), 1000, Sums(4000, 10))
    log.close()
    begin(tmp_path / "run", plan, progress=at_end(plan)).close()  # with more epochs
    assert not (tmp_path / "run/summary.json").exists()


def test_an_earlier_run_is_set_aside_and_never_overwritten(tmp_path, plan):
    for number in range(3):
        if number:
            assert set_aside(tmp_path / "run") == tmp_path / f"run.{number}"
        begin(tmp_path / "run", plan).close()
        (tmp_path / "run" / "mark").write_text(str(number))
    assert [(tmp_path / name / "mark").read_text() for name in ("run.1", "run.2", "run")] == [
        "0",
        "1",
        "2",
    ]


def test_a_folder_whose_lock_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "run/.lock").mkdir(parents=True)  # as root, permissions stop nobody
    with pytest.raises(JobError, match="run_dir: .*run is not writable: Is a directory"):
        set_aside(tmp_path / "run")


def test_a_second_run_of_the_same_name_is_refused_while_the_first_goes_on(tmp_path, plan):
    log = begin(tmp_path / "run", plan)
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(JobError, match=f"in use by process {os.getpid()} on "):
        begin(tmp_path / "run", plan)
    with pytest.raises(JobError, match="in use by"):
        set_aside(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.yaml", "run"]
    log.metrics({"step": 0})
    log.close()
    lock.release()
    begin(tmp_path / "run", plan).close()


def test_what_is_not_finite_is_still_json(tmp_path, plan):
    log = begin(tmp_path / "run", plan)
    log.metrics({"step": 0, "loss": float("nan"), "lr": float("inf")})
    log.close()
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {"step": 0, "loss": "nan", "lr": "inf"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(JobError, match="holds no run"):
        holds_run(tmp_path / "run")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="cannot be created"):
        make_folder(tmp_path / "file")
    with pytest.raises(JobError, match="cannot be created"):
        make_folder(tmp_path / "file" / "below")


def test_progress_lines_are_rate_limited(tmp_path, plan, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("hvdlarge.telemetry.run_log.time.monotonic", lambda: now)
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


@pytest.mark.parametrize(("fetch", "reported"), [(0.5, True), (0.1, False)])
def test_waits_for_samples_are_reported_once(tmp_path, plan, capsys, fetch, reported):
    log = begin(tmp_path / "run", plan)
    for step in range(25):
        log.metrics({"step": step, "fetch_seconds": fetch, "forward_seconds": 1.0 - fetch})
        printed = capsys.readouterr().out
        expected = reported and step == 9  # after ten measured seconds
        assert ("has waited for samples for 50 % of the time" in printed) == expected
        assert printed == "" or expected
    log.close()


def test_evaluations_do_not_slow_the_speed_of_steps(tmp_path, plan, monkeypatch):
    log = begin(tmp_path / "run", plan)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    place = {"step": 0, "epoch": 0.1, "samples_seen": 0}
    log.metrics(place | {"lr": 0.1})
    now += 5
    log.metrics(place | {"test_loss": 0.5, "evaluate_seconds": 4.0})
    now += 1
    log.metrics(place | {"lr": 0.1, "samples_seen": 320})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[2]["samples_per_second"] == 160
