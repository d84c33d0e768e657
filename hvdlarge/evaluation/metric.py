"""Metrics: totals that are summed over samples, and the result computed from them.

Contract: sums over micro-batches and workers are taken in float64, so that every sample counts once
          on any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from hvdlarge.exits import JobError, PartError


class Metric(Protocol):
    """A result of an evaluation. It keeps nothing between calls.

    Attributes:
        num_totals: k, the totals of a micro-batch.
        higher_is_better: decides which checkpoint is the best one.
    """

    num_totals: int
    higher_is_better: bool

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Sums over the samples of a micro-batch, shape (k,), of any real dtype and device.

        Args:
            outputs: of the model, in evaluation mode.
            targets: of the same samples, on the same device.
        """
        ...

    def result(self, totals: Sequence[float]) -> float | None:
        """The metric, given the k totals over the whole test set; None where it does not apply."""
        ...


Metrics = Mapping[str, Metric]  # by the name of the result


class MetricError(PartError):
    """A metric returned totals of a wrong type or shape. Not a RunExit, as a single rank may raise
    it.
    """


def check_metric(name: str, metric: Any) -> None:
    """Raise JobError unless `metric` has what a metric needs."""
    missing = [part for part in ("totals", "result") if not callable(getattr(metric, part, None))]
    count = getattr(metric, "num_totals", None)
    if not isinstance(count, int) or count < 1:
        missing.append("num_totals (an integer of at least 1)")
    if not isinstance(getattr(metric, "higher_is_better", None), bool):
        missing.append("higher_is_better (true or false)")
    if missing:
        raise JobError(
            f"evaluate.metrics: {name} must give a metric; this {type(metric).__name__} has no "
            f"{', '.join(missing)}"
        )


def rankings(best_by: str | None, metrics: Metrics) -> dict[str, bool]:
    """Results that decide which evaluation is the best, in order of preference; for each, whether
    higher is better.

    Args:
        best_by: the one that a job names; None: the metrics, then the test loss.
        metrics: of the evaluation.
    """
    all_results = {name: metric.higher_is_better for name, metric in metrics.items()}
    all_results["test_loss"] = False
    return all_results if best_by is None else {best_by: all_results[best_by]}


def totals_of(name: str, metric: Metric, outputs: Any, targets: Any) -> torch.Tensor:
    """The metric's totals of a micro-batch, shape (k,).

    Raises:
        MetricError: if they have another shape or are no real numbers.
    """
    totals: Any = metric.totals(outputs, targets)
    if not isinstance(totals, torch.Tensor):
        given = f"a {type(totals).__name__}"
    elif totals.shape != (metric.num_totals,) or totals.is_complex():
        given = f"{str(totals.dtype).removeprefix('torch.')}{list(totals.shape)}"
    else:
        return totals
    raise MetricError(
        f"evaluate.metrics: {name}: totals() must return a tensor of {metric.num_totals} real "
        f"numbers, not {given}"
    )


def result_of(name: str, metric: Metric, totals: Sequence[float]) -> float | None:
    """The metric over the whole test set. Ranks with the same totals do the same here.

    Raises:
        JobError: if it raises, or its result is not a number.
    """
    try:
        result: Any = metric.result(totals)
    except Exception as error:
        raise JobError(
            f"evaluate.metrics: {name}: result({list(totals)}) raises {type(error).__name__}: "
            f"{error}"
        ) from error
    if result is None:
        return None
    if isinstance(result, bool) or not isinstance(result, (int, float)) or math.isnan(result):
        raise JobError(
            f"evaluate.metrics: {name}: result({list(totals)}) is {result!r}: it must be a number, "
            "or None where the metric does not apply"
        )
    return float(result)
