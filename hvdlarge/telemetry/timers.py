"""Measures the seconds of a step by phase, under the names that code, log and report share.

Contract: counts this worker's own seconds. Asynchronous work of a GPU is counted in the phase
          in which the host waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("decide", "fetch", "forward", "backward", "allreduce", "update", "measure", "save")


class PhaseTimers:
    """Seconds spent in each phase since the last `read`.

    >>> timers = PhaseTimers()
    >>> with timers("forward"):
    ...     pass
    >>> sorted(timers.read())
    ['forward_seconds']
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the `with` block to `phase`, one of PHASES.

        Raises:
            ValueError: if there is no such phase.
        """
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}; the phases are {', '.join(PHASES)}")
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds by phase as `<phase>_seconds`, in the order of PHASES; resets the timers."""
        seconds, self._seconds = self._seconds, {}
        return {f"{phase}_seconds": seconds[phase] for phase in PHASES if phase in seconds}
