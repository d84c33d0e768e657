"""The folder of a study: what it is a study of, the records of its runs, and its locks.

The file `runs/CELL/RUN.json` decides that a run has ended; it is written at once or not at all.
Everything else can be made again. Processes on any hosts share the folder: a lock of the file
system is held while one of them chooses its next run, and one for each run while it trains. All
are released when the process that holds them ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from hvdlarge import __version__
from hvdlarge.exits import CheckpointWriteError, JobError
from hvdlarge.study.results import Level, Point, Range, RunResult, Setup

DOCUMENT = "study.json"
SETUP = "setup.json"
JOURNAL = "optuna.journal"
_CHOOSE = "choose"  # the lock under which runs are chosen
_WORKERS = "workers"  # the lock that all processes that work on the study share
_POINTS = ("curve", "distance", "noise")
_INTACT = "what the study has recorded is kept; run the same command again once it can be written"
_MOST_NAMED = 8  # keys in a message
_State = tuple[int, int, int]  # of a file


class RunName(NamedTuple):
    """A run of a study, by the name of its cell."""

    slug: str
    kind: str
    number: int

    @property
    def text(self) -> str:
        """As `trial-003`."""
        return f"{self.kind}-{self.number:03}"


class StudyFolder:
    """The folder of a study.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[RunName, tuple[_State, RunResult]] = {}
        self._opened: Mapping[str, Any] = {}

    # --- what it is a study of

    def open(self, document: Mapping[str, Any], extend: bool) -> list[str]:
        """Begin a study here, or go on with it; returns notes for the user.

        Args:
            document: what decides the results of the runs, as plain values.
            extend: accept cells and repetitions that were added.

        Raises:
            JobError: if the folder holds something else, or runs of another version of the study.
            CheckpointWriteError: if it cannot be written.
        """
        written = {"hvdlarge": __version__, **document}
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._document()  # before anything is written to a folder that is not ours
            (self.path / "locks").mkdir(exist_ok=True)
            with self.exclusive():
                earlier = self._document()
                if earlier is None or (earlier != written and self._has_not_begun()):
                    self._clear()
                    write_atomically(self.path / DOCUMENT, _as_json(written))
                    self._opened = written
                    return []
                notes = _compare(self.path, earlier, written, extend)
                kept = {**written, "hvdlarge": earlier.get("hvdlarge")}  # which has begun it
                if kept != earlier:
                    write_atomically(self.path / DOCUMENT, _as_json(kept))
                self._opened = kept
                return notes

    def check_unchanged(self) -> None:
        """See that the folder is still of the study that was opened, which another process may have
        extended. Before the first end of a run it may have begun another version here.

        Raises:
            JobError: if it is another one.
        """
        changed, _ = _changes(self._opened, self._document() or {})
        if changed:
            raise JobError(
                f"{self.path} has been opened with another version of the study file since this "
                f"process began: {_listed(changed)}"
            )

    def _has_not_begun(self) -> bool:
        """Whether no run has ended, or is trained by another process."""
        if self.records():
            return False
        for path in (self.path / "locks").iterdir():
            if path.name not in (_CHOOSE, _WORKERS):
                with _open_lock(path) as file:
                    if not _lock(file, wait=False):
                        return False
        return True

    def _clear(self) -> None:
        """Remove what is left of a study none of whose runs has ended."""
        shutil.rmtree(self.path / "runs", ignore_errors=True)
        for name in (JOURNAL, "job.yaml", SETUP):
            (self.path / name).unlink(missing_ok=True)

    def _document(self) -> dict[str, Any] | None:
        path = self.path / DOCUMENT
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            others = [
                each.name
                for each in self.path.iterdir()
                if each.name != "locks" and not each.name.startswith(".")
            ]
            if others:
                raise JobError(
                    f"{self.path} is not empty and holds no study ({', '.join(sorted(others)[:3])}"
                    f"{' …' if len(others) > 3 else ''}); name another --folder"
                ) from None
            return None
        except ValueError:
            raise JobError(
                f"{path} is damaged: it does not say of which study the folder is; name another "
                "--folder"
            ) from None
        return content if isinstance(content, dict) else {}

    # --- records

    def records(self) -> dict[RunName, RunResult]:
        """Every run that has ended."""
        found = {}
        for path in sorted((self.path / "runs").glob("*/*.json")):
            kind, _, number = path.stem.rpartition("-")
            if kind and number.isdecimal():
                name = RunName(path.parent.name, kind, int(number))
                with contextlib.suppress(FileNotFoundError):  # another process has discarded it
                    state = _state_of(path)
                    known = self._records.get(name)
                    if known is None or known[0] != state:
                        known = state, _read_record(path)
                    found[name] = known
        self._records = found
        return {name: result for name, (_, result) in found.items()}

    def write_record(self, name: RunName, result: RunResult) -> None:
        """Record the end of a run.

        Raises:
            CheckpointWriteError: if it cannot be written.
        """
        path = self.record_path(name)
        with writing(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, record_json(result))

    def forget_failed(self) -> int:
        """Discard failed runs, so that they are trained again; how many."""
        with writing(self.path), self.exclusive():
            failed = [name for name, each in self.records().items() if each.state == "failed"]
            return sum(self.discard(name) for name in failed)

    def discard(self, name: RunName) -> bool:
        """Remove the record and the folder of a run, so that it is trained again; whether it is
        done: not while a process has its claim. The caller holds the lock of all processes.
        """
        with _open_lock(self._claim_path(name)) as file:
            if not _lock(file, wait=False):
                return False
            shutil.rmtree(self.run_folder(name), ignore_errors=True)
            self.record_path(name).unlink(missing_ok=True)
            return True

    def record_path(self, name: RunName) -> Path:
        """The file of a record."""
        return self.path / "runs" / name.slug / f"{name.text}.json"

    def run_folder(self, name: RunName) -> Path:
        """The folder in which a run trains."""
        return self.path / "runs" / name.slug / name.text

    def output_path(self, name: RunName) -> Path:
        """What a run printed."""
        return self.path / "runs" / name.slug / f"{name.text}.txt"

    # --- locks

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock under which processes choose runs, one at a time."""
        with _open_lock(self.path / "locks" / _CHOOSE) as file:
            _lock(file, wait=True)
            yield

    def claim(self, name: RunName) -> IO[str] | None:
        """The lock of a run, held until the file is closed here and in processes that inherit it;
        None if another process has it, or has just recorded its end.
        """
        file = _open_lock(self._claim_path(name))
        if _lock(file, wait=False) and not self.record_path(name).exists():
            return file
        file.close()
        return None

    def _claim_path(self, name: RunName) -> Path:
        return self.path / "locks" / f"{name.slug}.{name.text}"

    def join(self) -> IO[str]:
        """Be one of the processes that work on the study, until the file is closed."""
        file = _open_lock(self.path / "locks" / _WORKERS)
        _lock(file, wait=True, kind=fcntl.LOCK_SH)
        return file

    def is_shared(self, joined: IO[str]) -> bool:
        """Whether other processes work on the study.

        Args:
            joined: what `join` has returned.
        """
        with self.exclusive():  # who fails to lock a file for itself loses it for a moment
            alone = _lock(joined, wait=False)
            _lock(joined, wait=True, kind=fcntl.LOCK_SH)
        return not alone


def read_results(folder: Path) -> list[RunResult]:
    """The results of a study, in the order of their files.

    Raises:
        JobError: if a record is damaged.
    """
    return list(StudyFolder(folder).records().values())


def is_study(folder: Path) -> bool:
    """Whether a folder is a study's."""
    return (folder / DOCUMENT).is_file()


