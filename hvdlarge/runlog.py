"""What a run leaves behind and what it says: the files of the run folder, and the lines on the screen. Rank 0 only.

In runs/<name>: job.yaml (as given), job.resolved.yaml, environment.json, metrics.jsonl, decisions.jsonl, summary.json and
checkpoints/last.pt.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hvdlarge.controller import Plan, Position
from hvdlarge.exits import CannotSave, JobError
from hvdlarge.introduction import duration, growth_line
from hvdlarge.run_state import RunState
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
        CannotSave: if it cannot be written down whose it is.
    """

    def __init__(self, folder: Path) -> None:
        self.held = True  # False on a file system without locks, where nothing keeps a second run out
        self._file = (folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise JobError(f"run_dir: {folder} is in use by {holder}; wait for it, or name another run_dir") from None
        except OSError:
            self.held = False
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except OSError as error:
            raise CannotSave.of(f"the lock of {folder}", folder, error, "nothing was changed") from None

    def release(self) -> None:
        """Let others in."""
        self._file.close()


def holds_run(folder: Path) -> bool:
    """Whether an earlier run is in this folder.

    Raises:
        JobError: if something else is.
    """
    try:
        if not folder.is_dir() or not any(not path.name.startswith(".") for path in folder.iterdir()):
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
        raise JobError(f"run_dir: {folder} cannot be set aside as {aside}: {error.strerror}") from None
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
        raise JobError(f"run_dir: {folder} cannot be made or written to: {error.strerror}") from None


def write_documents(
    folder: Path,
    job_file: Path,
    resolved: str,
    environment: Mapping[str, Any],
    position: Position,
    notes: Sequence[str],
) -> None:
    """Write down what runs, and that it has been started (again); the summary of an end that it goes on from is removed.

    Raises:
        CannotSave: if that cannot be written.
    """
    started = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": position.step, "world_size": environment["world_size"]}
    try:
        # First and whole: a folder with this file in it is a run, whatever else a sudden end has left out.
        _write_whole(folder / "job.resolved.yaml", resolved)
        if not (folder / "job.yaml").exists():  # as it was first given
            _write_whole(folder / "job.yaml", job_file.read_text(encoding="utf-8"))
        write_json(folder / "environment.json", environment)
        (folder / "summary.json").unlink(missing_ok=True)
        with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**started, "versions": environment["versions"], "notes": list(notes)}) + "\n")
    except OSError as error:
        raise CannotSave.of(f"the files in {folder} that say what runs", folder, error, "no step was taken") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON file, whole or not at all."""
    _write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def summary_of(
    plan: Plan, state: RunState, position: Position, seconds: float, peak_memory: int | None, gradient_bytes: int
) -> dict[str, Any]:
    """What a run has come to, under the words of its other files.

    Args:
        plan: what it followed.
        state: its results.
        position: behind the last step.
        seconds: of training.
        peak_memory: of the worker that needed most, in bytes; None where that is not known any more.
        gradient_bytes: that a worker sends in each step.
    """
    return {
        **state.results,
        "steps": position.step,
        "epochs": plan.clock.epoch(position.samples_seen),
        "samples_seen": position.samples_seen,
        "growths": len(position.stages) - 1,
        "global_batch": position.stage_batch,
        "world_size": plan.world_size,
        "steps_left_out": state.skipped,
        "rollbacks": state.rolled_back,
        "train_seconds": seconds,
        "peak_memory_bytes": peak_memory,
        "gradient_bytes": gradient_bytes,
        "samples_per_second": position.samples_seen / seconds,
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary of a run. Raises CannotSave if that cannot be written."""
    try:
        write_json(folder / "summary.json", _plain(summary))
    except OSError as error:
        raise CannotSave.of(f"the summary in {folder}", folder, error, "the checkpoints are untouched") from None


