"""Interleaved timing: variants run alternately in one process, so that drifts in the speed of the
machine affect all of them.

Contract: the order is reversed in every second round, so that no variant always follows the same
          one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Timing(NamedTuple):
    """Seconds of one variant over all rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise at least one measurement."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def run_interleaved(
    variants: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Run every variant once per round.

    Args:
        variants: by name; each returns the seconds it measured.
        rounds: at least 1.

    Returns:
        Seconds by variant, one for each round.

    >>> run_interleaved({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=2)
    {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            measured[name].append(variants[name]())
    return measured


def stopwatch(
    work: Callable[[], object], synchronize: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    """A variant that times one call of `work`; `synchronize` waits for the device around it."""

    def measure() -> float:
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - start

    return measure
