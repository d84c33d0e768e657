"""Starts the engine on a job in a world of one's own, and tells how the run ended and what it
left.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hvdlarge import exits
from hvdlarge import run as run_module
from hvdlarge.comm.interfaces import CollectiveMismatchError, RankLostError
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import parse_job
from hvdlarge.config.yaml_source import write
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.world import RankContext
from trials.folder import flaws, read_lines
from trials.thread_world import Ends, run_world


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        code: the exit code that every rank leaves with.
        message: of the end, or what one rank raised: in a line, then its traceback.
        broken: how the ranks fell apart, where they did.
        killed: whether the world was killed, as was asked.
        steps: that were begun.
        calls: collective calls, of all ranks together.
        checkpoint: the content of last.pt; None where there is none.
        decisions: the lines of decisions.jsonl.
        results: of summary.json, what does not depend on time and machine; None where there is
            none.
        metrics: the lines of metrics.jsonl, without times.
        flaws: of the folder of a run that has finished.
        folder: of the run.
    """

    code: int
    message: str = ""
    broken: str | None = None
    killed: bool = False
    steps: int = 0
    calls: int = 0
    checkpoint: dict[str, Any] | None = None
    decisions: list[str] = field(default_factory=list)
    results: dict[str, Any] | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)
    folder: Path | None = None


@dataclass(frozen=True)
class Interruption:
    """How a start is to be interrupted.

    Attributes:
        stop_at: the step, counted from this start's first, behind which a stop is asked for.
        by_rank: the rank that hears of it.
        kill_at: the collective call, of all ranks together, at which every rank is killed.
    """

    stop_at: int | None = None
    by_rank: int = 0
    kill_at: int | None = None


class AskedFor(StopRequest):
    """A stop that comes at a step.

    Args:
        at: the number of the step, from 0; None for none.
    """

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.steps = 0
        self._at = at

    def requested(self) -> bool:
        """Whether the step has come; asked once in each step."""
        if self._at is not None and self.steps >= self._at:
            self.reason = "the trial"
        self.steps += 1
        return self.reason is not None


class Unwatched(Watchdog):
    """A watchdog that never barks: a world of threads cannot hang."""

    def __init__(self) -> None:
        pass

    def progress(self, phase: str, step: int | None = None) -> None:
        """Nothing is noted."""

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Nothing is noted."""
        yield

    def take_notes(self, folder: Path) -> None:
        """Nothing is noted."""

    def stop(self) -> None:
        """There is nothing to stop."""


def train(
    job: Mapping[str, Any],
    folder: Path,
    workers: int,
    seed: int = 0,
    interruption: Interruption | None = None,
) -> Outcome:
    """Start a job in a run folder, in a world of threads or alone, and go on to its end or its
    interruption.

    Args:
        job: the job file's keys.
        folder: for the run.
        workers: 1 for the engine's own channels of a single worker.
        seed: of the world.
        interruption: of this start.
    """
    accepted = read(job, folder)
    if isinstance(accepted, Outcome):
        return accepted
    breaks = interruption or Interruption()
    steps = [0] * workers

    def action(control: Any, tensors: Any) -> tuple[int, str]:
        stop = AskedFor(breaks.stop_at if control.rank == breaks.by_rank % workers else None)
        try:
            ended = one_rank(accepted, folder, control, tensors, stop)
        finally:
            steps[control.rank] = stop.steps
        tensors.close()
        control.close()
        return ended

    with unchanged_settings(), quietly():
        ends = run_world(workers, action, seed, breaks.kill_at)
        finish_writers()
    return read_folder(_judged(ends, max(steps)), folder)


def read(job: Mapping[str, Any], folder: Path) -> Job | Outcome:
    """The job as the engine accepts it, or how it refuses it; its file lies beside the run
    folder.
    """
    text = json.dumps(job)
    folder.with_suffix(".yaml").write_text(text, encoding="utf-8")
    accepted = _accepted(text)
    return (
        accepted.model_copy(update={"run_dir": str(folder)})
        if isinstance(accepted, Job)
        else accepted
    )


@functools.lru_cache(maxsize=4)
def _accepted(text: str) -> Job | Outcome:
    try:
        return parse_job(write(json.loads(text)), "job.yaml")
    except exits.RunExit as end:
        return Outcome(end.code, str(end))


def one_rank(
    job: Job, folder: Path, control: Any, tensors: Any, stop: StopRequest
) -> tuple[int, str]:
    """What the engine's door does on one rank: the exit code and the message of the end that all
    ranks share.

    The channels are still open then.
    """
    code, message = exits.FINISHED, ""
    try:
        run_module.run(
            job,
            folder.with_suffix(".yaml"),
            False,
            RankContext(None, {}, control, tensors, Unwatched(), stop),
        )
    except exits.RunExit as end:
        code, message = end.code, str(end)
    return code, message


def finish_writers() -> None:
    """Wait for checkpoints that are being written: a world that was killed leaves its threads."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


