"""Timing by turns: what is compared runs alternately in one process, so that a machine's moods fall
on all alike.

Contract: pure. The order is turned round in every second round, so that none always runs after the
          same one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Timing(NamedTuple):
    """Seconds of one side over all rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The figures of some measurements, at least one."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def run_interleaved(
    sides: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Let every side measure itself once in each round.

    Args:
        sides: each returns the seconds that it measured.
        rounds: at least 1.

    >>> run_interleaved({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=2)
    {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            measured[name].append(sides[name]())
    return measured


def stopwatch(
    work: Callable[[], object], settle: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    """A side that runs `work` once and measures its seconds; `settle` waits for a device, before
    and after.
    """

    def measure() -> float:
        settle()
        begin = time.perf_counter()
        work()
        settle()
        return time.perf_counter() - begin

    return measure
