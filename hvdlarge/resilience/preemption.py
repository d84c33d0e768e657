"""Requests to stop by a signal, a file or a time limit. They only set a flag; all ranks stop
together between two steps.

SIGUSR1, SIGUSR2 and SIGTERM reach the ranks when a scheduler or a user signals `mpirun` or a single
rank. The flag of one rank is sent with the consistency check of the next step, so every rank stops
after the same step.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT")
_POLL_SECONDS = 1.0  # how often to look for the file STOP


class StopRequest:
    """Whether the run has been asked to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None  # the first request, in words for the user
        self._start = time.monotonic()
        self._stop_file: Path | None = None
        self._minutes: float | None = None
        self._next_poll = 0.0
        self._interrupts = 0  # Ctrl-C so far
        self._replaced: dict[str, Any] = {}  # the handlers of the signals, by their names

    def watch(self, stop_file: Path | None, after_minutes: float | None) -> None:
        """Also watch for a file and a time limit.

        Args:
            stop_file: stop when this file appears; None: do not watch for one. An existing file is
                removed.
            after_minutes: a time limit, counted from the creation of this object; None: no limit.
        """
        self._stop_file, self._minutes = stop_file, after_minutes
        self.consume_file()

    def install_handlers(self) -> None:
        """Let the signals set the flag; a second Ctrl-C ends this process at once."""
        for name in _SIGNALS:
            self._replaced[name] = signal.signal(getattr(signal, name), self._on_signal)

    def restore_handlers(self) -> None:
        """Put back the handlers that `install_handlers` has replaced."""
        for name, handler in self._replaced.items():
            if handler is not None:  # None: installed from outside Python, which cannot restore it
                signal.signal(getattr(signal, name), handler)
        self._replaced = {}

    def requested(self) -> bool:
        """Whether a stop has been requested. Cheap: looks for the file once a second only."""
        if self.reason is None:
            now = time.monotonic()
            if self._minutes is not None and now - self._start >= 60 * self._minutes:
                self.reason = f"the time limit of {self._minutes:g} minutes"
            elif self._stop_file is not None and now >= self._next_poll:
                self._next_poll = now + _POLL_SECONDS
                if self._stop_file.exists():
                    self.reason = f"the file {self._stop_file}"
        return self.reason is not None

    def consume_file(self) -> None:
        """Remove the stop file, so that it does not stop the next start."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os.write(2, b"hvdlarge: second Ctrl-C: leaving without a checkpoint\n")
                os._exit(130)
        self.reason = self.reason or name
