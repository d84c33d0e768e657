"""The logs of a run, metrics.jsonl and decisions.jsonl, and the lines that it prints on its way.
Rank 0 only.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from hvdlarge.exits import CheckpointWriteError
from hvdlarge.reporting.describe import duration, growth_line
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.telemetry.console import print_status
from hvdlarge.telemetry.run_folder import FolderLock, summary_of, without_nonfinite, write_summary
from hvdlarge.train_state import TrainState

_FIRST_LINE_SECONDS, _SLOWEST_LINE_SECONDS = 2.0, 30.0


class RunLog:
    """The open logs of a run.

    Args:
        folder: the run folder, made already.
        plan: what the run follows.
        lock: on the folder, held until the logs are closed.
        offsets: where each log goes on, by its name; what stands after is of steps that will be
            taken again.
        position: where the run begins or goes on.
        before: what it had come to.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        lock: FolderLock,
        offsets: Mapping[str, int],
        position: RunProgress,
        before: TrainState,
    ) -> None:
        self.folder = folder
        self._plan = plan
        self._lock = lock
        self._failure: OSError | None = None
        with self._told():
            self._files = {
                name: _open_at(folder / f"{name}.jsonl", offsets.get(name, 0))
                for name in ("metrics", "decisions")
            }
        self._began = self._last_line = time.monotonic()
        self._before_seconds = before.train_seconds
        self._pause = _FIRST_LINE_SECONDS
        self._samples_at_last_line = position.samples_seen
        # Of the step before, and its rate where it is known
        self._stage_batch = position.stage_batch
        self._lr: float | None = None
        self._metrics = _metrics_of(before.results)

    def decision(self, decision: Decision) -> None:
        """Record what was ordered for a step; the first step of a larger batch also says what it
        `grew_from`.
        """
        before = self._stage_batch
        if before not in (0, decision.stage_batch):
            print_status(growth_line(self._plan, self._stage_batch, self._lr, decision))
        self._stage_batch, self._lr = decision.stage_batch, decision.lr
        self._write(lambda: self._put("decisions", decision_line(decision, before)))

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Record measured values; `record` holds step, epoch and samples_seen among them."""
        self._write(
            lambda: self._put("metrics", json.dumps(without_nonfinite(record), allow_nan=False))
        )
        self._write(self._flush)

    @property
    def failed(self) -> bool:
        """Whether something could not be written; `check` says what."""
        return self._failure is not None

    def check(self) -> None:
        """Raise CheckpointWriteError if something could not be written since the logs were
        opened.
        """
        with self._told():
            if self._failure is not None:
                raise self._failure

    def offsets(self) -> dict[str, int]:
        """Where each log ends now, by its name. Raises CheckpointWriteError as `check` does."""
        self._write(self._flush)
        self.check()
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def _put(self, name: str, line: str) -> None:
        self._files[name].write(line + "\n")

    def _flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def _write(self, action: Callable[[], None]) -> None:
        """Write while that works; rank 0 alone must not leave in the middle of a step, so what
        fails is told at its end.
        """
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
            raise CheckpointWriteError.of(
                f"the logs in {self.folder}", self.folder, error, "the checkpoints are untouched"
            ) from None

    def evaluated(self, results: Mapping[str, float]) -> None:
        """Show these metrics in the progress lines from now on."""
        self._metrics = _metrics_of(results)

    def progress(self, decision: Decision, samples_seen: int, loss: float) -> None:
        """Say where the run is, unless that was said a moment ago (every 2 s at first, every 30 s
        in a long run).
        """
        now = time.monotonic()
        if now - self._last_line < self._pause:
            return
        rate = (samples_seen - self._samples_at_last_line) / (now - self._last_line)
        clock = self._plan.clock
        left = (clock.total_samples - samples_seen) / rate
        metrics = "".join(f" | {name} {value:.4f}" for name, value in self._metrics.items())
        print_status(
            f"epoch {clock.epoch(samples_seen):7.2f} of {clock.epochs:g} | "
            f"step {decision.step + 1:6d} | global batch {decision.global_batch:5d} | lr "
            f"{decision.lr:.4g} | "
            f"loss {loss:.4f}{metrics} | {rate:,.0f} samples/s | {duration(left)} left"
        )
        self._last_line, self._samples_at_last_line = now, samples_seen
        self._pause = min(_SLOWEST_LINE_SECONDS, self._pause * 1.5)

    def go_back(self, offsets: Mapping[str, int], position: RunProgress) -> None:
        """Cut off what was written after a checkpoint that the run goes back to. Raises
        CheckpointWriteError as `check` does.
        """
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

    def finish(
        self, state: TrainState, position: RunProgress, peak_memory: int, gradient_bytes: int
    ) -> None:
        """Write the summary and say how the run ended.

        Args:
            state: its results.
            position: after the last step.
            peak_memory: of the worker that needed most, in bytes.
            gradient_bytes: that a worker sends in each step.

        Raises:
            CheckpointWriteError: if it cannot be written.
        """
        self._write(self._flush)
        self.check()
        summary = summary_of(self._plan, state, position, self.seconds, peak_memory, gradient_bytes)
        write_summary(self.folder, summary)
        results = state.results
        metrics = "".join(f"{name} {value:.4f}, " for name, value in _metrics_of(results).items())
        print_status(
            f"done: {metrics}loss {results['loss']:.4f} after {summary['epochs']:g} epochs, "
            f"{position.step:,} steps and {duration(summary['train_seconds'])} "
            f"({summary['samples_per_second']:,.0f} samples/s); run folder {self.folder}"
        )

    def close(self) -> None:
        """Flush and close the logs, however the run ended."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what could not be written has been told
                file.close()
        self._lock.release()


def _metrics_of(results: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in results.items() if name not in ("loss", "test_loss")}


def _open_at(path: Path, offset: int) -> IO[str]:
    """Open a log to go on at `offset` bytes; what stands after it is cut off."""
    file = path.open("a", encoding="utf-8")
    file.truncate(min(offset, os.fstat(file.fileno()).st_size))
    return file


def decision_line(decision: Decision, batch_before: int) -> str:
    """A decision as a line of decisions.jsonl; the first step of a larger batch also says what it
    `grew_from`.

    Args:
        decision: of a step.
        batch_before: the stage's batch of the step before it; 0 for the first step.
    """
    grew = {} if batch_before in (0, decision.stage_batch) else {"grew_from": batch_before}
    return json.dumps(without_nonfinite(decision.to_plain() | grew), allow_nan=False)
