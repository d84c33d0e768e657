"""Accuracy: the fraction of correct predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Accuracy:
    """Right answers / all answers, where the targets are classes.

    Outputs are scores, shape (n, classes, …), and targets the index of the right class of each,
    shape (n, …), of an integer dtype. It does not apply to anything else.
    """

    num_totals = 2
    higher_is_better = True

    def totals(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Right answers and all answers, shape (2,)."""
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
        """Right answers / all answers, in [0, 1]."""
        right, answers = totals
        return right / answers if answers else None
