"""The work on a study: what is run, recorded, repeated, waited for and left to others. The processes of its runs are stand-ins
that end as each test says.
"""

import dataclasses
import json
import signal
import types

import pytest
from support.study_files import planned

from hvdlarge import exits
from hvdlarge.study import session as session_module
from hvdlarge.study.__main__ import _document
from hvdlarge.study.cells import job_source
from hvdlarge.study.folder import JOURNAL, RunName, StudyFolder
from hvdlarge.study.results import RunResult
from hvdlarge.study.session import Session

ONE_ARM = {"factors": {"batch.base": [32, 64]}}
GRID = {**ONE_ARM, "tune/sampler": "grid", "seeds": 2}  # 4 trials and 2 repetitions of 2 cells
PRUNED = {**ONE_ARM, "tune/pruner": "median"}


class Runs:
    """Stands for the processes of runs.

    Attributes:
        ends: gives the exit code of a run by its name, as `32/trial-000`; None: it goes on.
        value: gives the result of a run by its name and settings.
        started: the names of all starts, in order.
        settings: of the last start of each name.
    """

    def __init__(self):
        self.ends = lambda name: 0
        self.value = lambda name, settings: settings["lr.base"]
        self.at_start = lambda name, folder: None
        self.started, self.settings, self.reason = [], {}, "no such device"

    def child(self, source, settings, workers, threads, mpirun, gpus, output, claim):
        folder = StudyFolder(output.parents[2]).run_folder(RunName(output.parent.name, *output.stem.split("-")))  # fmt: skip
        name = f"{output.parent.name}/{output.stem}"
        assert str(folder.parent / output.stem) == settings["run_dir"]
        self.started.append(name)
        self.settings[name] = {key: settings[key] for key in settings if key == "lr.base"}
        self.at_start(name, output.parent / output.stem)
        return types.SimpleNamespace(
            begun=0.0, code=lambda: self.ends(name), reason=lambda: self.reason, stop=lambda: None, kill=lambda: None, close=claim.close
        )  # fmt: skip

    def result(self, folder, how, metric, tuned_by, end):
        name = f"{folder.parent.name}/{folder.name}"
        value = self.value(name, how["settings"]) if end[0] == "finished" else None
        return RunResult(**how, state=end[0], reason=end[1], value=value)


