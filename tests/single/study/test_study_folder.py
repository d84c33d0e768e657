"""The folder of a study: records at once or not at all, claims, and changes of the study file."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.study_files import planned

from hvdlarge.exits import CheckpointWriteError, JobError
from hvdlarge.study.__main__ import _document
from hvdlarge.study.folder import (
    DOCUMENT,
    RunName,
    StudyFolder,
    is_study,
    read_results,
    read_setup,
    record_json,
    result_of,
    write_atomically,
    write_setup,
)
from hvdlarge.study.results import Point, RunResult

NAME = RunName("64_lars", "trial", 3)


def result(**more):
    values = {"cell": ("64", "lars"), "kind": "trial", "number": 3, "seed": 0, "settings": {"lr.base": 0.1}, "state": "finished", "value": 0.5}  # fmt: skip
    return RunResult(**{**values, **more})


def opened(path, extend=False, **changes):
    study, plans, setup = planned(path.parent, **changes)
    folder = StudyFolder(path)
    return folder, folder.open(_document(study, plans, setup), extend)


def begun(path, **changes):
    """A study with a record."""
    folder, _ = opened(path, **changes)
    folder.write_record(NAME, result())
    return folder


def test_a_record_is_read_as_it_was_written(tmp_path):
    folder = begun(tmp_path / "study")
    points = (Point(5, 0.5, 0.25, 0.1), Point(10, 1.0, 0.5, None))
    other = result(number=4, curve=points, noise=points, state="diverged", value=None, reason="too »large«")  # fmt: skip
    folder.write_record(RunName("64_lars", "trial", 4), other)
    again = StudyFolder(folder.path).records()
    assert again[NAME] == result()
    assert again[RunName("64_lars", "trial", 4)] == other
    assert result_of(json.loads(record_json(other))) == other
    assert read_results(folder.path) == [result(), other]
    assert is_study(folder.path)


def test_a_record_holds_no_number_that_json_has_not():
    with pytest.raises(ValueError, match="JSON"):
        record_json(result(value=float("nan")))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"cell": 3}', b"null", b'{"cell": ["a"], "kind": "trial"}', b"\xff"])  # fmt: skip
def test_a_damaged_record_is_named(tmp_path, content):
    folder = begun(tmp_path / "study")
    folder.record_path(NAME).write_bytes(content)
    with pytest.raises(JobError, match=r"trial-003\.json is damaged; remove it"):
        StudyFolder(folder.path).records()


def test_what_is_no_record_is_left_alone(tmp_path):
    folder = begun(tmp_path / "study")
    for name in (".trial-004.json.12.part", "notes.json", "trial-.json"):
        (folder.path / "runs/64_lars" / name).write_text("{")
    assert list(StudyFolder(folder.path).records()) == [NAME]


def test_a_claim_is_one_of_all_processes_and_ends_with_its_holder(tmp_path):
    folder, _ = opened(tmp_path / "study")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from hvdlarge.study.folder import RunName, StudyFolder\n"
        f"held = StudyFolder(Path({str(folder.path)!r})).claim(RunName(*{tuple(NAME)!r}))\n"
        "print(held is not None, flush=True); time.sleep(600)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True\n"
        assert folder.claim(NAME) is None
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    claim = folder.claim(NAME)
    assert claim is not None
    assert StudyFolder(folder.path).claim(NAME) is None
    claim.close()


def test_a_child_that_inherits_a_claim_holds_it_after_its_parent(tmp_path):
    folder, _ = opened(tmp_path / "study")
    claim = folder.claim(NAME)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[claim.fileno()])  # fmt: skip
    claim.close()
    assert folder.claim(NAME) is None
    child.communicate(b"\n")
    folder.claim(NAME).close()


def test_a_run_that_was_recorded_meanwhile_is_not_claimed(tmp_path):
    folder, _ = opened(tmp_path / "study")
    StudyFolder(folder.path).write_record(NAME, result())
    assert folder.claim(NAME) is None


def _count(path, counted):
    folder = StudyFolder(path)
    for _ in range(50):
        with folder.exclusive():
            number = int(counted.read_text())
            counted.write_text(str(number + 1))


def test_processes_choose_one_at_a_time(tmp_path):
    folder, _ = opened(tmp_path / "study")
    counted = tmp_path / "counted"
    counted.write_text("0")
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_count, args=(folder.path, counted)) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert counted.read_text() == "200"


def test_the_same_study_goes_on(tmp_path):
    begun(tmp_path / "study")
    before = (tmp_path / "study" / DOCUMENT).read_bytes()
    assert opened(tmp_path / "study", budget={"trials": 5}, analysis=[{"kind": "compare"}])[1] == []
    assert (tmp_path / "study" / DOCUMENT).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"set": {"epochs": 3}}, "job.epochs of cell batch.base 32, arm lars"),
        ({"tune/trials": 5}, "tune.trials"),
        ({"tune/round": 1}, "tune.round"),
        ({"metric": "test_loss"}, "metric, lower_is_better"),
        ({"seeds": 2}, "seeds"),
        ({"threads": 2}, "threads"),
        ({"tune/at": {"batch.base": 32}}, "tuned_at of cell batch.base 64, arm lars"),
        ({"tune/search": {"lr.base": {"low": 0.5, "high": 30, "log": True}}}, "search.lr.base.high of cell batch.base 32, arm lars"),
        ({"factors/batch.base": [32]}, "cell batch.base 64, arm lars is gone"),
    ],
)  # fmt: skip
def test_changes_after_the_first_run_are_refused_by_name(tmp_path, changes, named):
    begun(tmp_path / "study")
    with pytest.raises(JobError, match="has changed since") as error:
        opened(tmp_path / "study", extend=True, **changes)
    assert named in str(error.value)


def test_changes_before_the_first_end_of_a_run_are_accepted(tmp_path):
    folder, _ = opened(tmp_path / "study")
    folder.run_folder(NAME).mkdir(parents=True)  # a run that failed
    (folder.path / "optuna.journal").write_text("of the other search")
    claim = folder.claim(NAME)
    with pytest.raises(JobError, match="has changed since"):  # it goes on
        opened(tmp_path / "study", set={"epochs": 3})
    claim.close()
    opened(tmp_path / "study")
    assert folder.run_folder(NAME).exists()  # the same study
    folder, notes = opened(tmp_path / "study", set={"epochs": 3})
    assert notes == []
    assert json.loads((folder.path / DOCUMENT).read_text())["cells"]["batch.base 32, arm lars"]["job"]["epochs"] == 3  # fmt: skip
    assert not folder.run_folder(NAME).exists()
    assert not (folder.path / "optuna.journal").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"factors/batch.base": [32, 64, 128]}, "batch.base 128, arm lars"),
        ({"seeds": 5}, "seed 4, seed 5"),
    ],
)
def test_additions_need_to_be_meant(tmp_path, changes, named):
    begun(tmp_path / "study")
    with pytest.raises(JobError, match="--extend adds it") as error:
        opened(tmp_path / "study", **changes)
    assert named in str(error.value)
    folder, _ = opened(tmp_path / "study", extend=True, **changes)
    assert list(folder.records()) == [NAME]
    opened(tmp_path / "study", **changes)  # from now on without


def test_another_study_and_another_folder_are_refused(tmp_path):
    begun(tmp_path / "study")
    with pytest.raises(JobError, match="is the folder of the study 'small', not of 'other'"):
        opened(tmp_path / "study", name="other")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.tex").write_text("")
    with pytest.raises(JobError, match=r"is not empty and holds no study \(thesis.tex\)"):
        opened(tmp_path / "docs")
    assert [each.name for each in (tmp_path / "docs").iterdir()] == ["thesis.tex"]
    (tmp_path / "study" / DOCUMENT).write_text("{")
    with pytest.raises(JobError, match="is damaged"):
        opened(tmp_path / "study")


def test_a_study_of_another_version_goes_on_with_a_note(tmp_path):
    folder = begun(tmp_path / "study")
    path = folder.path / DOCUMENT
    path.write_text(json.dumps({**json.loads(path.read_text()), "hvdlarge": "0.0.1"}))
    for _ in range(2):
        (note,) = opened(tmp_path / "study")[1]
        assert "begun with hvdlarge 0.0.1" in note


def test_failed_runs_are_forgotten_on_request(tmp_path):
    folder = begun(tmp_path / "study")
    for number, state in enumerate(("failed", "diverged", "pruned"), start=4):
        folder.write_record(RunName("64_lars", "trial", number), result(number=number, state=state, value=None))  # fmt: skip
    folder.run_folder(RunName("64_lars", "trial", 4)).mkdir()
    for number, state in enumerate(("failed", "finished")):
        name = RunName("64_lars", "repetition", number)
        folder.write_record(name, result(kind="repetition", number=number, state=state))
    other = StudyFolder(folder.path)
    assert len(other.records()) == 6
    assert folder.forget_failed() == 2
    left = [("64_lars", "repetition", 1), ("64_lars", "trial", 3), ("64_lars", "trial", 5), ("64_lars", "trial", 6)]  # fmt: skip
    assert [tuple(name) for name in folder.records()] == left
    assert [tuple(name) for name in other.records()] == left
    assert not folder.run_folder(RunName("64_lars", "trial", 4)).exists()


def test_a_run_that_a_process_has_is_not_discarded(tmp_path):
    folder = begun(tmp_path / "study")
    name = RunName("64_lars", "trial", 4)
    claim = folder.claim(name)
    folder.write_record(name, result(number=4, state="failed"))  # it cleans up behind that
    other = StudyFolder(folder.path)
    assert not other.discard(name)
    assert other.forget_failed() == 0
    claim.close()
    assert other.forget_failed() == 1


def test_a_record_that_another_process_wrote_anew_is_read_anew(tmp_path):
    folder = begun(tmp_path / "study")
    other = StudyFolder(folder.path)
    assert other.records()[NAME].value == 0.5
    assert folder.discard(NAME)
    folder.write_record(NAME, result(value=0.7))  # a file of the same size
    assert other.records()[NAME].value == 0.7


def test_a_record_that_disappears_while_all_are_read_is_none(tmp_path, monkeypatch):
    folder = begun(tmp_path / "study")
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.unlink() or read_bytes(path))
    assert folder.records() == {}


def test_processes_see_whether_others_work_on_the_study(tmp_path):
    one, _ = opened(tmp_path / "study")
    other = StudyFolder(one.path)
    joined = one.join()
    assert not one.is_shared(joined)
    for _ in range(2):
        also = other.join()
        assert one.is_shared(joined)
        assert other.is_shared(also)
        also.close()
        assert not one.is_shared(joined)
    joined.close()
    joined = other.join()
    opened(tmp_path / "study", set={"epochs": 3})  # nothing is trained: another version may begin
    joined.close()


def test_a_version_that_another_process_began_is_named(tmp_path):
    folder, _ = opened(tmp_path / "study")
    folder.check_unchanged()
    begun(tmp_path / "study")
    opened(tmp_path / "study", extend=True, seeds=5, **{"factors/batch.base": [32, 64, 128]})
    folder.check_unchanged()
    other, _ = opened(tmp_path / "another")
    opened(tmp_path / "another", **{"tune/trials": 5, "factors/batch.base": [32]})
    with pytest.raises(
        JobError, match=r"another version.*tune.trials, cell batch.base 64, arm lars is gone"
    ):
        other.check_unchanged()


def test_processes_of_the_same_number_write_a_file_at_once_or_not_at_all(tmp_path, monkeypatch):
    """On two hosts, or in two containers."""
    path, sync = tmp_path / "file", os.fsync

    def another(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        write_atomically(path, "of another process\n" * 100)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", another)
    write_atomically(path, "of this one\n")
    assert path.read_text() == "of this one\n"
    assert list(tmp_path.iterdir()) == [path]


def test_the_setup_is_read_as_it_was_written(tmp_path):
    for changes in ({}, {"tune/at": {"batch.base": 32}}, {"factors": None}):
        setup = planned(tmp_path, **changes)[2]
        write_setup(tmp_path, setup, [{"kind": "compare"}])
        assert read_setup(tmp_path) == (setup, [{"kind": "compare"}])
    (tmp_path / "setup.json").write_text("{}")
    with pytest.raises(JobError, match="is damaged"):
        read_setup(tmp_path)


def test_a_full_disk_keeps_what_was_recorded(tmp_path):
    """A limit on the size of files stands for the full disk: the write fails in its middle."""
    folder = begun(tmp_path / "study")
    other = RunName("64_lars", "trial", 4)
    long = result(number=4, reason="x" * 100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointWriteError, match="bytes are free there"):
            folder.write_record(other, long)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(StudyFolder(folder.path).records()) == [NAME]
    assert [each.name for each in (folder.path / "runs/64_lars").iterdir()] == ["trial-003.json"]
    folder.write_record(other, long)
    assert StudyFolder(folder.path).records()[other] == long


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointWriteError, match="study"):
        StudyFolder(tmp_path / "study").open({"name": "x", "cells": {}, "seeds": []}, False)