class RunLog:
    """The open logs of a run.

    Args:
        folder: the run folder, made already.
        plan: what the run follows.
        lock: on the folder, held until the logs are closed.
        offsets: where each log goes on, by its name; what stands behind is of steps that will be taken again.
        position: where the run begins or goes on.
        before: what it had come to.
    """

    def __init__(
        self, folder: Path, plan: Plan, lock: FolderLock, offsets: Mapping[str, int], position: Position, before: RunState
    ) -> None:
        self.folder = folder
        self._plan = plan
        self._lock = lock
        self._failure: OSError | None = None
        with self._told():
            self._files = {name: _open_at(folder / f"{name}.jsonl", offsets.get(name, 0)) for name in ("metrics", "decisions")}
        self._began = self._last_line = time.monotonic()
        self._before_seconds = before.train_seconds
        self._pause = _FIRST_LINE_SECONDS
        self._samples_at_last_line = position.samples_seen
        self._stage_batch = position.stage_batch  # of the step before, and its rate where it is known
        self._lr: float | None = None
        self._accuracy = before.results.get("accuracy")

    def decision(self, decision: Decision) -> None:
        """Record what was ordered for a step; the first step of a larger batch also says what it `grew_from`."""
        before = self._stage_batch
        if before not in (0, decision.stage_batch):
            say(growth_line(self._plan, self._stage_batch, self._lr, decision))
        self._stage_batch, self._lr = decision.stage_batch, decision.lr
        self._write(lambda: self._put("decisions", decision_line(decision, before)))

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Record measured values; `record` holds step, epoch and samples_seen among them."""
        self._write(lambda: self._put("metrics", json.dumps(_plain(record), allow_nan=False)))
        self._write(self._flush)

    @property
    def failed(self) -> bool:
        """Whether something could not be written; `check` says what."""
        return self._failure is not None

    def check(self) -> None:
        """Raise CannotSave if something could not be written since the logs were opened."""
        with self._told():
            if self._failure is not None:
                raise self._failure

    def offsets(self) -> dict[str, int]:
        """Where each log ends now, by its name. Raises CannotSave as `check` does."""
        self._write(self._flush)
        self.check()
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def _put(self, name: str, line: str) -> None:
        self._files[name].write(line + "\n")

    def _flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def _write(self, action: Callable[[], None]) -> None:
        """Write while that works; rank 0 alone must not leave in the middle of a step, so what fails is told at its end."""
        if self._failure is None:
            try:
                action()
            except OSError as error:
                self._failure = error

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CannotSave.of(f"the logs in {self.folder}", self.folder, error, "the checkpoints are untouched") from None

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
            f"loss {loss:.4f}{accuracy} | {rate:,.0f} samples/s | {duration(left)} left"
        )
        self._last_line, self._samples_at_last_line = now, samples_seen
        self._pause = min(_SLOWEST_LINE_SECONDS, self._pause * 1.5)

    def go_back(self, offsets: Mapping[str, int], position: Position) -> None:
        """Cut off what was written behind a checkpoint that the run goes back to. Raises CannotSave as `check` does."""
        self.check()
        with self._told():
            for name, file in self._files.items():
                file.flush()
                file.truncate(offsets[name])
        self._samples_at_last_line, self._last_line = position.samples_seen, time.monotonic()
        self._stage_batch, self._lr = position.stage_batch, None

    @property
    def seconds(self) -> float:
        """Seconds of training, in all parts of the run."""
        return self._before_seconds + time.monotonic() - self._began

    def finish(self, state: RunState, position: Position, peak_memory: int, gradient_bytes: int) -> None:
        """Write the summary and say how the run ended.

        Args:
            state: its results.
            position: behind the last step.
            peak_memory: of the worker that needed most, in bytes.
            gradient_bytes: that a worker sends in each step.

        Raises:
            CannotSave: if it cannot be written.
        """
        self._write(self._flush)
        self.check()
        summary = summary_of(self._plan, state, position, self.seconds, peak_memory, gradient_bytes)
        write_summary(self.folder, summary)
        results = state.results
        accuracy = f"accuracy {results['accuracy']:.4f}, " if "accuracy" in results else ""
        say(
            f"done: {accuracy}loss {results['loss']:.4f} after {summary['epochs']:g} epochs, {position.step:,} steps and "
            f"{duration(summary['train_seconds'])} ({summary['samples_per_second']:,.0f} samples/s); run folder {self.folder}"
        )

    def close(self) -> None:
        """Flush and close the logs, however the run ended."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what could not be written has been told
                file.close()
        self._lock.release()


def _open_at(path: Path, offset: int) -> IO[str]:
    """Open a log to go on at `offset` bytes; what stands behind it is cut off."""
    file = path.open("a", encoding="utf-8")
    file.truncate(min(offset, os.fstat(file.fileno()).st_size))
    return file


def decision_line(decision: Decision, batch_before: int) -> str:
    """A decision as a line of decisions.jsonl; the first step of a larger batch also says what it `grew_from`.

    Args:
        decision: of a step.
        batch_before: the stage's batch of the step before it; 0 for the first step.
    """
    grew = {} if batch_before in (0, decision.stage_batch) else {"grew_from": batch_before}
    return json.dumps(_plain(decision.to_plain() | grew), allow_nan=False)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with what is not finite as a word: JSON has no such numbers."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