@pytest.fixture
def runs(monkeypatch):
    runs = Runs()
    monkeypatch.setattr(session_module, "Child", runs.child)
    monkeypatch.setattr(session_module, "result_of_run", runs.result)
    monkeypatch.setattr(session_module, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(session_module, "_PRUNE_SECONDS", 0.0)
    return runs


def session_of(path, jobs=1, extend=False, **changes):
    study, plans, setup = planned(path.parent, **changes)
    folder = StudyFolder(path)
    folder.open(_document(study, plans, setup), extend)
    source = job_source(study, path.parent / "study.yaml", path)
    return Session(study, plans, setup, source, folder, jobs, "")


def records(path):
    return {f"{name.slug}/{name.text}": each for name, each in StudyFolder(path).records().items()}


def states(path):
    return {name: each.state for name, each in records(path).items()}


def test_all_runs_are_recorded_and_repetitions_have_the_best_settings(runs, tmp_path):
    path = tmp_path / "study"
    assert session_of(path, jobs=3, **GRID).run() == 0
    found = records(path)
    assert len(found) == len(runs.started) == 12
    assert {each.state for each in found.values()} == {"finished"}
    best = found["32/trial-003"].settings
    assert best == {"lr.base": 20}
    assert found["32/repetition-001"].settings == found["64/repetition-000"].settings == best


FINALISTS = {**GRID, "tune/finalists": 3, "tune/finalist_seeds": 2}


def unstable(name, settings):
    """The highest rate is the best with the seed of the tuning alone."""
    rate = settings["lr.base"]
    return -5.0 if rate == 20 and "trial" not in name else rate


def test_repetitions_have_the_settings_of_the_finalist_with_the_best_mean(runs, tmp_path):
    path = tmp_path / "study"
    runs.value = unstable
    session = session_of(path, jobs=3, **FINALISTS)
    assert session.total() == 2 * (4 + 6 + 2)
    assert session.run() == 0
    found = records(path)
    assert len(found) == 24
    trials = sorted((found[f"32/trial-00{at}"] for at in range(4)), key=lambda each: -each.value)
    finalists = [found[f"32/finalist-00{at}"] for at in range(6)]
    for place, each in enumerate(finalists):
        assert each.settings == trials[place // 2].settings
        assert each.seed == 1_000_000 + place % 2
    # (20 - 5 - 5) / 3 is less than the next rate
    assert trials[1].settings["lr.base"] > 10 / 3
    assert found["32/repetition-000"].settings == trials[1].settings
    # They are the last before the repetitions
    names = [name for name in runs.started if name.startswith("32/")]
    assert [name.split("/")[1].split("-")[0] for name in names] == (
        ["trial"] * 4 + ["finalist"] * 6 + ["repetition"] * 2
    )


def test_a_finalist_that_fails_with_a_seed_is_the_last(runs, tmp_path):
    path = tmp_path / "study"
    runs.ends = lambda name: exits.DIVERGED if name == "32/finalist-001" else 0
    assert session_of(path, **FINALISTS).run() == 0
    found = records(path)
    assert found["32/finalist-001"].state == "diverged"
    assert found["32/repetition-000"].settings == found["32/finalist-002"].settings
    assert found["64/repetition-000"].settings == found["64/finalist-000"].settings


def test_finalists_follow_trials_that_are_trained_again(runs, tmp_path):
    path = tmp_path / "study"
    runs.ends = lambda name: 1 if name == "32/trial-003" else 0
    assert session_of(path, **FINALISTS).run() == 0
    before = records(path)
    runs.ends = lambda name: 0
    assert StudyFolder(path).forget_failed() == 1
    assert session_of(path, **FINALISTS).run() == 0
    after = records(path)
    assert (
        after["32/finalist-000"].settings == {"lr.base": 20} != before["32/finalist-000"].settings
    )
    assert after["32/finalist-002"].settings == before["32/finalist-000"].settings
    assert after["32/repetition-000"].settings == {"lr.base": 20}
    assert after["64/finalist-000"] == before["64/finalist-000"]


def test_what_a_process_left_that_was_killed_meanwhile_is_removed(runs, tmp_path):
    """Between the record of a run and the end of its files."""
    left = tmp_path / "study/runs/32/trial-000/checkpoints"
    runs.at_start = lambda name, folder: name == "64/repetition-001" and left.mkdir()
    assert session_of(tmp_path / "study", **GRID).run() == 0
    assert not left.exists()


# --- ends that are no results


@pytest.mark.parametrize("code", [1, 70, 137, 143, 205, 2, 77, 75, -9, -15])
def test_a_run_that_ends_while_the_session_stops_is_not_recorded(runs, tmp_path, code):
    """As that of a launcher whose grace time is over, with mpirun's code."""
    path = tmp_path / "study"
    session = session_of(path, **GRID)

    def ends(name):
        if name == "32/trial-000":
            return 0
        session._on_signal(signal.SIGINT, None)
        return code

    runs.ends = ends
    runs.at_start = lambda name, folder: (folder / "checkpoints").mkdir()
    assert session.run() == exits.STOPPED
    assert states(path) == {"32/trial-000": "finished"}
    assert (path / "runs/64/trial-000/checkpoints").is_dir()
    assert not (path / "runs/32/trial-000/checkpoints").exists()


@pytest.mark.parametrize(("code", "state"), [(0, "finished"), (exits.DIVERGED, "diverged")])
def test_a_run_that_ends_with_a_result_while_the_session_stops_is_recorded(
    runs, tmp_path, code, state
):
    session = session_of(tmp_path / "study", **GRID)
    runs.ends = lambda name: session._on_signal(signal.SIGINT, None) or code
    assert session.run() == exits.STOPPED
    assert states(tmp_path / "study") == {"32/trial-000": state}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_run_that_another_one_stopped_stops_the_study(runs, tmp_path, number):
    runs.ends = lambda name: 0 if name == "32/trial-000" else -number
    with pytest.raises(exits.Stopped, match="64 trial-000 was stopped"):
        session_of(tmp_path / "study", **GRID).run()
    assert states(tmp_path / "study") == {"32/trial-000": "finished"}


def test_settings_that_the_model_refuses_are_a_failure_once_a_run_has_finished(runs, tmp_path):
    path = tmp_path / "study"
    runs.ends = lambda name: exits.WRONG_JOB
    runs.reason = "hidden must be at most 512"
    with pytest.raises(exits.JobError, match="at most 512"):
        session_of(path, **GRID).run()
    assert records(path) == {}
    runs.ends = lambda name: exits.WRONG_JOB if name == "64/trial-001" else 0
    assert session_of(path, **GRID).run() == 0
    refused = records(path)["64/trial-001"]
    assert (refused.state, refused.reason) == ("failed", "hidden must be at most 512")
    assert len(records(path)) == 12


def test_a_process_that_cannot_train_leaves_a_shared_study_to_the_others(runs, tmp_path):
    path = tmp_path / "study"
    runs.ends = lambda name: 70 if runs.started[1:] else 0
    budget = session_of(path, **GRID, budget={"trials": 1})
    assert budget.run() == 0
    other = StudyFolder(path).join()
    with pytest.raises(exits.RunExit, match=r"3 runs in a row failed.*no such device; its output is in .*txt") as ended:  # fmt: skip
        session_of(path, **GRID).run()
    assert ended.value.code == 70
    assert list(states(path).values()) == ["finished"]
    assert runs.started == ["32/trial-000", "64/trial-000", "32/trial-001", "64/trial-001"]
    other.close()
    assert session_of(path, **GRID).run() == 0  # alone
    assert list(states(path).values()).count("failed") == 11


def test_a_process_that_can_train_records_what_fails_beside_others(runs, tmp_path):
    path = tmp_path / "study"
    session_of(path, **GRID, budget={"trials": 1}).run()
    runs.started.clear()
    runs.ends = lambda name: 70 if name.startswith("64/trial") else 0
    other = StudyFolder(path).join()
    assert session_of(path, **GRID).run() == 0
    other.close()
    assert runs.started[:3] == ["64/trial-000", "32/trial-001", "64/trial-000"]
    assert len(runs.started) == 12
    assert list(states(path).values()).count("failed") == 4


# --- trained again


def with_failure(runs, path, failed, **changes):
    """A study whose named run has failed, and is forgotten."""
    runs.ends = lambda name: 70 if name == failed else 0
    assert session_of(path, **changes).run() == 0
    assert states(path)[failed] == "failed"
    runs.ends, runs.started = lambda name: 0, []
    assert StudyFolder(path).forget_failed() == 1


def test_repetitions_follow_a_trial_that_is_the_best_one_now(runs, tmp_path):
    path = tmp_path / "study"
    with_failure(runs, path, "32/trial-003", **GRID)
    kept = records(path)["64/repetition-000"]
    assert session_of(path, **GRID).run() == 0
    assert runs.started == ["32/trial-003", "32/repetition-000", "32/repetition-001"]
    assert records(path)["32/repetition-000"].settings == {"lr.base": 20}
    assert records(path)["64/repetition-000"] == kept


def test_repetitions_of_unchanged_settings_are_kept(runs, tmp_path):
    path = tmp_path / "study"
    with_failure(runs, path, "32/trial-001", **GRID)
    assert session_of(path, **GRID).run() == 0
    assert runs.started == ["32/trial-001"]


def test_cells_that_are_tuned_elsewhere_follow(runs, tmp_path):
    path, changes = tmp_path / "study", {**GRID, "tune/at": {"batch.base": 32}}
    with_failure(runs, path, "32/trial-003", **changes)
    assert session_of(path, **changes).run() == 0
    again = [f"{slug}/repetition-{number:03}" for number in range(2) for slug in (32, 64)]
    assert runs.started == ["32/trial-003", *again]
    assert records(path)["64/repetition-001"].settings == {"lr.base": 20}


def test_a_repetition_that_trained_elsewhere_meanwhile_is_waited_for_and_discarded(
    runs, tmp_path, monkeypatch
):
    path = tmp_path / "study"
    with_failure(runs, path, "32/trial-003", **GRID)
    name = RunName("32", "repetition", 0)
    elsewhere, old = StudyFolder(path), records(path)["32/repetition-000"]
    assert old.settings != {"lr.base": 20}
    elsewhere.discard(name)
    claim = elsewhere.claim(name)

    def wait(seconds):
        if len(runs.started) == 2 and not claim.closed:
            elsewhere.write_record(name, old)
            claim.close()

    clock = iter(range(10**6))
    monkeypatch.setattr(session_module, "time", types.SimpleNamespace(sleep=wait, monotonic=lambda: next(clock)))  # fmt: skip
    assert session_of(path, **GRID).run() == 0
    assert runs.started == ["32/trial-003", "32/repetition-001", "32/repetition-000"]
    assert records(path)["32/repetition-000"].settings == {"lr.base": 20}


@pytest.mark.parametrize("same", [True, False])
def test_what_a_run_of_other_settings_has_left_is_removed(runs, tmp_path, same):
    path = tmp_path / "study"
    session = session_of(path, **GRID)
    seen = []
    runs.at_start = lambda name, folder: seen.append((folder / "checkpoints").exists())
    left = path / "runs/32/trial-000"
    (left / "checkpoints").mkdir(parents=True)
    job = session._source.read({**session._plans[("32",)].settings, "lr.base": 0.5 if same else 0.6, "seed": 0})  # fmt: skip
    (left / "job.resolved.yaml").write_text(job.to_yaml())
    assert session.run() == 0
    assert seen[:2] == [same, False]


def test_another_version_of_the_study_ends_the_one_that_was_opened_before(runs, tmp_path):
    path = tmp_path / "study"
    first = session_of(path, **GRID)
    session_of(path, **{**GRID, "set": {"epochs": 3}})
    with pytest.raises(exits.JobError, match=r"another version.*job.epochs of cell batch.base 32"):
        first.run()
    assert runs.started == []


def test_an_older_process_trains_its_own_runs_of_a_study_that_was_extended(runs, tmp_path):
    path = tmp_path / "study"
    session_of(path, **GRID, budget={"trials": 1}).run()
    older = session_of(path, **GRID)
    more = {**GRID, "factors": {"batch.base": [32, 64, 128]}, "seeds": 9}
    newer = session_of(path, extend=True, **more, budget={"trials": 14})
    assert newer.run() == 0
    assert older.total() == 12 > older.ended()
    assert older.run() == 0
    assert older.ended() == 12


# --- the journal


def test_suggestions_come_from_the_records_whatever_the_journal_holds(runs, tmp_path, monkeypatch):
    path = tmp_path / "study"
    assert session_of(path, **ONE_ARM, budget={"trials": 4}).run() == 0
    folder = StudyFolder(path)
    name = RunName("32", "trial", 1)
    folder.write_record(name, dataclasses.replace(folder.records()[name], settings={"lr.base": 7.5}, value=7.5))  # fmt: skip
    asked = []
    suggest = session_module.suggest
    monkeypatch.setattr(session_module, "suggest", lambda *args: asked.append(args[2:]) or suggest(*args))  # fmt: skip
    for journal in ("kept", "lost"):
        if journal == "lost":
            (path / JOURNAL).unlink()
        for left in ("32/trial-002", "32/trial-003"):
            (path / f"runs/{left}.json").unlink(missing_ok=True)
        asked.clear()
        assert session_of(path, **ONE_ARM).run() == 0
        tried = next(tried for cell, tried in asked if cell == "32")
        assert [each.settings for each in tried] == [{"lr.base": 4.0}, {"lr.base": 7.5}]
        assert [each.loss for each in tried] == [-4.0, -7.5]


def test_a_trial_that_is_trained_again_may_be_pruned_again(runs, tmp_path):
    path = tmp_path / "study"
    with_failure(runs, path, "32/trial-001", **PRUNED)

    def log(name, folder):
        line = {"step": 1, "epoch": 1.0, "accuracy": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    runs.at_start = log
    looks = iter([None, None, 0])
    runs.ends = lambda name: next(looks) if name == "32/trial-001" else 0
    session = session_of(path, **PRUNED)
    assert session.run() == 0
    assert states(path)["32/trial-001"] == "finished"
    assert runs.started[0] == "32/trial-001"
    trials = session._journal._study("32").get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    assert trials[1].intermediate_values == {0: 0.5}


def test_a_damaged_journal_is_made_again_from_the_records(runs, tmp_path, capfd):
    path = tmp_path / "study"
    assert session_of(path, **ONE_ARM, budget={"trials": 5}).run() == 0
    (tmp_path / "whole").mkdir()
    assert session_of(tmp_path / "whole/study", **ONE_ARM).run() == 0
    lines = (path / JOURNAL).read_bytes().splitlines(keepends=True)
    (path / JOURNAL).write_bytes(b"".join([*lines[:2], b'{"op_code": 4, "wo\n', *lines[2:]]))
    assert session_of(path, **ONE_ARM).run() == 0
    assert records(path) == records(tmp_path / "whole/study")
    assert "optuna.journal was damaged" in capfd.readouterr().out
    assert (path / "optuna.journal.old").exists()
    trials = session_of(path, **ONE_ARM)._journal.settings("32")
    assert trials == [records(path)[f"32/trial-{number:03}"].settings for number in range(4)]


# --- the surroundings


def test_a_terminal_that_is_gone_ends_no_run(runs, tmp_path, monkeypatch):
    def broken(text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_module, "print_status", broken)
    monkeypatch.setattr(session_module, "print_error", broken)
    assert session_of(tmp_path / "study", **GRID).run() == 0
    assert len(records(tmp_path / "study")) == 12


def test_files_that_cannot_be_read_or_removed_end_no_run(runs, tmp_path):
    path = tmp_path / "study"
    runs.at_start = lambda name, folder: [each.mkdir(parents=True) for each in (folder / "metrics.jsonl", folder.with_suffix(".txt"))]  # fmt: skip
    looks = iter([None, None, *[0] * 100])
    runs.ends = lambda name: next(looks)
    assert session_of(path, **PRUNED).run() == 0
    assert {each.state for each in records(path).values()} == {"finished"}


def test_a_process_that_waits_asks_less_and_less_often(runs, tmp_path, monkeypatch):
    path = tmp_path / "study"
    session = session_of(path, **GRID)
    elsewhere, name = StudyFolder(path), RunName("64", "repetition", 1)
    claim = elsewhere.claim(name)
    now = [0.0]

    def sleep(seconds):
        now[0] += max(seconds, 0.05)
        if now[0] > 120 and not claim.closed:
            elsewhere.write_record(name, RunResult(("64",), "repetition", 1, 2, {"lr.base": 20}, "finished", value=0.5))  # fmt: skip
            claim.close()

    monkeypatch.setattr(session_module, "time", types.SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))  # fmt: skip
    asked = []
    choose = session._choose
    monkeypatch.setattr(session, "_choose", lambda: asked.append(now[0]) or choose())
    assert session.run() == 0
    idle = [each for each in asked if each > 10]
    assert 20 < len(idle) < 30
    assert idle[-1] - idle[-2] < 6


def test_a_budget_that_is_used_up_is_seen_without_a_look_at_all_claims(runs, tmp_path, monkeypatch):
    path = tmp_path / "study"
    claimed = []
    claim = StudyFolder.claim
    monkeypatch.setattr(StudyFolder, "claim", lambda folder, name: claimed.append(name) or claim(folder, name))  # fmt: skip
    assert session_of(path, **GRID, budget={"trials": 2}).run() == 0
    assert len(records(path)) == 2
    claimed.clear()
    assert session_of(path, **GRID, budget={"trials": 2}).run() == 0
    assert claimed == []


@pytest.mark.parametrize("most", [12, 13])
def test_a_budget_of_all_runs_is_no_limit(runs, tmp_path, most, capfd):
    assert session_of(tmp_path / "study", jobs=3, **GRID, budget={"trials": most}).run() == 0
    assert len(records(tmp_path / "study")) == 12
    assert "have been started" not in capfd.readouterr().out
