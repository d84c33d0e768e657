"""Runs the engine on a job in a world of threads, and collects its outcome and its files."""

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
from hvdlarge.comm.interfaces import CollectiveMismatchError, RankLostError
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import parse_job
from hvdlarge.config.yaml_source import write
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.training import run as run_module
from hvdlarge.world import RankContext
from trials.folder import flaws, read_lines
from trials.thread_world import WorldOutcome, run_world


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        code: the exit code of every rank.
        message: of the exit, or of the error that a rank raised with its traceback.
        broken: how the ranks' collective calls or exits did not match; None if they did.
        killed: whether the world was killed as requested.
        steps: started.
        calls: collective calls, summed over ranks.
        checkpoint: the content of last.pt; None if there is none.
        decisions: the lines of decisions.jsonl.
        results: the entries of summary.json that do not depend on time or machine; None if there
            is none.
        metrics: the lines of metrics.jsonl, without times.
        flaws: of the folder of a finished run.
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
    """When to interrupt a run.

    Attributes:
        stop_at: the step, counted from the first of this start, after which to request a stop.
        by_rank: the rank that receives the request.
        kill_at: the collective call, counted over all ranks, at which to kill every rank.
    """

    stop_at: int | None = None
    by_rank: int = 0
    kill_at: int | None = None


class StopAtStep(StopRequest):
    """Requests a stop at a step.

    Args:
        at: number of the step, from 0; None for no stop.
    """

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.steps = 0
        self._at = at

    def requested(self) -> bool:
        """Whether the step has been reached; called once per step."""
        if self._at is not None and self.steps >= self._at:
            self.reason = "the trial"
        self.steps += 1
        return self.reason is not None


class NoWatchdog(Watchdog):
    """A watchdog that does nothing: a world of threads detects deadlocks itself."""

    def __init__(self) -> None:
        pass

    def progress(self, phase: str, step: int | None = None, times: int = 1) -> None:
        """Do nothing."""

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Do nothing."""
        yield

    def take_notes(self, folder: Path) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


def train(
    job: Mapping[str, Any],
    folder: Path,
    workers: int,
    seed: int = 0,
    interruption: Interruption | None = None,
) -> Outcome:
    """Start or resume a job, until its end or the interruption.

    Args:
        job: keys of the job file.
        folder: of the run.
        workers: threads; 1 for the engine's own channels for a single worker.
        seed: of the world.
        interruption: of this start.
    """
    accepted = read(job, folder)
    if isinstance(accepted, Outcome):
        return accepted
    interrupt = interruption or Interruption()
    steps = [0] * workers

    def action(control: Any, tensors: Any) -> tuple[int, str]:
        receives_stop = control.rank == interrupt.by_rank % workers
        stop = StopAtStep(interrupt.stop_at if receives_stop else None)
        try:
            ending = run_rank(accepted, folder, control, tensors, stop)
        finally:
            steps[control.rank] = stop.steps
        tensors.close()
        control.close()
        return ending

    with preserved_settings(), silenced():
        world = run_world(workers, action, seed, interrupt.kill_at)
        join_checkpoint_writers()
    return read_folder(_outcome_of(world, max(steps)), folder)


def read(job: Mapping[str, Any], folder: Path) -> Job | Outcome:
    """The validated job, or the outcome of its rejection; writes its file beside the run folder."""
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
    except exits.RunExit as error:
        return Outcome(error.code, str(error))


def run_rank(
    job: Job, folder: Path, control: Any, tensors: Any, stop: StopRequest
) -> tuple[int, str]:
    """Run a job on one rank; returns its exit code and message, and leaves the channels open."""
    code, message = exits.FINISHED, ""
    try:
        run_module.run(
            job,
            folder.with_suffix(".yaml"),
            False,
            RankContext(None, {}, control, tensors, NoWatchdog(), stop),
        )
    except exits.RunExit as error:
        code, message = error.code, str(error)
    return code, message


def join_checkpoint_writers() -> None:
    """Wait for the threads that write checkpoints, which outlive a killed world."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


# Collecting the versions takes longer than a small run.
run_module.versions = functools.cache(run_module.versions)


@contextlib.contextmanager
def preserved_settings() -> Iterator[None]:
    """Run with one torch thread, and restore the global settings of torch and the environment."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.allow_tf32,
        cuda.allow_tf32,
        os.environ.copy(),
    )
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    set_num_threads(1)
    torch.set_num_threads = lambda nthreads: None
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        set_num_threads(threads)
        torch.use_deterministic_algorithms(before[0])
        cudnn.allow_tf32, cuda.allow_tf32 = before[1:3]
        for name in os.environ.keys() - before[3].keys():
            del os.environ[name]


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Discard output and warnings."""
    discarded = io.StringIO()
    with (
        contextlib.redirect_stdout(discarded),
        contextlib.redirect_stderr(discarded),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, in memory if possible."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="trials-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _outcome_of(world: WorldOutcome, steps: int) -> Outcome:
    """The outcome of the run, without its files."""
    if world.error is not None:
        rank, error = world.error
        if isinstance(error, RankLostError):
            code = exits.RANK_LOST
        elif isinstance(error, CollectiveMismatchError):
            code = exits.RANKS_DISAGREE
        else:
            code = exits.INTERNAL_ERROR
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} (rank {rank}, "
            f"{Path(frame.filename).name}:{frame.lineno})\n"
        )
        text += "".join(traceback.format_exception(error))
        return Outcome(code, text, world.broken, False, steps, world.calls)
    if world.broken is not None or world.killed:
        return Outcome(-1, world.broken or "", world.broken, world.killed, steps, world.calls)
    if len(set(world.results)) > 1:
        mismatch = f"the ranks ended differently: {world.results}"
        return Outcome(-1, "", mismatch, False, steps, world.calls)
    code, message = world.results[0]
    return Outcome(code, message, None, False, steps, world.calls)


_MACHINE_DEPENDENT = ("train_seconds", "samples_per_second", "peak_memory_bytes", "world_size")


def read_folder(outcome: Outcome, folder: Path) -> Outcome:
    """Fill in what the run folder holds."""
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
        entries = json.loads(summary.read_text(encoding="utf-8"))
        # Non-finite numbers are strings there.
        outcome.results = {
            name: float(value) for name, value in entries.items() if name not in _MACHINE_DEPENDENT
        }
        outcome.metrics = [_without_times(line) for line in read_lines(folder / "metrics.jsonl")]
        outcome.flaws = list(flaws(folder))
    outcome.folder = folder
    return outcome


def _without_times(line: dict[str, Any]) -> dict[str, float]:
    times = ("time", "samples_per_second")
    return {
        name: float(value)
        for name, value in line.items()
        if not (name.endswith("_seconds") or name in times)
    }
