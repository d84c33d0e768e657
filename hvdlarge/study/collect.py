"""The result of a run, from its folder and how it ended."""

from __future__ import annotations

import bisect
import contextlib
import math
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hvdlarge import exits
from hvdlarge.reporting.run_reader import RunRecords
from hvdlarge.reporting.thinning import Array
from hvdlarge.study.results import Point, RunResult

_MOST_POINTS = 400  # of a series in a record
_LARGE_FILES = ("checkpoints", "initial_weights.pt", "progress", ".lock")
State = Literal["finished", "diverged", "failed", "pruned"]


class MissingMetricError(exits.JobError):
    """A run has finished without the metric of the study."""


def result_of_run(
    folder: Path,
    how: Mapping[str, Any],
    metric: str,
    tuned_by: str,
    end: tuple[State, str],
) -> RunResult:
    """The result of a run.

    Args:
        folder: of the run.
        how: `cell`, `kind`, `number`, `seed` and `settings` of the result.
        metric: of the study.
        tuned_by: the metric of the tuning, if it is another one; else empty.
        end: the state, `finished` if the run says so, and the reason.

    Raises:
        MissingMetricError: if it has finished without the metric.
    """
    state, reason = end
    if not (folder / "job.resolved.yaml").is_file():
        return RunResult(**how, state=state, reason=reason)
    run = RunRecords(folder, folder.name, [])
    run.update()
    summary: Mapping[str, Any] = run.summary
    value = score = None
    if state == "finished":
        if missing := next((key for key in (metric, tuned_by) if key and key not in summary), ""):
            numbers = [key for key, each in summary.items() if isinstance(each, (int, float))]
            raise MissingMetricError(
                f"the run in {folder} has finished, but its summary has no {missing!r}; it has "
                f"{', '.join(numbers)}"
            )
        value = _finite(summary[metric])
        if value is None:
            state, reason = "diverged", f"{metric} is {summary[metric]}"
        elif tuned_by:
            score = _finite(summary[tuned_by])
    log = run.metrics
    rates = log.steps["lr"].rows()
    results = log.results.get(metric)
    batches = log.steps["global_batch"].rows()
    return RunResult(
        **how,
        state=state,
        reason=reason,
        value=value,
        score=score,
        batch=_first_batch(run.job, batches),
        steps=_whole(summary.get("steps")) or round(log.position[0]),
        epochs=_finite(summary.get("epochs")) or log.position[1],
        seconds=_finite(summary.get("train_seconds")) or log.position[2],
        curve=() if results is None else _points(results.rows(), rates),
        distance=_points(log.distance.rows(), rates),
        noise=_points(log.noise.rows(), rates),
    )


def end_of(code: int, reason: str) -> tuple[State, str]:
    """The state of a run that ended with an exit code, and the reason in words.

    >>> end_of(0, "")
    ('finished', '')
    >>> end_of(-11, "")
    ('failed', 'ended by SIGSEGV')
    """
    if code == exits.FINISHED:
        return "finished", ""
    if code == exits.DIVERGED:
        return "diverged", reason or "loss or weights are not finite"
    if code < 0:
        with contextlib.suppress(ValueError):
            return "failed", f"ended by {signal.Signals(-code).name}"
    return "failed", reason or f"exit code {code}"


def remove_large_files(folder: Path) -> None:
    """Remove what only a run that goes on needs."""
    for name in _LARGE_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _points(rows: Array, rates: Array) -> tuple[Point, ...]:
    """Rows of (updates, epoch, seconds, value) with the learning rate that was last logged."""
    every = max(1, math.ceil(len(rows) / _MOST_POINTS))
    kept = [row for number, row in enumerate(rows) if (len(rows) - 1 - number) % every == 0]
    updates = [row[0] for row in rates]
    points = []
    for step, epoch, _, value in kept:
        at = bisect.bisect_right(updates, step) - 1
        lr = float(rates[at][3]) if at >= 0 else None
        points.append(Point(round(step), float(epoch), float(value), lr))
    return tuple(points)


def _first_batch(job: Mapping[str, Any], batches: Array) -> int | None:
    if len(batches):
        # The mean of the first steps is their batch, unless it grew among them
        batch = job.get("batch")
        written = batch.get("initial") or batch.get("base") if isinstance(batch, Mapping) else None
        return written if isinstance(written, int) else round(batches[0][3])
    return None


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
