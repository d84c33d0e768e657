"""Metrics that average an error: perplexity, mean squared and mean absolute error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from hvdlarge.evaluation.accuracy import are_classes, counted_targets


class Perplexity:
    """exp of the mean cross entropy over all targets, for targets that are class indices.

    Outputs are logits, shape (n, classes, …); targets are integer class indices, shape (n, …).

    Args:
        ignore_index: targets of this value do not count, as in the loss `cross_entropy`; negative
            ones, which are no classes, never do.
    """

    num_totals = 2
    higher_is_better = False

    def __init__(self, ignore_index: int | None = None) -> None:
        self._ignored = ignore_index

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Sum of the cross entropy and the number of targets, shape (2,).

        Raises:
            MetricError: for a target that counts and is no class.
        """
        if not are_classes(outputs, targets):
            return torch.zeros(2)
        counted = counted_targets(outputs, targets, self._ignored)
        logits = outputs.movedim(1, -1)[counted].double()
        loss = cross_entropy(logits, targets[counted], reduction="sum")
        return torch.stack([loss, counted.sum().double()])

    def result(self, totals: Sequence[float]) -> float | None:
        """The perplexity, at least 1; infinite where it is larger than a float."""
        loss, count = totals
        if not count:
            return None
        mean = loss / count
        return math.inf if mean >= 700 else math.exp(mean)


class MeanSquaredError:
    """Mean of (output − target)² over all numbers, for outputs of the shape of the targets."""

    num_totals = 2
    higher_is_better = False

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Sum of the errors and their number, shape (2,)."""
        tensors = isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)
        if not (tensors and outputs.shape == targets.shape):
            return torch.zeros(2)
        errors = self._errors(outputs.double() - targets.double())
        return torch.stack([errors.sum(), torch.full_like(errors.sum(), errors.numel())])

    def result(self, totals: Sequence[float]) -> float | None:
        """The mean error."""
        total, count = totals
        return total / count if count else None

    def _errors(self, difference: torch.Tensor) -> torch.Tensor:
        return difference.square()


class MeanAbsoluteError(MeanSquaredError):
    """Mean of |output − target| over all numbers, for outputs of the shape of the targets."""

    def _errors(self, difference: torch.Tensor) -> torch.Tensor:
        return difference.abs()
