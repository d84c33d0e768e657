"""Accuracy: the fraction of correct predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Accuracy:
    """Fraction of correct predictions, for targets that are class indices.

    Outputs are logits, shape (n, classes, …); targets are integer class indices, shape (n, …). For
    anything else `result` returns None.
    """

    num_totals = 2
    higher_is_better = True

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Numbers of correct predictions and of all predictions, shape (2,)."""
        if not (
            isinstance(outputs, torch.Tensor)
            and isinstance(targets, torch.Tensor)
            and not targets.is_floating_point()
            and outputs.ndim == targets.ndim + 1
        ):
            return torch.zeros(2)
        right = (outputs.argmax(dim=1) == targets).sum()
        return torch.stack([right, torch.full_like(right, targets.numel())])

    def result(self, totals: Sequence[float]) -> float | None:
        """Correct / all predictions, in [0, 1]."""
        right, answers = totals
        return right / answers if answers else None
