"""Receivers of the records of a run: the interface, and the files metrics.jsonl and
decisions.jsonl. Rank 0 only.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from hvdlarge.schedule.decision import Decision
from hvdlarge.telemetry.run_folder import without_nonfinite


class Sink(Protocol):
    """Receives the records of a run, in order, from the run log (run_log.py).

    An OSError from any method but `close` ends the run on every rank as a failed write.
    """

    def decision(self, record: Mapping[str, Any]) -> None:
        """The decision for a step, under the names of `schedule.decision.Decision`; that of the
        first step of a larger batch also has `grew_from`.
        """
        ...

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Measured values by name, always with `step`, `epoch` and `samples_seen`; may be
        non-finite.
        """
        ...

    def roll_back(self, step: int, offsets: Mapping[str, int]) -> None:
        """Drop the records of step `step` and all later ones: these steps are taken again.
        `offsets` is where the log files ended before them, by name, in bytes.
        """
        ...

    def close(self) -> None:
        """Write what is left; nothing is received afterwards."""
        ...


class JsonlFiles:
    """metrics.jsonl and decisions.jsonl: one JSON object a line.

    Args:
        folder: the run folder.
        offsets: where each file goes on, by its name, in bytes; what stands after that is cut off.

    Raises:
        OSError: if they cannot be opened.
    """

    def __init__(self, folder: Path, offsets: Mapping[str, int]) -> None:
        self._files = {
            name: _open_at(folder / f"{name}.jsonl", offsets.get(name, 0))
            for name in ("metrics", "decisions")
        }

    def decision(self, record: Mapping[str, Any]) -> None:
        """Append to decisions.jsonl."""
        self._files["decisions"].write(json_line(record) + "\n")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append to metrics.jsonl, and flush both files."""
        self._files["metrics"].write(json_line(record) + "\n")
        self.flush()

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        for file in self._files.values():
            file.flush()

    def offsets(self) -> dict[str, int]:
        """Where each file ends now, by its name, in bytes."""
        self.flush()
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def roll_back(self, step: int, offsets: Mapping[str, int]) -> None:
        """Cut the files off at `offsets`."""
        self.flush()
        for name, file in self._files.items():
            file.truncate(offsets[name])

    def close(self) -> None:
        """Close the files; the run log has reported what could not be written."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()


def _open_at(path: Path, offset: int) -> IO[str]:
    """Open a log to go on at `offset` bytes; what stands after it is cut off."""
    file = path.open("a", encoding="utf-8")
    file.truncate(min(offset, os.fstat(file.fileno()).st_size))
    return file


def decision_record(decision: Decision, batch_before: int) -> dict[str, int | float | bool]:
    """A decision as the record that sinks receive.

    Args:
        decision: of a step.
        batch_before: the stage's batch of the step before it; 0 for the first step.
    """
    grew = {} if batch_before in (0, decision.stage_batch) else {"grew_from": batch_before}
    return decision.to_plain() | grew


def json_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON, without the newline; non-finite numbers become strings."""
    return json.dumps(without_nonfinite(record), allow_nan=False)
