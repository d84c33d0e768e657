"""Reads a log of one JSON object a line while it is written, cut off, or damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_LARGEST = 1e100
LONGEST_LINE = 16 * 2**20  # bytes; a line of 10,000 layers takes a tenth of it


class JsonLines:
    """The lines of a log, of which each `read` yields those that are new.

    Attributes:
        good: lines that held an object, so far.
        bad: lines that did not.
        first_bad: number of the first of those, from 1; None if there is none.
        incomplete: whether the file ends within a line: it is being written, or its writer was
            killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.good = self.bad = 0
        self.first_bad: int | None = None
        self.incomplete = False
        self._offset = 0  # after the last whole line
        self._last = b""  # the end of that line

    def continues(self) -> bool:
        """Whether what was read still stands there: a run that resumes cuts its logs off first."""
        if self._offset == 0:
            return True
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                return file.read(len(self._last)) == self._last
        except FileNotFoundError:
            return False

    def read(self) -> Iterator[dict[str, Any]]:
        """The objects of the lines that are new and whole. A missing file has none.

        Raises:
            OSError: if the file cannot be read.
        """
        self.incomplete = False
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            while line := file.readline(LONGEST_LINE):
                fits = line.endswith(b"\n")
                if not fits and not _skip_line(file, line):
                    self.incomplete = True
                    return
                self._offset, self._last = file.tell(), line[-64:] if fits else b""
                record = _object(line) if fits else None
                if record is None:
                    if line.strip():
                        self.bad += 1
                        self.first_bad = self.first_bad or self.good + self.bad
                    continue
                self.good += 1
                yield record


def _skip_line(file: IO[bytes], line: bytes) -> bool:
    """Move to the end of a line that is too long; whether there is one."""
    while line and not line.endswith(b"\n"):
        line = file.readline(LONGEST_LINE)
    return bool(line)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also of UTF-8, and of integers of too many digits
        return None
    return record if isinstance(record, dict) else None


def number(value: Any) -> float | None:
    """A number of a log, where non-finite ones are strings; None for anything else. One beyond
    1e100 is infinite: so are its square, and the range of an axis with it.

    >>> number(3), number("nan"), number("3"), number(True), number(-1e200)
    (3.0, nan, None, None, -inf)
    """
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) <= _LARGEST else math.copysign(math.inf, found)


def finite(value: Any) -> float | None:
    """A finite number of a log; None for anything else."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None
