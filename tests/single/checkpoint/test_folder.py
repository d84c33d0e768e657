"""Checkpoints are whole or not there, and what is not whole is never believed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from hvdlarge.checkpoint.folder import CheckpointFolder, read_checkpoint
from hvdlarge.exits import CheckpointError, CheckpointWriteError


def content(step):
    return {"model": {"weight": torch.full((100,), float(step))}, "progress": {"step": step}}


def save(folder, step, best=False):
    folder.save(content(step), step, best, wait=True)


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", keep=3)


def test_what_is_saved_is_read_back_and_the_oldest_go(folder):
    for step in range(10, 60, 10):
        save(folder, step, best=step == 20)
    assert [path.name for path in folder.newest_first()] == [
        f"step_0000000{step}.pt" for step in (50, 40, 30)
    ]
    path, found, problems = folder.newest_good()
    assert (path.name, found["progress"], problems) == ("step_000000050.pt", {"step": 50}, [])
    for name, step in (("last.pt", 50), ("best.pt", 20)):  # best.pt outlives the checkpoint it was
        assert read_checkpoint(folder.folder / name, None)["progress"]["step"] == step
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=folder.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 3
    assert not list(folder.folder.glob(".*"))


def test_an_empty_folder_has_none(folder):
    assert folder.newest_good() is None


def test_a_checkpoint_that_is_renamed_but_not_listed_yet_counts(folder):
    save(folder, 1)
    save(folder, 2)
    listing = folder.folder / "SHA256SUMS"
    listing.write_text(
        "".join(line for line in listing.read_text().splitlines(True) if "step_000000001" in line)
    )
    assert folder.newest_good()[0].name == "step_000000002.pt"


def test_another_format_and_another_file_are_named(folder):
    save(folder, 1)
    torch.save({"format": 99, "model": {}}, folder.folder / "step_000000002.pt")
    torch.save({"other": 1}, folder.folder / "step_000000003.pt")
    path, _, problems = folder.newest_good()
    assert path.name == "step_000000001.pt"
    assert "not a checkpoint of this engine" in problems[0]
    assert "its format is 99" in problems[1]


def test_a_failed_write_is_told_at_the_next_call_and_leaves_the_old_one(folder):
    save(folder, 1)
    before = (folder.folder / "step_000000001.pt").read_bytes()
    (folder.folder / ".step_000000002.pt.part").mkdir()  # the write cannot even begin
    folder.save(content(2), 2, best=False, wait=False)
    folder._writer.join()
    assert folder.failed
    with pytest.raises(CheckpointWriteError, match="the last good one is untouched"):
        folder.finish()
    assert not folder.failed
    (folder.folder / ".step_000000002.pt.part").rmdir()
    assert (folder.folder / "step_000000001.pt").read_bytes() == before
    save(folder, 3)
    assert folder.newest_good()[1]["progress"]["step"] == 3


class TooLarge:
    def __reduce__(self):
        raise MemoryError


def test_a_write_that_runs_out_of_memory_is_told_and_leaves_nothing_behind(folder):
    save(folder, 1)
    with pytest.raises(
        CheckpointWriteError,
        match="step_000000002.pt could not be written \\(MemoryError\\).*last good one is untouched",
    ):
        folder.save({**content(2), "large": TooLarge()}, 2, best=False, wait=True)
    assert sorted(path.name for path in folder.folder.iterdir()) == [
        "SHA256SUMS",
        "last.pt",
        "step_000000001.pt",
    ]
    assert folder.newest_good()[1]["progress"]["step"] == 1


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_are_not_among_those_that_are_kept(folder, keep):
    for step in (10, 20, 30, 40):
        save(folder, step)
    for path in folder.newest_first()[:2]:
        path.write_bytes(path.read_bytes()[:-7])
    again = CheckpointFolder(folder.folder, keep)
    assert again.newest_good()[1]["progress"]["step"] == 20
    save(again, 25)
    assert [path.stem[-2:] for path in again.newest_first()] == ["40", "30", "25", "20"][: 2 + keep]
    path, _, problems = CheckpointFolder(folder.folder, keep).newest_good()
    assert (path.name, len(problems)) == ("step_000000025.pt", 2)
    save(again, 30)  # written anew
    save(again, 45)  # and the last damaged one comes after it
    assert [path.stem[-2:] for path in again.newest_first()] == ["45", "30"][:keep]
    assert set(again.listed()) == {path.name for path in again.newest_first()}


def test_a_checkpoint_that_was_never_listed_is_removed_in_its_turn(folder):
    for step in (1, 2, 3):
        save(folder, step)
    listing = folder.folder / "SHA256SUMS"
    listing.write_text(
        "".join(
            line for line in listing.read_text().splitlines(True) if "step_000000002" not in line
        )
    )
    for step in (4, 5):
        save(folder, step)
    assert [path.stem[-1] for path in folder.newest_first()] == ["5", "4", "3"]


KILLED_AT_EVERY_OPERATION = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from hvdlarge.checkpoint.folder import CheckpointFolder

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.link"}  # by their names among Python's audit events
place, (steps, damaged, (new_step,), (keep,)) = Path(sys.argv[1]), (list(map(int, word.split())) for word in sys.argv[2:])
whole, work = place / "whole", place / "work"
kill_at, seen = 0, 0


def kill(event, arguments):
    global seen
    seen += event in OPERATIONS
    if kill_at and event in OPERATIONS and seen == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def save(folder, step, part, keep):
    content = {"model": {"weight": torch.full((1000,), float(part))}, "progress": {"step": step}, "part": part}
    CheckpointFolder(folder, keep).save(content, step, best=True, wait=True)


def newest(folder):
    found = CheckpointFolder(folder, keep).newest_good()
    if found is None:
        return None
    assert (found[1]["model"]["weight"] == found[1]["part"]).all()
    return found[1]["progress"]["step"], found[1]["part"]


for step in steps:
    save(whole, step, 1, keep=9)
for step in damaged:
    path = whole / f"step_{step:09d}.pt"
    path.write_bytes(path.read_bytes()[:-7])
before = newest(whole)
sys.addaudithook(kill)
for number in range(1, 1000):
    shutil.rmtree(work, ignore_errors=True)
    if whole.exists():
        shutil.copytree(whole, work)
    child = os.fork()
    if child == 0:
        newest(work)  # as at a resume
        kill_at, seen = number, 0
        save(work, new_step, 2, keep)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    assert newest(work) in ([before, (new_step, 2)] if ended else [(new_step, 2)]), number
    if not ended:
        break
    assert ended == signal.SIGKILL, ended
    save(work, new_step, 3, keep)  # the next writer
    assert newest(work) == (new_step, 3), number
    assert not list(work.glob(".*")), number
    print("killed at", number)
"""
SITUATIONS = {  # steps that are there, those of them that are damaged, the step that is written, how many are kept
    "the first one": ("", "", "0", "3"),
    "one that pushes the oldest out": ("10 20", "", "30", "2"),
    "the only one anew, as a rollback does with step 0": ("0", "", "0", "3"),
    "the newest anew": ("10 20", "", "20", "2"),
    "the only one that is kept anew": ("20", "", "20", "1"),
    "one after which a damaged one comes": ("10 20 30", "30", "25", "1"),
    "one in the place of a damaged one": ("10 20 30", "30", "30", "1"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_writer_killed_before_any_one_of_its_file_operations_leaves_a_whole_one(
    tmp_path, situation
):
    """By SIGKILL, at each operation in turn; what is found is what was there before, or what was written."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_OPERATION, str(tmp_path), *SITUATIONS[situation]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed at") >= 10


WRITER = """
import sys, torch
from pathlib import Path
from hvdlarge.checkpoint.folder import CheckpointFolder
folder = CheckpointFolder(Path(sys.argv[1]), keep=2)
step = int(sys.argv[2])
while True:
    step += 1
    weights = {"model": {"weight": torch.full((300_000,), float(step))}, "progress": {"step": step}}
    folder.save(weights, step, best=step % 3 == 0, wait=True)
    print(step, flush=True)
"""


def test_a_writer_killed_at_random_moments_always_leaves_a_whole_one(tmp_path):
    chance, folder, last = random.Random(3), CheckpointFolder(tmp_path / "checkpoints", keep=2), 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder.folder), str(last)],
            stdout=subprocess.PIPE,
            text=True,
        )
        process.stdout.readline()
        for _ in range(3):
            os.kill(
                process.pid, signal.SIGSTOP
            )  # several looks at one writer: stopped, it is as good as dead
            path, found, _ = folder.newest_good()
            step = found["progress"]["step"]
            assert torch.equal(found["model"]["weight"], torch.full((300_000,), float(step)))
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(chance.uniform(0, 0.03))
        process.kill()
        written = [int(line) for line in process.communicate()[0].split()] or [last + 1]
        path, found, problems = folder.newest_good()
        assert found["progress"]["step"] in (written[-1], written[-1] + 1)
        assert int(path.stem.removeprefix("step_")) == found["progress"]["step"]
        assert len(problems) <= 1
        last = found["progress"]["step"]
    assert last > 10


def test_no_whole_checkpoint_is_an_error_with_every_reason(folder):
    save(folder, 1)
    save(folder, 2)
    for path in folder.newest_first():
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be read") as raised:
        folder.newest_good()
    assert str(raised.value).count("damaged") == 2