def write_setup(folder: Path, setup: Setup, analysis: Sequence[Mapping[str, Any]]) -> None:
    """Write what a report needs of the study file.

    Args:
        folder: of the study.
        setup: of the study.
        analysis: the sections of the file's list, as plain values.

    Raises:
        CheckpointWriteError: if it cannot be written.
    """
    values = {
        **asdict(setup),
        "ranges": [
            [list(cell), {key: list(each) for key, each in ranges.items()}]
            for cell, ranges in setup.ranges.items()
        ],
        "tuned_at": [
            [list(cell), None if at is None else list(at)] for cell, at in setup.tuned_at.items()
        ],
    }
    with writing(folder):
        write_atomically(folder / SETUP, _as_json({"setup": values, "analysis": list(analysis)}))


def read_setup(folder: Path) -> tuple[Setup, list[Mapping[str, Any]]]:
    """What `write_setup` has written.

    Raises:
        JobError: if it is missing or damaged.
    """
    path = folder / SETUP
    try:
        content = json.loads(path.read_bytes())
        values = content["setup"]
        setup = Setup(
            **{
                **values,
                "factors": {
                    name: tuple(Level(*level) for level in levels)
                    for name, levels in values["factors"].items()
                },
                "cells": tuple(map(tuple, values["cells"])),
                "ranges": {
                    tuple(cell): {key: Range(*each) for key, each in ranges.items()}
                    for cell, ranges in values["ranges"]
                },
                "tuned_at": {
                    tuple(cell): None if at is None else tuple(at)
                    for cell, at in values["tuned_at"]
                },
            }
        )
        return setup, list(content["analysis"])
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, AttributeError):
        raise JobError(
            f"{path} is damaged; the command that runs the study writes it anew"
        ) from None


