"""Ends a run that makes no progress, because some rank hangs, is stopped or holds the interpreter
lock.

Horovod warns of a stall after four minutes at the earliest, never ends the run, and does not notice
a rank that is frozen as a whole. So a thread on every rank watches it: when a phase exceeds its
time limit, the thread prints where this rank is, which ranks lag behind, and all stacks, and exits
with code 72; the launcher then ends the others. MPI holds the interpreter lock while it waits, in
its own start, for a rank that never comes; hard_exit.py is the fallback that does not need it.
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
from hvdlarge.resilience.stuck_launcher import kill_stuck_launcher

_POLL_SECONDS = 0.5
_NOTE_SECONDS = 2.0
# After the limit of a phase, for the thread to end the process first
_HARD_EXIT_DELAY_SECONDS, _HARD_EXIT_DELAY_AT_START_SECONDS = 30.0, 2.0


class Watchdog:
    """Watches the progress of this rank, from `start` to `stop`.

    Args:
        rank: this rank.
        limits: seconds allowed for each phase, by name; other phases have the limit of `step`.
    """

    def __init__(self, rank: int, limits: Mapping[str, float]) -> None:
        self._rank = rank
        self._limits = dict(limits)
        self._phase, self._step, self._times = "start", -1, 1
        self._since = self._armed = time.monotonic()
        self._armed_limit = 0.0  # of the phase in which the hard exit was armed
        self._notes: Path | None = None
        self._hard_exit = HardExit(HUNG)
        self._watching = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching. To be called before Horovod and MPI are initialized."""
        self._watching = True
        self._rearm()
        self._thread.start()

    def take_notes(self, folder: Path) -> None:
        """Write this rank's progress to a file in `folder` every 2 s, for the other ranks and for
        users.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._rank == 0:  # notes of an earlier start, which may have had more ranks
                for path in folder.glob("rank_*.json"):
                    path.unlink(missing_ok=True)
        except OSError:  # the notes are optional: a full disk must not end the run here
            return
        self._notes = folder

    def progress(self, phase: str, step: int | None = None, times: int = 1) -> None:
        """Report that this rank enters `phase` (of step `step`); the time limit starts anew.

        Args:
            phase: its name.
            step: None: as before.
            times: how many times the phase's limit it may take.
        """
        self._phase, self._times, self._since = phase, times, time.monotonic()
        if step is not None:
            self._step = step
        # Not in every step: arming starts a thread in C
        if self._since - self._armed > 1.0 or self._limit() > self._armed_limit:
            self._rearm()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the `with` block as `phase`, then return to the previous phase; the time limit
        starts anew at both.
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
        """Stop watching."""
        self._watching = False
        self._ended.set()
        self._hard_exit.disarm()

    def _limit(self) -> float:
        return self._times * self._limits.get(self._phase, self._limits["step"])

    def _rearm(self) -> None:
        if not self._watching:
            return
        self._armed, self._armed_limit = time.monotonic(), self._limit()
        delay = (
            _HARD_EXIT_DELAY_AT_START_SECONDS
            if self._phase == "start"
            else _HARD_EXIT_DELAY_SECONDS
        )
        self._hard_exit.arm(
            self._limit() + delay,
            f"rank {self._rank} ({socket.gethostname()}) has made no progress for "
            f"{self._limit():g} s in phase {self._phase}, and its interpreter lock is held: by MPI "
            "waiting for another rank, or by other C code (timeouts in the job). Stacks:",
        )

    def _watch(self) -> None:
        noted = 0.0
        while not self._ended.wait(_POLL_SECONDS):
            now = time.monotonic()
            if self._notes is not None and now - noted >= _NOTE_SECONDS:
                noted = now
                self._note()
            if now - self._since > self._limit():
                self._exit(now - self._since)

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
            temporary = self._notes / f".rank_{self._rank}"
            temporary.write_text(json.dumps(note))
            temporary.replace(self._notes / f"rank_{self._rank}.json")
        except OSError:
            pass  # optional, as above

    def _exit(self, seconds: float) -> None:
        lines = [
            f"hvdlarge: error: rank {self._rank} ({socket.gethostname()}) has waited {seconds:.0f} "
            f"s in phase {self._phase}{_of_step(self._step)}; the limit is {self._limit():g} s "
            "(timeouts in the job). A rank hangs or is stopped.",
            *self._lagging_ranks(),
            "the stacks of this rank:",
        ]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        kill_stuck_launcher()
        os._exit(HUNG)

    def _lagging_ranks(self) -> list[str]:
        """A line for each rank whose last note is old or of an earlier step, if the run folder is
        shared between hosts.
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
                        f"was last seen {age:.0f} s ago in phase {note['phase']}"
                        f"{_of_step(note['step'])}"
                    )
                    lines.append(f"rank {note['rank']} ({note['host']}) {seen}")
            except (OSError, ValueError, KeyError):
                continue
        return lines


def _of_step(step: int) -> str:
    """Names a step in a message; nothing before the first one."""
    return f" of step {step}" if step >= 0 else ""
