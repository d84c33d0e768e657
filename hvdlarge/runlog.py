"""What a run leaves behind and what it says: the files of the run folder, and the lines on the screen. Rank 0 only.

In runs/<name>: job.yaml (as given), job.resolved.yaml, environment.json, metrics.jsonl, decisions.jsonl, summary.json and
checkpoints/last.pt.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from hvdlarge.controller import Plan
from hvdlarge.exits import JobError
from hvdlarge.introduction import growth_line
from hvdlarge.schedule.decision import Decision

_FIRST_LINE_SECONDS, _SLOWEST_LINE_SECONDS = 2.0, 30.0


def say(text: str) -> None:
    """Print for the user, at once, and in one piece: a launcher tags every piece that it reads with the rank."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """Print an error for the user, at once and in one piece."""
    sys.stderr.write(f"hvdlarge: error: {text}\n")
    sys.stderr.flush()


class FolderLock:
    """Keeps a second run out of a run folder for as long as this process lives; the system frees it with the process.

    Raises:
        JobError: if another run holds it, naming host and process.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise JobError(f"run_dir: {folder} is in use by {holder}; wait for it, or name another run_dir") from None
        except OSError:  # a file system without locks: nothing to hold, and nothing to claim
            pass
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others in."""
        self._file.close()


def make_run_folder(folder: Path) -> str | None:
    """Make an empty run folder; an earlier run in its place is set aside under a new name, never overwritten.

    Returns:
        Where the earlier run is now, or None.

    Raises:
        JobError: if the folder cannot be made or something else is in its place.
    """
    aside = None
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / "job.resolved.yaml").exists():
                raise JobError(f"run_dir: {folder} is not empty and holds no run; name another folder")
            number = 1
            while folder.with_name(f"{folder.name}.{number}").exists():
                number += 1
            aside = folder.with_name(f"{folder.name}.{number}")
            FolderLock(folder).release()  # refuses a folder in which a run is going on
            folder.rename(aside)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir()
    except OSError as error:
        raise JobError(f"run_dir: {folder} cannot be made: {error.strerror}") from None
    return None if aside is None else str(aside)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON file, whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


class RunLog:
    """The open logs of a run.

    Args:
        folder: the run folder, made already.
        plan: what the run follows.
        set_aside: where an earlier run of the same folder is now, or None.
        lock: on the folder, held until the logs are closed.
    """

    def __init__(self, folder: Path, plan: Plan, set_aside: str | None, lock: FolderLock) -> None:
        self.folder = folder
        self.set_aside = set_aside
        self._plan = plan
        self._lock = lock
        self._metrics: IO[str] = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._decisions: IO[str] = (folder / "decisions.jsonl").open("w", encoding="utf-8")
        self._began = self._last_line = time.monotonic()
        self._pause = _FIRST_LINE_SECONDS
        self._samples_at_last_line = 0
        self._last_decision: Decision | None = None
        self._accuracy: float | None = None

    @classmethod
    def begin(cls, folder: Path, job_file: Path, resolved: str, environment: Mapping[str, Any], plan: Plan) -> RunLog:
        """Make the run folder, put the documents of the run into it and open its logs.

        Raises:
            JobError: if the folder cannot be made or something that is no run is in its place.
        """
        set_aside = make_run_folder(folder)
        lock = FolderLock(folder)
        (folder / "job.yaml").write_bytes(job_file.read_bytes())
        (folder / "job.resolved.yaml").write_text(resolved, encoding="utf-8")
        write_json(folder / "environment.json", environment)
        return cls(folder, plan, set_aside, lock)

    def decision(self, decision: Decision) -> None:
        """Record what was ordered for a step; the first step of a larger batch also says what it `grew_from`."""
        before, self._last_decision = self._last_decision, decision
        grew: dict[str, int] = {}
        if before is not None and before.stage != decision.stage:
            grew["grew_from"] = before.stage_batch
            say(growth_line(self._plan, before, decision))
        _write_line(self._decisions, asdict(decision) | grew)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Record measured values; `record` holds step, epoch and samples_seen among them."""
        _write_line(self._metrics, record)
        self._metrics.flush()
        self._decisions.flush()

    def evaluated(self, result: Mapping[str, float]) -> None:
        """Show this accuracy in the progress lines from now on."""
        self._accuracy = result.get("accuracy")

    def progress(self, decision: Decision, samples_seen: int, loss: float) -> None:
        """Say where the run is, unless that was said a moment ago (every 2 s at first, every 30 s in a long run)."""
        now = time.monotonic()
        if now - self._last_line < self._pause:
            return
        rate = (samples_seen - self._samples_at_last_line) / (now - self._last_line)
        clock = self._plan.clock
        left = (clock.total_samples - samples_seen) / rate
        accuracy = "" if self._accuracy is None else f" | accuracy {self._accuracy:.4f}"
        say(
            f"epoch {clock.epoch(samples_seen):7.2f} of {clock.epochs:g} | "
            f"step {decision.step + 1:6d} | global batch {decision.global_batch:5d} | lr {decision.lr:.4g} | "
            f"loss {loss:.4f}{accuracy} | {rate:,.0f} samples/s | {_duration(left)} left"
        )
        self._last_line, self._samples_at_last_line = now, samples_seen
        self._pause = min(_SLOWEST_LINE_SECONDS, self._pause * 1.5)

    def finish(self, results: Mapping[str, float], weights: Mapping[str, Any]) -> None:
        """Write the last checkpoint and the summary, and say how the run ended.

        Raises:
            CannotSave: if the checkpoint cannot be written.
        """
        last = self._last_decision
        assert last is not None  # a run has at least one step
        from hvdlarge.checkpoint import save  # brings torch, which the lines before a run's start do not need

        seconds, samples_seen = time.monotonic() - self._began, last.samples_seen + last.global_batch
        progress = {"step": last.step, "epoch": self._plan.clock.epoch(samples_seen), "samples_seen": samples_seen}
        save(self.folder / "checkpoints" / "last.pt", {"model": dict(weights), **progress})
        summary = {
            **results,
            "steps": last.step + 1,
            "epochs": progress["epoch"],
            "samples_seen": samples_seen,
            "growths": last.stage,
            "global_batch": last.stage_batch,
            "world_size": self._plan.world_size,
            "train_seconds": seconds,
            "samples_per_second": samples_seen / seconds,
        }
        write_json(self.folder / "summary.json", summary)
        accuracy = f"accuracy {results['accuracy']:.4f}, " if "accuracy" in results else ""
        say(
            f"done: {accuracy}loss {results['loss']:.4f} after {progress['epoch']:g} epochs, {last.step + 1:,} steps and "
            f"{_duration(seconds)} ({summary['samples_per_second']:,.0f} samples/s); run folder {self.folder}"
        )

    def close(self) -> None:
        """Flush and close the logs, however the run ended."""
        self._metrics.close()
        self._decisions.close()
        self._lock.release()


def _write_line(file: IO[str], record: Mapping[str, Any]) -> None:
    file.write(json.dumps(_plain(record), allow_nan=False) + "\n")


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with what is not finite as a word: JSON has no such numbers."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