def record_json(result: RunResult) -> str:
    """A result as one line of JSON."""
    return json.dumps(asdict(result), allow_nan=False) + "\n"


def result_of(values: Mapping[str, Any]) -> RunResult:
    """The result that `record_json` has written.

    Raises:
        TypeError, ValueError: if it is none.
    """
    points = {key: tuple(Point(*point) for point in values.get(key, ())) for key in _POINTS}
    return RunResult(**{**values, **points, "cell": tuple(values["cell"])})


def _read_record(path: Path) -> RunResult:
    try:
        return result_of(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, AttributeError):
        raise JobError(f"{path} is damaged; remove it, and its run is trained again") from None


def _state_of(path: Path) -> _State:
    """What changes when a file is written anew."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the folder, the reason and the free space if something cannot be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointWriteError.of(f"the study in {folder}", folder, error, _INTACT) from None


def write_atomically(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    # Processes on other hosts may have the same number
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _as_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"


def _open_lock(path: Path) -> IO[str]:
    return path.open("a+", encoding="utf-8")  # NFS shares locks only of files that can be read


def _lock(file: IO[str], wait: bool, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file, for one process or shared; whether it is.

    Raises:
        JobError: if the file system has no locks.
    """
    try:
        fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise JobError(
            f"{file.name} cannot be locked ({error.strerror}): the folder of a study must be on a "
            "file system with locks"
        ) from None
    return True


# --- changes of a study


def _compare(
    folder: Path, earlier: Mapping[str, Any], new: Mapping[str, Any], extend: bool
) -> list[str]:
    """See that runs of an earlier version of a study are those of the new one.

    Raises:
        JobError: naming what differs.
    """
    if earlier.get("name") != new["name"]:
        raise JobError(
            f"{folder} is the folder of the study {earlier.get('name')!r}, not of {new['name']!r}; "
            "name another --folder"
        )
    notes = []
    if earlier.get("hvdlarge") != new["hvdlarge"]:
        notes.append(
            f"the study was begun with hvdlarge {earlier.get('hvdlarge')}; this is {__version__}"
        )
    changed, added = _changes(earlier, new)
    if changed:
        raise JobError(
            f"the study file has changed since {folder} was begun: {_listed(changed)}; undo that, "
            "or name another --folder"
        )
    if added and not extend:
        raise JobError(
            f"the study file has more than {folder} was begun with: {_listed(added)}; --extend "
            "adds it, or name another --folder"
        )
    return notes


def _changes(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What decides the results and is not as before, and the cells and seeds that were added."""
    apart = ("cells", "seeds", "hvdlarge")
    changed = differing_keys(
        {key: value for key, value in earlier.items() if key not in apart},
        {key: value for key, value in new.items() if key not in apart},
    )
    before, after = earlier.get("cells", {}), new.get("cells", {})
    for cell in before:
        if cell not in after:
            changed.append(f"cell {cell} is gone")
        elif before[cell] != after[cell]:
            keys = differing_keys(before[cell], after[cell])
            changed += [f"{key} of cell {cell}" for key in keys]
    seeds_before, seeds = list(earlier.get("seeds", [])), list(new.get("seeds", []))
    if seeds[: len(seeds_before)] != seeds_before:
        changed.append("seeds")
    added = [cell for cell in after if cell not in before]
    return changed, added + [f"seed {each}" for each in seeds[len(seeds_before) :]]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return f"{', '.join(names[:_MOST_NAMED])}{f' and {more} more' if more > 0 else ''}"


def differing_keys(one: Any, other: Any, prefix: str = "") -> list[str]:
    """The keys in which plain values differ, as `job.lr.base`.

    >>> differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
    ['a.c', 'd']
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found = []
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                found.append(f"{prefix}{key}")
            else:
                found += differing_keys(one[key], other[key], f"{prefix}{key}.")
        return found
    return [] if one == other else [prefix.rstrip(".")]
