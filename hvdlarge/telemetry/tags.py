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


def tags(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a record by tag. What is None or not finite has no tag.

    The line of a step becomes `train/loss`, `train/lr` and so on, and `time/<phase>` in seconds;
    its mappings keep their names, as in `layers/<parameter>/trust_ratio`. An evaluation becomes
    `eval/loss`, `eval/<metric>` and `time/evaluate`.

    >>> tags({"step": 9, "global_batch": 32, "samples_seen": 320, "loss": 0.5,
    ...       "forward_seconds": 2.0, "layers": {"fc.weight": {"trust_ratio": 0.1}}})
    ... # doctest: +NORMALIZE_WHITESPACE
    {'train/global_batch': 32.0, 'train/samples_seen': 320.0, 'train/loss': 0.5,
     'time/forward': 2.0, 'layers/fc.weight/trust_ratio': 0.1}
    >>> tags({"step": 9, "samples_seen": 320, "test_loss": float("nan"), "accuracy": 0.9})
    {'eval/accuracy': 0.9}
    """
    pairs = _of_evaluation(record) if "test_loss" in record else _of_step(record)
    return {tag: float(value) for tag, value in pairs if _is_figure(value)}


def _of_evaluation(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if name == "evaluate_seconds":
            yield "time/evaluate", value
        elif name not in _CLOCK:
            yield f"eval/{_TEST_LOSSES.get(name, name)}", value


def _of_step(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if name in _SECONDS:
            yield f"time/{_SECONDS[name]}", value
        elif isinstance(value, Mapping):
            yield from _flattened(name, value)
        elif name not in ("step", "time"):
            yield f"train/{name}", value


def _flattened(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(f"{prefix}/{name}", value)
        else:
            yield f"{prefix}/{name}", value


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
