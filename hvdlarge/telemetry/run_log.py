"""Sends the records of a run to the sinks (sinks.py), and prints progress lines. Rank 0 only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlarge.config.job import AVERAGED
from hvdlarge.exits import CheckpointWriteError
from hvdlarge.replica.train_state import TrainState
from hvdlarge.reporting.describe import duration, growth_line
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.telemetry.console import print_status
from hvdlarge.telemetry.run_folder import Sums, summary_of, write_summary
from hvdlarge.telemetry.sinks import JsonlFiles, Sink, Status, decision_record
from hvdlarge.telemetry.timers import PHASES

_FIRST_LINE_SECONDS, _SLOWEST_LINE_SECONDS = 2.0, 30.0
# Waits for samples are reported once they are this share of the first so many measured seconds
_WAITING_SHARE, _WAITING_SECONDS = 0.2, 10.0


class RunLog:
    """The open logs of a run.

    Args:
        folder: the run folder, which must exist.
        plan: of the run.
        offsets: length in bytes to which each log is truncated first, by name; later records
            belong to steps that will be repeated.
        progress: where the run starts or resumes.
        before: its state at that point.
        sinks: further receivers of the records, beside the log files; closed with them.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        offsets: Mapping[str, int],
        progress: RunProgress,
        before: TrainState,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.folder = folder
        self._plan = plan
        self._failure: OSError | None = None
        with self._as_write_error():
            self._files = JsonlFiles(folder, offsets)
        self._sinks: list[Sink] = [self._files, *sinks]
        self._began = self._last_line = time.monotonic()
        self._before_seconds = before.train_seconds
        self._pause = _FIRST_LINE_SECONDS
        self._samples_at_last_line = self._samples_at_last_record = progress.samples_seen
        self._last_step_record = self._began
        # Of the step before, and its lr where it is known
        self._stage_batch = progress.stage_batch
        self._lr: float | None = None
        self._metrics = _metrics_of(before.results)
        self._waited = self._measured = 0.0
        self._judged_waits = False

    def decision(self, decision: Decision) -> None:
        """Record what was ordered for a step; the first step of a larger batch also says what it
        `grew_from`.
        """
        before = self._stage_batch
        if before not in (0, decision.stage_batch):
            print_status(growth_line(self._plan, self._stage_batch, self._lr, decision))
        self._stage_batch, self._lr = decision.stage_batch, decision.lr
        record = decision_record(decision, before)
        self._send(lambda sink: sink.decision(record))

    def note(self, message: str) -> None:
        """Tell the user something about the run."""
        print_status(f"note     {message}")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Record measured values; `record` holds step, epoch and samples_seen among them. Adds the
        time, in seconds since 1970, and to a step's record the samples per second since the last,
        without evaluations.
        """
        record = {**record, "time": round(time.time(), 4)}
        if "lr" in record and "samples_seen" in record:
            now = time.monotonic()
            passed, self._last_step_record = now - self._last_step_record, now
            samples = record["samples_seen"] - self._samples_at_last_record
            self._samples_at_last_record = record["samples_seen"]
            record["samples_per_second"] = samples / passed if passed > 0 else None
        self._last_step_record += record.get("evaluate_seconds", 0.0)
        self._send(lambda sink: sink.metrics(record))
        if not self._judged_waits:
            self._judge_waits(record)

    def _judge_waits(self, record: Mapping[str, Any]) -> None:
        """Report, once, that the steps wait for samples for much of the time."""
        self._waited += record.get("fetch_seconds", 0.0)
        self._measured += sum(record.get(f"{phase}_seconds", 0.0) for phase in PHASES)
        if self._measured < _WAITING_SECONDS:
            return
        self._judged_waits = True
        share = self._waited / self._measured
        if share > _WAITING_SHARE:
            self.note(
                f"rank 0 has waited for samples for {100 * share:.0f} % of the time so far: "
                "loading cannot keep up with training. More data.num_workers may help; "
                "`python -m hvdlarge.bench data` measures what they load"
            )

    @property
    def failed(self) -> bool:
        """Whether something could not be written; `check` raises its error."""
        return self._failure is not None

    def check(self) -> None:
        """Raise CheckpointWriteError if something could not be written since the logs were
        opened.
        """
        with self._as_write_error():
            if self._failure is not None:
                raise self._failure

    def offsets(self) -> dict[str, int]:
        """Where each log ends now, by its name. Raises CheckpointWriteError as `check` does."""
        self.check()
        with self._as_write_error():
            return self._files.offsets()

    def _send(self, receive: Callable[[Sink], None]) -> None:
        """Pass a record to every sink, until one fails. `check` raises the error later: rank 0 must
        not leave the others within a step.
        """
        if self._failure is None:
            try:
                for sink in self._sinks:
                    receive(sink)
            except OSError as error:
                self._failure = error

    @contextlib.contextmanager
    def _as_write_error(self) -> Iterator[None]:
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
        """Print a progress line, at most every 2 s at first and every 30 s in a long run."""
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

    def roll_back(self, offsets: Mapping[str, int], progress: RunProgress) -> None:
        """Drop the records after the checkpoint that the run is rolled back to. Raises
        CheckpointWriteError as `check` does.
        """
        self._send(lambda sink: sink.roll_back(progress.step, offsets))
        self.check()
        self._samples_at_last_line = self._samples_at_last_record = progress.samples_seen
        self._last_line = self._last_step_record = time.monotonic()
        self._stage_batch, self._lr = progress.stage_batch, None

    @property
    def seconds(self) -> float:
        """Seconds of training, in all parts of the run."""
        return self._before_seconds + time.monotonic() - self._began

    def finish(
        self, state: TrainState, progress: RunProgress, peak_memory: int, sums: Sums
    ) -> None:
        """Write the summary and print the final line.

        Args:
            state: of the run.
            progress: after the last step.
            peak_memory: maximum over workers, in bytes.
            sums: the gradients that a worker sends in each step.

        Raises:
            CheckpointWriteError: if it cannot be written.
        """
        self.offsets()  # everything is written, or this raises
        summary = summary_of(self._plan, state, progress, self.seconds, peak_memory, sums)
        write_summary(self.folder, summary)
        results = state.results
        metrics = "".join(f"{name} {value:.4f}, " for name, value in _metrics_of(results).items())
        print_status(
            f"done: {metrics}loss {results['loss']:.4f} after {summary['epochs']:g} epochs, "
            f"{progress.step:,} steps and {duration(summary['train_seconds'])} "
            f"({summary['samples_per_second']:,.0f} samples/s); run folder {self.folder}"
        )

    def close(self, status: Status = "failed") -> None:
        """Close the sinks, however the run ended."""
        for sink in self._sinks:  # all of them finish at the same time
            sink.end(status)
        for sink in self._sinks:
            with contextlib.suppress(OSError):
                sink.close()


def _metrics_of(results: Mapping[str, float]) -> dict[str, float]:
    losses = {"loss", "test_loss", f"{AVERAGED}test_loss"}
    return {name: value for name, value in results.items() if name not in losses}


class SilentRunLog:
    """Writes and prints nothing: for the ranks that do not log, and for measurements."""

    failed = False
    seconds = 0.0

    def decision(self, decision: Decision) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def evaluated(self, result: Mapping[str, float]) -> None:
        """Do nothing."""

    def progress(self, decision: Decision, samples_seen: int, loss: float) -> None:
        """Do nothing."""

    def check(self) -> None:
        """Nothing can have failed."""

    def offsets(self) -> dict[str, int]:
        """There are no logs."""
        return {}

    def roll_back(self, offsets: Mapping[str, int], progress: RunProgress) -> None:
        """Do nothing."""

    def finish(
        self, state: TrainState, progress: RunProgress, peak_memory: int, sums: Sums
    ) -> None:
        """Do nothing."""

    def close(self, status: Status = "failed") -> None:
        """Do nothing."""
