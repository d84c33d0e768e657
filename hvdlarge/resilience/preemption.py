"""Requests to stop: signals, a file, a time limit. They only set a flag; the run stops between two
steps, on all ranks.

SIGUSR1, SIGUSR2 and SIGTERM reach the ranks when a scheduler or a user signals `mpirun`, or a
single rank. A flag that one rank has seen travels with the consistency check of the coming step, so
every rank stops after the same step.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

_SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT")
_LOOK_SECONDS = 1.0  # how often the run folder is looked at for the file STOP


class StopRequest:
    """Whether somebody wants the run to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None  # what asked first, for the user
        self._began = time.monotonic()
        self._stop_file: Path | None = None
        self._minutes: float | None = None
        self._next_look = 0.0

    def watch(self, stop_file: Path | None, after_minutes: float | None) -> None:
        """From now on also look at the clock and for a file.

        Args:
            stop_file: a file whose appearance asks for a stop; None on ranks that do not look. One
                from before is removed.
            after_minutes: a time limit since the start of this process, or None.
        """
        self._stop_file, self._minutes = stop_file, after_minutes
        self.consume_file()

    def install_handlers(self) -> None:
        """Let the signals set the flag from now on; a second Ctrl-C ends this process at once, as
        users expect.
        """
        for name in _SIGNALS:
            signal.signal(getattr(signal, name), self._heard)

    def requested(self) -> bool:
        """Whether a stop has been asked for. Cheap: the file is looked for once a second."""
        if self.reason is None:
            now = time.monotonic()
            if self._minutes is not None and now - self._began >= 60 * self._minutes:
                self.reason = f"the time limit of {self._minutes:g} minutes"
            elif self._stop_file is not None and now >= self._next_look:
                self._next_look = now + _LOOK_SECONDS
                if self._stop_file.exists():
                    self.reason = f"the file {self._stop_file}"
        return self.reason is not None

    def consume_file(self) -> None:
        """Remove the file that asked, so that the next start does not stop again."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.reason == name:
            os.write(2, b"hvdlarge: second Ctrl-C: leaving without a checkpoint\n")
            os._exit(130)
        self.reason = self.reason or name
