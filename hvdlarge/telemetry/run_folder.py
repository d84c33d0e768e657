"""The folder of a run: its lock, and the files that describe the run and its results. Rank 0 only.

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
from typing import Any, NamedTuple

from hvdlarge.exits import CheckpointWriteError, JobError
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.plan import Plan, RunProgress


class FolderLock:
    """A lock on a run folder, released at the latest when this process ends.

    Args:
        folder: an existing folder.

    Raises:
        JobError: if another run holds the lock, naming host and process, or if the folder is not
            writable.
        CheckpointWriteError: if the lock file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.acquired = True  # False on a file system without locks
        try:
            self._file = (folder / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise JobError(f"run_dir: {folder} is not writable: {error.strerror}") from None
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
            self.acquired = False
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointWriteError.of(
                f"the lock of {folder}", folder, error, "nothing was changed"
            ) from None

    def release(self) -> None:
        """Release the lock."""
        self._file.close()


def holds_run(folder: Path) -> bool:
    """Whether the folder holds an earlier run; False if it is missing or empty.

    Raises:
        JobError: if it holds something else, or cannot be read.
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
    """Rename the folder of an earlier run to the first free `<name>.1`, `.2`, …; returns it.

    Raises:
        JobError: if a process is using the folder, or it cannot be renamed.
    """
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    new = folder.with_name(f"{folder.name}.{number}")
    FolderLock(folder).release()
    try:
        folder.rename(new)
    except OSError as error:
        raise JobError(f"run_dir: {folder} cannot be renamed to {new}: {error.strerror}") from None
    return new


def make_folder(folder: Path) -> None:
    """Create a run folder if it is missing.

    Raises:
        JobError: if it cannot be created, or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise JobError(
            f"run_dir: {folder} cannot be created or written to: {error.strerror}"
        ) from None


def write_documents(
    folder: Path,
    job_file: Path,
    resolved: str,
    environment: Mapping[str, Any],
    progress: RunProgress,
    notes: Sequence[str],
) -> None:
    """Write the files that describe a run, and record this start; a summary of an earlier end is
    removed.

    Args:
        folder: of the run.
        job_file: as given by the user.
        resolved: the job as YAML, with every default and override.
        environment: the content of environment.json.
        progress: where the run starts or resumes.
        notes: on this start, for starts.jsonl.

    Raises:
        CheckpointWriteError: if a file cannot be written.
    """
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": progress.step,
        "world_size": environment["world_size"],
    }
    try:
        # Written first: a folder with this file holds a run, even if the process is killed here
        _write_atomically(folder / "job.resolved.yaml", resolved)
        if not (folder / "job.yaml").exists():  # keep that of the first start
            _write_atomically(folder / "job.yaml", job_file.read_text(encoding="utf-8"))
        write_json(folder / "environment.json", environment)
        (folder / "summary.json").unlink(missing_ok=True)
        with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({**start, "versions": environment["versions"], "notes": list(notes)})
                + "\n"
            )
    except OSError as error:
        raise CheckpointWriteError.of(
            f"the files in {folder} that describe the run", folder, error, "no step was taken"
        ) from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    _write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Sums(NamedTuple):
    """The gradients that a worker sends in each step."""

    gradient_bytes: int
    gradient_tensors: int


def summary_of(
    plan: Plan,
    state: TrainState,
    progress: RunProgress,
    seconds: float,
    peak_memory: int | None,
    sums: Sums,
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        plan: of the run.
        state: of the run.
        progress: after the last step.
        seconds: of training.
        peak_memory: the largest of all workers, in bytes; None if no longer known.
        sums: sent by each worker in each step.
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
        "steps_without_loss": state.without_loss,
        "rollbacks": state.rolled_back,
        "train_seconds": seconds,
        "peak_memory_bytes": peak_memory,
        **sums._asdict(),
        "samples_per_second": progress.samples_seen / seconds,
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json. Raises CheckpointWriteError if it cannot be written."""
    try:
        write_json(folder / "summary.json", without_nonfinite(summary))
    except OSError as error:
        raise CheckpointWriteError.of(
            f"the summary in {folder}", folder, error, "the checkpoints are untouched"
        ) from None


def without_nonfinite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with non-finite floats as strings, since JSON has no such numbers."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
