"""Runs in words and tables: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hvdlarge.reporting.describe import columns, duration
from hvdlarge.reporting.run_reader import RunRecords, column


class Target(NamedTuple):
    """A metric and the value at which the time is read."""

    metric: str
    value: float


def time_to(run: RunRecords, target: Target) -> tuple[float, float] | None:
    """Epoch and seconds of the first evaluation that reaches the target; None if none does."""
    for epoch, seconds, value in column(run.evaluations, "epoch", "seconds", target.metric):
        if value >= target.value:
            return epoch, seconds
    return None


def run_rows(runs: Sequence[RunRecords], target: Target | None) -> list[tuple[str, ...]]:
    """A row for each run, below a row of titles."""
    titles = ["run", "workers", "state", "epochs", "steps", "time", "samples/s", "loss"]
    metrics = _last_metrics(runs)
    titles += metrics
    if target is not None:
        titles.append(f"time to {target.metric} {target.value:g}")
    return [tuple(titles), *(_run_row(run, metrics, target) for run in runs)]


def _last_metrics(runs: Sequence[RunRecords]) -> list[str]:
    names: dict[str, None] = {}
    for run in runs:
        for line in run.evaluations:
            hidden = ("step", "epoch", "samples_seen", "time", "seconds")
            names |= dict.fromkeys(
                key for key, value in line.items() if _shown(value) and key not in hidden
            )
    return list(names)[:4]


def _shown(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _run_row(run: RunRecords, metrics: Sequence[str], target: Target | None) -> tuple[str, ...]:
    last: dict[str, Any] = {}
    for line in (*run.steps, *run.evaluations):
        last |= {key: value for key, value in line.items() if _shown(value)}
    steps = column(run.steps, "step", "epoch", "samples_seen", "seconds")
    step, epoch, samples, seconds = steps[-1] if steps else (-1.0, 0.0, 0.0, 0.0)
    worlds = list(dict.fromkeys(str(start.get("world_size", "?")) for start in run.starts))
    cells = [
        run.name,
        ", then ".join(worlds) or "?",
        "finished" if run.summary is not None else "not finished",
        f"{epoch:.2f}",
        f"{step + 1:,.0f}",
        duration(seconds),
        f"{samples / seconds:,.0f}" if seconds > 0 else "—",
        _number(last.get("loss")),
        *(_number(last.get(name)) for name in metrics),
    ]
    if target is not None:
        reached = time_to(run, target)
        cells.append(
            "not reached" if reached is None else f"{duration(reached[1])}, epoch {reached[0]:.2f}"
        )
    return tuple(cells)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "—"


def stage_rows(run: RunRecords) -> list[tuple[str, ...]]:
    """A row for each stage of the batch, below a row of titles."""
    titles = (
        "stage",
        "from epoch",
        "from step",
        "steps",
        "global batch",
        "lr: first",
        "highest",
        "last",
    )
    return [
        titles,
        *(
            (
                f"{stage['stage']}",
                f"{stage['epoch']:.4g}",
                f"{stage['step']:,}",
                f"{stage['steps']:,}",
                f"{stage['stage_batch']:,}",
                f"{stage['lr']:.4g}",
                f"{stage['lr_highest']:.4g}",
                f"{stage['lr_last']:.4g}",
            )
            for stage in run.stages
        ),
    ]


def in_words(runs: Sequence[RunRecords], target: Target | None) -> list[str]:
    """The tables as lines for a terminal."""
    lines = [*columns(run_rows(runs, target))]
    for run in runs:
        lines += ["", f"{run.name}: stages", *columns(stage_rows(run))]
        if run.phases:
            total = sum(run.phases.values())
            shares = ", ".join(
                f"{name} {seconds / total:.0%}"
                for name, seconds in sorted(run.phases.items(), key=lambda item: -item[1])
                if seconds >= 0.005 * total
            )
            lines.append(f"time of steps: {shares}")
        lines += [f"note     {note}" for note in run.notes]
    return lines
