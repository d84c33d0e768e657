"""The folder of a run: who may use it, and the files that say what runs and what came of it. Rank 0
only.

In runs/<name>: job.yaml (as given), job.resolved.yaml, environment.json, starts.jsonl, the logs
(run_log.py), summary.json and checkpoints/.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlarge.exits import CheckpointWriteError, JobError
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.train_state import TrainState


class FolderLock:
    """Keeps a second run out of a run folder for as long as this process lives; the system frees it
    with the process.

    Raises:
        JobError: if another run holds it, naming host and process.
        CheckpointWriteError: if it cannot be written down whose it is.
    """

    def __init__(self, folder: Path) -> None:
        # False on a file system without locks, where nothing keeps a second run out
        self.held = True
        self._file = (folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise JobError(
                f"run_dir: {folder} is in use by {holder}; wait for it, or name another run_dir"
            ) from None
        except OSError:
            self.held = False
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointWriteError.of(
                f"the lock of {folder}", folder, error, "nothing was changed"
            ) from None

    def release(self) -> None:
        """Let others in."""
        self._file.close()


def holds_run(folder: Path) -> bool:
    """Whether an earlier run is in this folder.

    Raises:
        JobError: if something else is.
    """
    try:
        if not folder.is_dir() or not any(
            not path.name.startswith(".") for path in folder.iterdir()
        ):
            return False
    except OSError as error:
        raise JobError(f"run_dir: {folder} cannot be read: {error.strerror}") from None
    if not (folder / "job.resolved.yaml").exists():
        raise JobError(f"run_dir: {folder} is not empty and holds no run; name another folder")
    return True


def set_aside(folder: Path) -> Path:
    """Give an earlier run's folder a new name; returns it.

    Raises:
        JobError: if a run is going on in it, or it cannot be renamed.
    """
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    aside = folder.with_name(f"{folder.name}.{number}")
    FolderLock(folder).release()
    try:
        folder.rename(aside)
    except OSError as error:
        raise JobError(
            f"run_dir: {folder} cannot be set aside as {aside}: {error.strerror}"
        ) from None
    return aside


def make_folder(folder: Path) -> None:
    """Make a run folder.

    Raises:
        JobError: if it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise JobError(
            f"run_dir: {folder} cannot be made or written to: {error.strerror}"
        ) from None


def write_documents(
    folder: Path,
    job_file: Path,
    resolved: str,
    environment: Mapping[str, Any],
    progress: RunProgress,
    notes: Sequence[str],
) -> None:
    """Write down what runs, and that it has been started (again); the summary of an end that it
    goes on from is removed.

    Raises:
        CheckpointWriteError: if that cannot be written.
    """
    started = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": progress.step,
        "world_size": environment["world_size"],
    }
    try:
        # First and whole: a folder with this file in it is a run, whatever else a sudden end has
        # left out.
        _write_whole(folder / "job.resolved.yaml", resolved)
        if not (folder / "job.yaml").exists():  # as it was first given
            _write_whole(folder / "job.yaml", job_file.read_text(encoding="utf-8"))
        write_json(folder / "environment.json", environment)
        (folder / "summary.json").unlink(missing_ok=True)
        with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({**started, "versions": environment["versions"], "notes": list(notes)})
                + "\n"
            )
    except OSError as error:
        raise CheckpointWriteError.of(
            f"the files in {folder} that say what runs", folder, error, "no step was taken"
        ) from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON file, whole or not at all."""
    _write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def summary_of(
    plan: Plan,
    state: TrainState,
    progress: RunProgress,
    seconds: float,
    peak_memory: int | None,
    gradient_bytes: int,
) -> dict[str, Any]:
    """What a run has come to, under the words of its other files.

    Args:
        plan: what it followed.
        state: its results.
        progress: after the last step.
        seconds: of training.
        peak_memory: of the worker that needed most, in bytes; None where that is not known any
            more.
        gradient_bytes: that a worker sends in each step.
    """
    return {
        **state.results,
        "steps": progress.step,
        "epochs": plan.clock.epoch(progress.samples_seen),
        "samples_seen": progress.samples_seen,
        "growths": len(progress.stages) - 1,
        "global_batch": progress.stage_batch,
        "world_size": plan.world_size,
        "skipped_steps": state.skipped,
        "rollbacks": state.rolled_back,
        "train_seconds": seconds,
        "peak_memory_bytes": peak_memory,
        "gradient_bytes": gradient_bytes,
        "samples_per_second": progress.samples_seen / seconds,
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary of a run. Raises CheckpointWriteError if that cannot be written."""
    try:
        write_json(folder / "summary.json", without_nonfinite(summary))
    except OSError as error:
        raise CheckpointWriteError.of(
            f"the summary in {folder}", folder, error, "the checkpoints are untouched"
        ) from None


def without_nonfinite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with what is not finite as a word: JSON has no such numbers."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
