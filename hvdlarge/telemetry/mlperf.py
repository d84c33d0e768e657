"""The sink `mlperf`: <run folder>/mlperf.log, with lines in the form of MLPerf's training logs.

Source:   MLPerf Training rules, "Result logging", and the package mlperf-logging, whose compliance
          checker reads the file: https://github.com/mlcommons/logging
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlarge.telemetry.sinks import Sink, SinkRun, Status

_POINT, _START, _STOP = "POINT_IN_TIME", "INTERVAL_START", "INTERVAL_END"


class MlperfLog(Sink):
    """Writes MLPerf's events.

    `init_start` is the start of rank 0's process; `run_start` is the first step. An epoch begins
    and stops with a step. A resumed run goes on in the same file, without the events of the steps
    that are taken again; the time between its starts counts.

    Args:
        benchmark: `submission_benchmark`, such as resnet.
        org: `submission_org`.
        platform: `submission_platform`.
        division: `submission_division`, open or closed.
        status: `submission_status`, such as onprem, cloud or research.
        metric: the result that is logged as `eval_accuracy`; default: the first of the evaluation
            but the loss.
        target: of that result, at which the run has succeeded; default: when it finishes.
        higher_is_better: whether it must be at least `target`, or at most.
        cache_cleared: whether caches were cleared before the start, which only the user can know;
            then `cache_clear` is logged.
    """

    def __init__(
        self,
        benchmark: str,
        org: str = "",
        platform: str = "",
        division: str = "open",
        status: str = "research",
        metric: str | None = None,
        target: float | None = None,
        higher_is_better: bool = True,
        cache_cleared: bool = False,
    ) -> None:
        self._submission = {
            "submission_benchmark": benchmark,
            "submission_org": org,
            "submission_division": division,
            "submission_status": status,
            "submission_platform": platform,
        }
        self._metric, self._target, self._higher_is_better = metric, target, higher_is_better
        self._cache_cleared = cache_cleared
        self._events: list[dict[str, Any]] = []  # of the whole run: a few for each epoch
        self._epoch: int | None = None  # the one that has started, from 1
        self._step, self._time = 0, 0.0  # of the last record

    def start(self, run: SinkRun) -> None:
        """Begin the file, or go on with that of an earlier start."""
        path = run.folder / "mlperf.log"
        if run.step > 0 and path.exists():
            self._events = _read(path)
        self._path = path
        self._go_back_to(run.step)
        if not self._events:
            self._describe(run)

    def decision(self, record: Mapping[str, Any]) -> None:
        """Log the start of the run, and the epoch that a step begins."""
        self._step, self._time = record["step"], record["time"]
        if not any(event["key"] == "run_start" for event in self._events):
            self._log("init_stop", _STOP, None, self._time)
            self._log("run_start", _START, None, self._time)
        epoch = math.floor(record["epoch"]) + 1
        if epoch != self._epoch:
            self._stop_epoch()
            self._epoch = epoch
            self._log_in_epoch("epoch_start", _START, None)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Log an evaluation."""
        self._time = record["time"]
        if "test_loss" not in record:
            return
        other = ("step", "epoch", "samples_seen", "time", "test_loss", "evaluate_seconds")
        name = self._metric or next((name for name in record if name not in other), "test_loss")
        self._log_in_epoch("eval_start", _START, None, self._time - record["evaluate_seconds"])
        if name in record:
            self._log_in_epoch("eval_accuracy", _POINT, record[name])
        self._log_in_epoch("eval_stop", _STOP, None)

    def roll_back(self, step: int, offsets: Mapping[str, int]) -> None:
        """Remove the events of `step` and of later ones."""
        self._go_back_to(step)

    def end(self, status: Status) -> None:
        """Log the end of the run. A run that was stopped to be resumed has none."""
        if status == "stopped":
            return
        self._time = time.time()
        self._stop_epoch()
        outcome = "success" if status == "finished" and self._reached() else "aborted"
        self._log("run_stop", _STOP, None, self._time, status=outcome)

    def _describe(self, run: SinkRun) -> None:
        batch, optimizer = run.job["batch"], run.job["optimizer"]
        first, micro = batch["initial"] or batch["base"], batch["micro"]
        values = {
            "seed": run.job["seed"],
            "global_batch_size": first,
            "opt_name": optimizer["name"],
            "opt_base_learning_rate": run.job["lr"]["base"],
            "train_samples": run.training_samples,
            "eval_samples": run.test_samples or 0,
        }
        if isinstance(micro, int):
            values["gradient_accumulation_steps"] = math.ceil(
                math.ceil(first / micro) / run.world_size
            )
        began = _process_start()
        if self._cache_cleared:
            self._log("cache_clear", _POINT, True, began)
        self._log("init_start", _START, None, began)
        for key, value in {**self._submission, **values}.items():
            self._log(key, _POINT, value, time.time())

    def _reached(self) -> bool:
        """Whether a result has reached the target; True without one."""
        if self._target is None:
            return True
        values = [event["value"] for event in self._events if event["key"] == "eval_accuracy"]
        if self._higher_is_better:
            return any(value >= self._target for value in values)
        return any(value <= self._target for value in values)

    def _stop_epoch(self) -> None:
        if self._epoch is not None:
            self._log_in_epoch("epoch_stop", _STOP, None)
            self._epoch = None

    def _log_in_epoch(self, key: str, kind: str, value: Any, at: float | None = None) -> None:
        at = self._time if at is None else at
        self._log(key, kind, value, at, epoch_num=self._epoch, step=self._step)

    def _log(self, key: str, kind: str, value: Any, at: float, **metadata: Any) -> None:
        event = {
            "namespace": "hvdlarge",
            "time_ms": round(1000 * at),
            "event_type": kind,
            "key": key,
            "value": value,
            "metadata": metadata,
        }
        self._events.append(event)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(event))

    def _go_back_to(self, step: int) -> None:
        """Keep the events before `step`, and not the end of an earlier start."""
        self._events = [
            event
            for event in self._events
            if event["metadata"].get("step", -1) < step and event["key"] != "run_stop"
        ]
        self._path.write_text("".join(map(_line, self._events)), encoding="utf-8")
        epochs = [event for event in self._events if event["key"] in ("epoch_start", "epoch_stop")]
        started = bool(epochs) and epochs[-1]["key"] == "epoch_start"
        self._epoch = epochs[-1]["metadata"]["epoch_num"] if started else None


def _line(event: Mapping[str, Any]) -> str:
    return f":::MLLOG {json.dumps(event)}\n"


def _read(path: Path) -> list[dict[str, Any]]:
    # A kill may have cut the last line off
    lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    try:
        return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    except ValueError:
        raise ValueError(f"{path} holds lines of another kind; move it away") from None


def _process_start() -> float:
    """When this process started, in Unix seconds (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (
        time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    )
