"""Where the time of a step goes: seconds by phase, under the names that code, log and report share.

Contract: pure; counts this worker's own seconds. Work that a GPU does later is counted where the
          host waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("decide", "fetch", "forward", "backward", "allreduce", "update", "measure", "save")


class PhaseTimers:
    """Seconds spent in each phase since the last reading.

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
        """Count the time of the `with` block under `phase`, one of PHASES."""
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}; the phases are {', '.join(PHASES)}")
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Seconds by phase as `<phase>_seconds`, in the order of PHASES; counting begins again."""
        seconds, self._seconds = self._seconds, {}
        return {f"{phase}_seconds": seconds[phase] for phase in PHASES if phase in seconds}
