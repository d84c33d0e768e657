"""Reads the folder of a run: finished, going on, killed, or cut off in the middle of a line.

Contract: bounded memory, whatever the size of the files: of each kind of line at most so many are
          kept, evenly spaced, and the last. Nothing of the engine is imported but its errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdlarge.exits import JobError

_MOST_LINES = 2000  # of a kind
_MOST_LAYER_LINES = 200  # each holds four numbers for every parameter
_LONGEST_LINE = 4 * 2**20  # bytes; that of ten thousand parameters has a million
_PHASES_END = "_seconds"


class Thinned:
    """A sequence of which at most `most` items are kept, evenly spaced, and the last.

    >>> kept = Thinned(most=4)
    >>> for number in range(10):
    ...     kept.append(number)
    >>> list(kept)
    [0, 4, 8, 9]
    """

    def __init__(self, most: int) -> None:
        self._most, self._stride, self._count = most, 1, 0
        self._items: list[Any] = []
        self._last: Any = None

    def append(self, item: Any) -> None:
        """Add an item, which may be dropped later."""
        if self._count % self._stride == 0:
            if len(self._items) == self._most:
                del self._items[1::2]
                self._stride *= 2
            if self._count % self._stride == 0:
                self._items.append(item)
        self._last = item
        self._count += 1

    def __iter__(self) -> Iterator[Any]:
        yield from self._items
        if self._count and (self._count - 1) % self._stride:
            yield self._last

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _thinned() -> Thinned:
    return Thinned(_MOST_LINES)


@dataclass
class RunRecords:
    """What a run folder holds."""

    name: str
    folder: Path
    steps: Thinned = field(default_factory=_thinned)
    evaluations: Thinned = field(default_factory=_thinned)
    layers: Thinned = field(default_factory=lambda: Thinned(_MOST_LAYER_LINES))
    noise: Thinned = field(default_factory=_thinned)
    distances: Thinned = field(default_factory=lambda: Thinned(_MOST_LAYER_LINES))
    stages: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)  # seconds
    summary: Mapping[str, Any] | None = None  # of a finished run
    environment: Mapping[str, Any] = field(default_factory=dict)
    starts: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # of what is missing or damaged


def read_run(folder: Path) -> RunRecords:
    """The records of a run.

    Raises:
        JobError: if the folder holds no run, or cannot be read.
    """
    try:
        if not (folder / "job.resolved.yaml").exists() and not (folder / "metrics.jsonl").exists():
            raise JobError(f"{folder}: no run folder: it has no metrics.jsonl")
        run = RunRecords(folder.resolve().name, folder)
        run.summary = _json(folder / "summary.json", run)
        run.environment = _json(folder / "environment.json", run) or {}
        for line in _lines(folder / "starts.jsonl", run):
            run.starts.append(line)
        _read_decisions(folder / "decisions.jsonl", run)
        _read_metrics(folder / "metrics.jsonl", run)
    except OSError as error:
        raise JobError(f"{folder}: cannot be read: {error.strerror}") from None
    if not len(run.steps):
        run.notes.append("metrics.jsonl has no line of a step yet")
    if run.summary is None:
        run.notes.append("summary.json is missing: the run has not ended, or was killed")
    return run


def _json(path: Path, run: RunRecords) -> Mapping[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        run.notes.append(f"{path.name} is damaged")
        return None
    return content if isinstance(content, dict) else None


def _lines(path: Path, run: RunRecords) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; what is none is counted in a note."""
    damaged = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    # The last line of a run that goes on may be half written
                    damaged += bool(line.endswith(b"\n") or len(line) == _LONGEST_LINE)
                    continue
                if isinstance(record, dict):
                    yield record
                else:
                    damaged += 1
    except FileNotFoundError:
        run.notes.append(f"{path.name} is missing")
    if damaged:
        run.notes.append(f"{damaged:,} lines of {path.name} are no JSON objects, and were left out")


def _read_decisions(path: Path, run: RunRecords) -> None:
    """The stages: where each begins, its batch, steps and lrs."""
    for line in _lines(path, run):
        try:
            if not run.stages or line["stage"] != run.stages[-1]["stage"]:
                first = {key: line[key] for key in ("stage", "epoch", "step", "stage_batch", "lr")}
                run.stages.append(first | {"steps": 0, "lr_highest": line["lr"]})
            stage = run.stages[-1]
            stage["steps"] += 1
            stage["lr_last"] = line["lr"]
            stage["lr_highest"] = max(stage["lr_highest"], line["lr"])
        except (KeyError, TypeError):
            continue


def _read_metrics(path: Path, run: RunRecords) -> None:
    seconds, began, foreign = 0.0, None, 0
    for line in _lines(path, run):
        if not all(_is_number(line.get(key)) for key in ("step", "epoch", "samples_seen")):
            foreign += 1
            continue
        phases = {
            key.removesuffix(_PHASES_END): value
            for key, value in line.items()
            if key.endswith(_PHASES_END) and _is_number(value)
        }
        seconds += sum(phases.values())
        for phase, value in phases.items():
            run.phases[phase] = run.phases.get(phase, 0.0) + value
        if _is_number(line.get("time")):
            began = line["time"] - seconds if began is None else began
            line["seconds"] = line["time"] - began
        else:
            line["seconds"] = seconds
        _kind_of(line, run).append(line)
    if foreign:
        run.notes.append(f"{foreign:,} lines of {path.name} have no step, and were left out")


def _kind_of(line: Mapping[str, Any], run: RunRecords) -> Thinned:
    for key, kind in (
        ("lr", run.steps),
        ("layers", run.layers),
        ("noise_scale", run.noise),
        ("weight_distance", run.distances),
    ):
        if key in line:
            return kind
    return run.evaluations


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def column(lines: Thinned, *keys: str) -> list[tuple[float, ...]]:
    """Numbers of those lines that have all the keys as numbers."""
    return [
        tuple(float(line[key]) for key in keys)
        for line in lines
        if all(_is_number(line.get(key)) for key in keys)
    ]


def metrics_of(run: RunRecords) -> list[str]:
    """The names of the metrics of a run's evaluations, `test_loss` not among them."""
    known = {"step", "epoch", "samples_seen", "time", "seconds", "test_loss"}
    names: dict[str, None] = {}
    for line in run.evaluations:
        names |= dict.fromkeys(
            key
            for key, value in line.items()
            if key not in known and _is_number(value) and not key.endswith(_PHASES_END)
        )
    return list(names)
