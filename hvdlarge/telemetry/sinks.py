"""Receivers of the records of a run: the interface, and the files metrics.jsonl and
decisions.jsonl. Rank 0 only.

The files belong to every run. Those that a job adds (log.sinks) run behind background_sink.py.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from hvdlarge.schedule.decision import Decision
from hvdlarge.telemetry.run_folder import without_nonfinite

# finished: after the last step; stopped: on request, to be resumed; failed: any other end
Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class SinkRun:
    """The run whose records a sink receives, at this start."""

    name: str
    folder: Path  # of the run
    job: Mapping[str, Any]  # every key with its value; of secrets in `args` the SHA-256
    world_size: int  # workers
    training_samples: int
    test_samples: int | None  # None without a test set
    # The first step to be recorded now, from 0. Records of it and of later steps that an earlier
    # start has left are void: these steps are taken again
    step: int
    samples_seen: int  # before that step


class Sink:
    """Receives the records of a run, in order.

    The run log (run_log.py) calls all methods but `start` of the log files: there an OSError from
    any but `close` ends the run on every rank as a failed write. Those of a sink that a job names
    are called by background_sink.py, in a thread of its own. Each does nothing here; deriving from
    this is optional, and what a class lacks is not called.
    """

    def start(self, run: SinkRun) -> None:
        """Called once, before the first record of this start of the run."""

    def decision(self, record: Mapping[str, Any]) -> None:
        """The decision for a step, under the names of `schedule.decision.Decision`; that of the
        first step of a larger batch also has `grew_from`.
        """

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Measured values by name, always with `step`, `epoch` and `samples_seen`; may be
        non-finite.
        """

    def roll_back(self, step: int, offsets: Mapping[str, int]) -> None:
        """Drop the records of step `step` and all later ones: these steps are taken again.
        `offsets` is where the log files ended before them, by name, in bytes.
        """

    def end(self, status: Status) -> None:
        """How this start of the run has ended; `close` follows. Not called if the process is
        killed.
        """

    def close(self) -> None:
        """Write what is left; nothing is received afterwards."""


class JsonlFiles(Sink):
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
