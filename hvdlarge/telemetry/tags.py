"""Flattens the records of a run into tags, the names of curves that dashboards group by prefix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from hvdlarge.config.job import AVERAGED
from hvdlarge.telemetry.timers import PHASES

_CLOCK = ("step", "epoch", "samples_seen", "time")
_SECONDS = {f"{phase}_seconds": phase for phase in PHASES}
_TEST_LOSSES = {"test_loss": "loss", f"{AVERAGED}test_loss": f"{AVERAGED}loss"}


class Tags:
    """Names the figures of one record after the other.

    The line of a step becomes `train/loss`, `train/lr` and so on, and `time/<phase>` in seconds;
    its mappings keep their names, as in `layers/<parameter>/trust_ratio`. An evaluation becomes
    `eval/loss` and `eval/<metric>`. `train/samples_per_second` is that of rank 0's measured phases
    since the line before. What is None or not finite has no tag.

    Args:
        samples_seen: before the first record.

    >>> tags = Tags(samples_seen=0)
    >>> tags({"step": 9, "global_batch": 32, "samples_seen": 320, "loss": 0.5,
    ...       "forward_seconds": 2.0, "layers": {"fc.weight": {"trust_ratio": 0.1}}})
    ... # doctest: +NORMALIZE_WHITESPACE
    {'train/global_batch': 32.0, 'train/samples_seen': 320.0, 'train/loss': 0.5,
     'time/forward': 2.0, 'layers/fc.weight/trust_ratio': 0.1, 'train/samples_per_second': 160.0}
    >>> tags({"step": 9, "samples_seen": 320, "test_loss": float("nan"), "accuracy": 0.9})
    {'eval/accuracy': 0.9}
    """

    def __init__(self, samples_seen: int) -> None:
        self._samples_before: int | None = samples_seen

    def __call__(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The figures of a record by tag, without those that are not finite."""
        pairs = self._evaluation(record) if "test_loss" in record else self._step(record)
        return {tag: float(value) for tag, value in pairs if _is_figure(value)}

    def roll_back(self) -> None:
        """Begin anew: how many samples were seen before the next record is not known."""
        self._samples_before = None

    def _evaluation(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in record.items():
            if name not in _CLOCK:
                yield f"eval/{_TEST_LOSSES.get(name, name)}", value

    def _step(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in record.items():
            if name in _SECONDS:
                yield f"time/{_SECONDS[name]}", value
            elif isinstance(value, Mapping):
                yield from _flattened(name, value)
            elif name not in ("step", "time"):
                yield f"train/{name}", value
        seconds = sum(record[name] for name in _SECONDS if name in record)
        if seconds > 0:  # a line of a step; other figures may have lines of their own
            samples, before = record["samples_seen"], self._samples_before
            if before is not None:
                yield "train/samples_per_second", (samples - before) / seconds
            self._samples_before = samples


def _flattened(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(f"{prefix}/{name}", value)
        else:
            yield f"{prefix}/{name}", value


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