# To look the versions of a process up takes longer than a small run.
run_module.versions = functools.cache(run_module.versions)


@contextlib.contextmanager
def unchanged_settings() -> Iterator[None]:
    """Leave torch's global settings as they were, and its threads at one while this lasts."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.allow_tf32,
        cuda.allow_tf32,
        os.environ.copy(),
    )
    set_num_threads = torch.set_num_threads
    set_num_threads(1)
    torch.set_num_threads = lambda nthreads: None
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.use_deterministic_algorithms(before[0])
        cudnn.allow_tf32, cuda.allow_tf32 = before[1:3]
        for name in os.environ.keys() - before[3].keys():
            del os.environ[name]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep what the engine and torch say off the screen."""
    nowhere = io.StringIO()
    with (
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one, removed afterwards."""
    memory = Path("/dev/shm")
    place = Path(
        tempfile.mkdtemp(prefix="trials-", dir=memory if os.access(memory, os.W_OK) else None)
    )
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _judged(ends: Ends, steps: int) -> Outcome:
    """How a world's end looks from outside."""
    if ends.error is not None:
        rank, error = ends.error
        lost = isinstance(error, RankLostError)
        code = (
            exits.LOST_RANK
            if lost
            else exits.RANKS_DISAGREE
            if isinstance(error, CollectiveMismatchError)
            else exits.INTERNAL_ERROR
        )
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = (str(error).splitlines() or [""])[0]
        text = (
            f"{type(error).__name__}: {told} (rank {rank}, "
            f"{Path(place.filename).name}:{place.lineno})\n"
        )
        text += "".join(traceback.format_exception(error))
        return Outcome(code, text, ends.broken, False, steps, ends.calls)
    if ends.broken is not None or ends.killed:
        return Outcome(-1, ends.broken or "", ends.broken, ends.killed, steps, ends.calls)
    if len(set(ends.results)) > 1:
        return Outcome(
            -1, "", f"the ranks ended differently: {ends.results}", False, steps, ends.calls
        )
    code, message = ends.results[0]
    return Outcome(code, message, None, False, steps, ends.calls)


_OF_THE_MACHINE = ("train_seconds", "samples_per_second", "peak_memory_bytes", "world_size")


def read_folder(outcome: Outcome, folder: Path) -> Outcome:
    """What a run has left, put beside how it ended."""
    last, decisions, summary = (
        folder / "checkpoints" / "last.pt",
        folder / "decisions.jsonl",
        folder / "summary.json",
    )
    if last.exists():
        outcome.checkpoint = torch.load(last, weights_only=True)
    if decisions.exists():
        outcome.decisions = decisions.read_text(encoding="utf-8").splitlines()
    if outcome.code == exits.FINISHED and summary.exists():
        found = json.loads(summary.read_text(encoding="utf-8"))
        # What is not finite is a word there.
        outcome.results = {
            name: float(value) for name, value in found.items() if name not in _OF_THE_MACHINE
        }
        outcome.metrics = [_without_times(line) for line in read_lines(folder / "metrics.jsonl")]
        outcome.flaws = list(flaws(folder))
    outcome.folder = folder
    return outcome


def _without_times(line: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if not name.endswith("_seconds")}
