"""Metrics of classification: accuracy, top-5 accuracy and F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hvdlarge.evaluation.parts import MetricError


class Accuracy:
    """Fraction of correct predictions, for targets that are class indices.

    Outputs are logits, shape (n, classes, …); targets are integer class indices, shape (n, …).
    For anything else `result` returns None.

    Args:
        ignore_index: targets of this value do not count, as in the loss `cross_entropy`; negative
            ones, which are no classes, never do.
    """

    num_totals = 2
    higher_is_better = True

    def __init__(self, ignore_index: int | None = None) -> None:
        self._ignored = ignore_index

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Numbers of correct predictions and of all predictions, shape (2,).

        Raises:
            MetricError: for a target that counts and is no class.
        """
        if not are_classes(outputs, targets):
            return torch.zeros(2)
        counted = counted_targets(outputs, targets, self._ignored)
        right = (self._is_right(outputs, targets) & counted).sum()
        return torch.stack([right, counted.sum()])

    def result(self, totals: Sequence[float]) -> float | None:
        """Correct / all predictions, in [0, 1]."""
        right, answers = totals
        return right / answers if answers else None

    def _is_right(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(dim=1) == targets


class Top5(Accuracy):
    """Fraction of targets among the five classes with the highest logits; does not apply to five
    classes or fewer.
    """

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Numbers of targets among the five, and of all targets, shape (2,); errors as in
        Accuracy.totals.
        """
        if not (are_classes(outputs, targets) and outputs.shape[1] > 5):
            return torch.zeros(2)
        return super().totals(outputs, targets)

    def _is_right(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.topk(5, dim=1).indices == targets.unsqueeze(1)).any(dim=1)


class F1:
    """F1, the harmonic mean of precision and recall: its mean over the classes that occur.

    Args:
        num_classes: C, the number of classes.
        average: `macro` gives each class that occurs in targets or predictions the same weight,
            `micro` each prediction.
        ignore_index: see `Accuracy`.

    Raises:
        ValueError: for another average, or fewer than two classes.
    """

    higher_is_better = True

    def __init__(
        self, num_classes: int, average: str = "macro", ignore_index: int | None = None
    ) -> None:
        if average not in ("macro", "micro"):
            raise ValueError(f"average is {average!r}: it is macro or micro")
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}: it must be at least 2")
        self._classes, self._average, self._ignored = num_classes, average, ignore_index
        self.num_totals = 3 * num_classes

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """For each class, the numbers of correct predictions, predictions and targets, shape (3C,).

        Raises:
            ValueError: for outputs of another number of classes.
            MetricError: for a target that counts and is none of the C classes.
        """
        if not are_classes(outputs, targets):
            return torch.zeros(self.num_totals)
        if outputs.shape[1] != self._classes:
            raise ValueError(
                f"num_classes is {self._classes}, the outputs have {outputs.shape[1]} classes"
            )
        counted = counted_targets(outputs, targets, self._ignored)
        predicted, targets = outputs.argmax(dim=1)[counted], targets[counted]
        counts = [targets[predicted == targets], predicted, targets]
        return torch.cat([torch.bincount(each, minlength=self._classes) for each in counts])

    def result(self, totals: Sequence[float]) -> float | None:
        """F1, in [0, 1]."""
        count = self._classes
        right, predicted, actual = totals[:count], totals[count : 2 * count], totals[2 * count :]
        if not sum(actual):
            return None
        if self._average == "micro":
            return 2 * sum(right) / (sum(predicted) + sum(actual))
        scores = [
            2 * hits / (positives + truths)
            for hits, positives, truths in zip(right, predicted, actual, strict=True)
            if positives + truths
        ]
        return sum(scores) / len(scores)


def are_classes(outputs: Any, targets: Any) -> bool:
    """Whether outputs are logits of at least two classes, and targets their indices."""
    return (
        isinstance(outputs, torch.Tensor)
        and isinstance(targets, torch.Tensor)
        and not targets.is_floating_point()
        and targets.dtype != torch.bool
        and outputs.ndim == targets.ndim + 1 >= 2
        and outputs.shape[1] > 1
        and (*outputs.shape[:1], *outputs.shape[2:]) == targets.shape
    )


def counted_targets(
    outputs: torch.Tensor, targets: torch.Tensor, ignored: int | None
) -> torch.Tensor:
    """Which targets count, shape (n, …): those that are not negative and not ignored.

    Args:
        outputs: logits, shape (n, classes, …).
        targets: class indices, shape (n, …).
        ignored: the value of those that do not count; None: no other than the negative ones.

    Raises:
        MetricError: if one that counts is no class.
    """
    counted = targets >= 0
    if ignored is not None:
        counted &= targets != ignored
    if bool((beyond := counted & (targets >= outputs.shape[1])).any()):
        target = int(targets[beyond][0])
        raise MetricError(
            f"evaluate.metrics: a target is {target}, and the outputs have {outputs.shape[1]} "
            "classes, counted from 0: if such targets are not to count, give the metric args: "
            f"{{ignore_index: {target}}}"
        )
    return counted
