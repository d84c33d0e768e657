"""Reads a run folder for a report: a finished run, one that goes on, was killed, or was resumed."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlarge.config import yaml_source
from hvdlarge.exits import JobError
from hvdlarge.reporting.jsonl import JsonLines, number
from hvdlarge.reporting.metrics_log import DecisionsLog, MetricsLog, Start
from hvdlarge.reporting.targets import Target

_FILES = ("metrics.jsonl", "job.resolved.yaml")  # one of them makes a folder a run
RUNNING_SECONDS = 60.0  # a rank notes its progress every 2 s, its clock may differ from ours
_LARGEST_DOCUMENT = 16 * 2**20  # bytes
_MOST_STARTS = 10_000


def find_run(name: str) -> Path:
    """The run folder that a command line names, by its path or as one of runs/.

    Raises:
        JobError: if it holds no run, or cannot be read.
    """
    try:
        for folder in (Path(name), Path("runs") / name):
            if any((folder / file).is_file() for file in _FILES):
                return folder
            if folder.is_dir():
                list(folder.iterdir())  # is_file hides a missing permission
    except OSError as error:
        raise JobError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise JobError(f"{name!r}: {error}") from None
    raise JobError(
        f"{name}: not a run folder: it has neither metrics.jsonl nor job.resolved.yaml (looked in "
        f"{Path.cwd()} and its runs/)"
    )


def find_runs(names: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """The run folders that a command line names, by labels that differ, and notes for the user.

    Raises:
        JobError: as find_run.
    """
    folders: dict[Path, Path] = {}  # as named, by what they are
    notes: list[str] = []
    for name in names:
        folder = find_run(name)
        if folder.resolve() in folders:
            notes.append(f"{name} is named twice: it is shown once")
        folders.setdefault(folder.resolve(), folder)
    return {_label(whole, [*folders]): folder for whole, folder in folders.items()}, notes


def _label(folder: Path, folders: Sequence[Path]) -> str:
    """The last parts of a folder's path, as many as no other folder ends with."""
    parts = folder.parts
    for length in range(1, len(parts)):
        if sum(other.parts[-length:] == parts[-length:] for other in folders) == 1:
            return "/".join(parts[-length:])
    return str(folder)


