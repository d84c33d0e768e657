"""Metrics: totals that are summed over samples, and the result computed from them.

Contract: sums over micro-batches and workers are taken in float64, so that every sample counts once
          on any number of workers. A metric of torchmetrics keeps states instead, which
          `states.py` combines over the workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from hvdlarge.config.job import AVERAGED
from hvdlarge.evaluation.parts import MetricError, part
from hvdlarge.evaluation.states import StateMetric
from hvdlarge.exits import JobError, is_out_of_memory


class Metric(Protocol):
    """A result of an evaluation. It keeps nothing between calls.

    A metric may have a method `predict(model, inputs)`, which is called without gradients, with the
    model in evaluation mode and the inputs on its device. What it returns, such as decoded
    sentences, stands in the place of the model's outputs in `totals`.

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


Metrics = Mapping[str, Metric | StateMetric]  # by the name of the result


class OfParts:
    """A metric of a part of the outputs and targets.

    Args:
        metric: gets the parts.
        output: key, attribute or position in the outputs; None: the whole.
        targets: likewise in the targets.
    """

    def __init__(self, metric: Metric, output: str | int | None, targets: str | int | None) -> None:
        self.num_totals, self.higher_is_better = metric.num_totals, metric.higher_is_better
        self._metric, self._output, self._targets = metric, output, targets
        if (predict := predict_of(metric)) is not None:
            self.predict = predict

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """The metric's totals of the parts."""
        return self._metric.totals(part(outputs, self._output), part(targets, self._targets))

    def result(self, totals: Sequence[float]) -> float | None:
        """The metric's result."""
        return self._metric.result(totals)


def build_metric(
    result: str,
    name: str,
    metric: Any,
    output: str | int | None,
    targets: str | int | None,
    higher_is_better: bool | None,
) -> Metric | StateMetric:
    """A metric ready for evaluations.

    Args:
        result: name of the result.
        name: of the metric as the job has it, for messages.
        metric: what the job names: a `Metric`, or a metric of torchmetrics.
        output: the part of the outputs that it gets; None: the whole.
        targets: likewise of the targets.
        higher_is_better: overrides the metric's own; None: its own.

    Raises:
        JobError: if it lacks what a metric needs.
    """
    if StateMetric.fits(metric):
        if higher_is_better is None:
            higher_is_better = metric.higher_is_better
        return StateMetric(result, metric, (output, targets), higher_is_better)
    missing = [each for each in ("totals", "result") if not callable(getattr(metric, each, None))]
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
    if output is not None or targets is not None:
        metric = OfParts(metric, output, targets)
    if higher_is_better is not None:
        metric.higher_is_better = higher_is_better
    return metric


def rankings(best_by: str | None, metrics: Metrics) -> dict[str, bool]:
    """Results that decide which evaluation is the best, in order of preference; for each, whether
    higher is better.

    Args:
        best_by: the one that a job names, of the weights or of the averaged ones; None: the
            metrics of the weights, then their test loss.
        metrics: of the evaluation.

    Raises:
        JobError: if the job names a metric that does not say whether higher is better.
    """
    directions = {name: metric.higher_is_better for name, metric in metrics.items()}
    all_results = {name: higher for name, higher in directions.items() if higher is not None}
    all_results["test_loss"] = False
    if best_by is None:
        return all_results
    name = best_by if best_by in {*directions, *all_results} else best_by.removeprefix(AVERAGED)
    if name not in all_results:
        raise JobError(
            f"checkpoint.best: {name} does not say whether higher is better: set "
            f"evaluate.metrics.{name}.higher_is_better"
        )
    return {best_by: all_results[name]}


def predict_of(metric: Any) -> Callable[[torch.nn.Module, Any], Any] | None:
    """What a metric takes in place of the model's outputs; None: it takes the outputs."""
    predict = getattr(metric, "predict", None)
    return predict if callable(predict) else None


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
        if is_out_of_memory(error):
            raise
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
