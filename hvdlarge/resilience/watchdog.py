"""Ends a run in which this rank makes no progress: a rank that hangs, is stopped or holds the
interpreter lock holds up all.

Horovod warns of a stall after four minutes at the earliest, never ends the run, and does not see a
rank that is frozen as a whole. A thread on every rank does: when a phase lasts longer than its
limit it prints where this rank stands, who is behind, and all stacks, and leaves with exit code 72;
the launcher then ends the others. A second line stands behind it that needs no interpreter lock
(hard_exit.py): MPI waits inside its own start for a rank that never comes, and holds that lock.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hvdlarge.exits import HUNG
from hvdlarge.resilience.hard_exit import HardExit

_LOOK_SECONDS = 0.5
_NOTE_SECONDS = 2.0
_SECOND_LINE_SECONDS, _SECOND_LINE_AT_THE_START_SECONDS = 30.0, 2.0


class Watchdog:
    """Watches the progress of one rank, between `start` and `stop`; before and after them nothing
    is armed.

    Args:
        rank: this worker.
        limits: seconds allowed for each phase by its name.
    """

    def __init__(self, rank: int, limits: Mapping[str, float]) -> None:
        self._rank = rank
        self._limits = dict(limits)
        self._phase, self._step = "start", -1
        self._since = self._armed = time.monotonic()
        self._notes: Path | None = None
        self._last_line = HardExit(HUNG)
        self._watching = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch, before Horovod or MPI can hang."""
        self._watching = True
        self._rearm()
        self._thread.start()

    def take_notes(self, folder: Path) -> None:
        """From now on note this rank's place in `folder` every few seconds, for the others and for
        an operator to read.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a note is a help, not a duty: a full disk must not end the run here
            return
        self._notes = folder

    def progress(self, phase: str, step: int | None = None) -> None:
        """Note that this rank has come to `phase` (of step `step`); its time starts now."""
        self._phase, self._since = phase, time.monotonic()
        if step is not None:
            self._step = step
        if self._since - self._armed > 1.0:  # arming starts a thread in C: not in every step
            self._rearm()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the `with` block as `phase`, then go back to the phase before it with a fresh
        start.
        """
        before = self._phase
        self.progress(phase)
        self._rearm()
        try:
            yield
        finally:
            self.progress(before)
            self._rearm()

    def stop(self) -> None:
        """The run has ended; watch no longer."""
        self._watching = False
        self._ended.set()
        self._last_line.disarm()

    def _limit(self) -> float:
        return self._limits.get(self._phase, self._limits["step"])

    def _rearm(self) -> None:
        if not self._watching:
            return
        self._armed = time.monotonic()
        after = (
            _SECOND_LINE_AT_THE_START_SECONDS if self._phase == "start" else _SECOND_LINE_SECONDS
        )
        self._last_line.arm(
            self._limit() + after,
            f"rank {self._rank} ({socket.gethostname()}) has not moved for {self._limit():g} s in "
            f"phase {self._phase}: something holds its interpreter, MPI that waits for another "
            "rank or a call into C (timeouts in the job). Stacks:",
        )

    def _watch(self) -> None:
        noted = 0.0
        while not self._ended.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if self._notes is not None and now - noted >= _NOTE_SECONDS:
                noted = now
                self._note()
            if now - self._since > self._limit():
                self._leave(now - self._since)

    def _note(self) -> None:
        note = {
            "rank": self._rank,
            "step": self._step,
            "phase": self._phase,
            "time": time.time(),
            "host": socket.gethostname(),
        }
        assert self._notes is not None
        try:
            aside = self._notes / f".rank_{self._rank}"
            aside.write_text(json.dumps(note))
            aside.replace(self._notes / f"rank_{self._rank}.json")
        except OSError:
            pass  # likewise

    def _leave(self, seconds: float) -> None:
        lines = [
            f"hvdlarge: error: rank {self._rank} ({socket.gethostname()}) has waited {seconds:.0f} "
            f"s in phase {self._phase} of step {self._step}; the limit is {self._limit():g} s "
            "(timeouts in the job). A rank hangs or is stopped.",
            *self._behind(),
            "the stacks of this rank:",
        ]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        os._exit(HUNG)

    def _behind(self) -> list[str]:
        """The ranks whose last note is old or of an earlier step, where the run folder is
        shared.
        """
        if self._notes is None:
            return []
        lines = []
        for path in sorted(self._notes.glob("rank_*.json")):
            try:
                note = json.loads(path.read_text())
                age = time.time() - note["time"]
                if note["rank"] != self._rank and (
                    age > 3 * _NOTE_SECONDS or note["step"] < self._step
                ):
                    seen = (
                        f"was last seen {age:.0f} s ago in phase {note['phase']} of step "
                        f"{note['step']}"
                    )
                    lines.append(f"rank {note['rank']} ({note['host']}) {seen}")
            except (OSError, ValueError, KeyError):
                continue
        return lines