class RunRecords:
    """What is known of a run, from its folder; `update` reads what has been written since.

    Args:
        folder: of the run.
        label: to show.
        targets: results to reach.

    Attributes:
        metrics: the content of metrics.jsonl.
        decisions: that of decisions.jsonl.
        job, environment, summary: of the files of these names; empty if missing or damaged.
        starts: from starts.jsonl.
        last_seen: when the run wrote last, in seconds since 1970; None if unknown.
    """

    def __init__(self, folder: Path, label: str, targets: Sequence[Target] = ()) -> None:
        self.folder, self.label, self.targets = folder, label, tuple(targets)
        self._begin()

    def _begin(self) -> None:
        self.metrics_lines = JsonLines(self.folder / "metrics.jsonl")
        self.decision_lines = JsonLines(self.folder / "decisions.jsonl")
        self.problems: list[str] = []
        self.job = self._job()
        self.starts = self._starts()
        self.metrics = MetricsLog(self.starts, self.targets, self.job)
        self.decisions = DecisionsLog()

    def update(self) -> None:
        """Read what is new. Logs that were cut off, as a run does when it resumes, are read again.

        Raises:
            JobError: if a file cannot be read, or metrics.jsonl is not a run's.
        """
        try:
            if not (
                self.metrics_lines.continues()
                and self.decision_lines.continues()
                and len(self._starts()) == len(self.starts)
            ):
                self._begin()
            for record in self.metrics_lines.read():
                self.metrics.add(record)
            for record in self.decision_lines.read():
                self.decisions.add(record)
            self.environment = self._document("environment.json")
            self.summary = self._document("summary.json")
            self.last_seen = self._last_seen()
        except OSError as error:
            raise JobError(f"{error.filename}: cannot be read: {error.strerror}") from None
        lines = self.metrics_lines
        if self.metrics.records == 0 and (lines.bad or self.metrics.foreign or _is_binary(lines)):
            raise JobError(
                f"{lines.path}: not the log of a run: no line is a JSON object with step and epoch"
            )

    @property
    def state(self) -> str:
        """Whether the run is `finished`, `running` or `stopped`."""
        if self.summary:
            return "finished"
        if self.last_seen is not None and time.time() - self.last_seen < RUNNING_SECONDS:
            return "running"
        return "stopped"

    def lower_is_better(self, result: str) -> bool:
        """Whether smaller values of a result are better ones."""
        return Target(result, 0.0).is_lower(self.job)

    def notes(self) -> list[str]:
        """What is damaged or missing in the folder, in sentences."""
        lines, log = self.metrics_lines, self.metrics
        notes = list(self.problems)
        if not lines.path.exists():
            notes.append("metrics.jsonl is missing: the run has logged no step yet.")
        elif log.records == 0:
            notes.append("metrics.jsonl has no whole line yet.")
        for each in (lines, self.decision_lines):
            if each.bad:
                notes.append(
                    f"{each.path.name}: lines that cannot be read are left out: {each.bad:,}, the "
                    f"first is line {each.first_bad:,}."
                )
        if log.foreign:
            notes.append(
                f"metrics.jsonl: lines without step or epoch are left out: {log.foreign:,}."
            )
        if lines.incomplete and self.state != "running":
            notes.append("The last line of metrics.jsonl was cut off while it was written.")
        for name, bad in log.nonfinite.items():
            notes.append(
                f"Values of {name} that are not finite are left out: {bad.count:,}, the first at "
                f"epoch {bad.epoch:.4g}."
            )
        return notes

    def _document(self, name: str) -> dict[str, Any]:
        try:
            with (self.folder / name).open("rb") as file:
                content = json.loads(file.read(_LARGEST_DOCUMENT))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            return content
        problem = f"{name} is not a JSON object; it is left out."
        if problem not in self.problems:
            self.problems.append(problem)
        return {}

    def _job(self) -> dict[str, Any]:
        try:
            with (self.folder / "job.resolved.yaml").open("rb") as file:
                content = yaml_source.read(file.read(yaml_source.MAX_BYTES), fill_in=False).values
        except FileNotFoundError:
            self.problems.append("job.resolved.yaml is missing: the settings are not shown.")
            return {}
        except OSError as error:
            raise JobError(f"{error.filename}: cannot be read: {error.strerror}") from None
        except (yaml_source.SourceError, ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            return content
        self.problems.append("job.resolved.yaml cannot be read: the settings are not shown.")
        return {}

    def _starts(self) -> list[Start]:
        starts: list[Start] = []
        for record in JsonLines(self.folder / "starts.jsonl").read():
            if (step := number(record.get("step"))) is not None and len(starts) < _MOST_STARTS:
                workers = number(record.get("world_size"))
                starts.append(
                    Start(
                        _seconds_of(record.get("time")),
                        step,
                        int(workers) if workers is not None and math.isfinite(workers) else None,
                    )
                )
        return starts

    def _last_seen(self) -> float | None:
        seen = []
        for name in ("metrics.jsonl", "decisions.jsonl", "starts.jsonl", "job.resolved.yaml"):
            with contextlib.suppress(FileNotFoundError):
                seen.append((self.folder / name).stat().st_mtime)
        path = self.folder / "progress" / "rank_0.json"
        try:
            note = json.loads(path.read_bytes()[:10_000])
            seen.append(number(note.get("time")) or 0.0)
        except (OSError, ValueError, AttributeError):
            pass
        return max(seen, default=None)


def _is_binary(lines: JsonLines) -> bool:
    """Whether a log without a whole line begins with something else than an object."""
    if not lines.incomplete:
        return False
    with lines.path.open("rb") as file:
        return file.read(1) != b"{"


def _seconds_of(text: Any) -> float | None:
    """A time as starts.jsonl has it, `2026-11-27T02:22:29+0000`, in seconds since 1970; the middle
    of that second, since its fraction is not recorded.
    """
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp() + 0.5
    except (ValueError, TypeError, OverflowError):
        return None


def printable(text: str) -> str:
    r"""Text of a run on one line, without control characters and halves of surrogate pairs.

    >>> printable("a\x1b[31m b\n")
    'a�[31m b�'
    """
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def settings_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved job by their keys, as `lr.warmup.epochs`."""
    flat: dict[str, Any] = {}
    for key, value in job.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{key}.{name}": each for name, each in settings_of(value).items()})
        else:
            flat[str(key)] = value
    return flat
