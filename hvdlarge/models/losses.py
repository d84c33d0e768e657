"""The built-in losses that torch does not have in this form: means that belong to the step.

Formula:  cross entropy with ignored targets or class weights c: the pair (Σ cᵢ·ℓᵢ, Σ cᵢ) over the
          targets that are not ignored, cᵢ = 1 without class weights.
          A model's own loss ℓ, a mean over n targets: (n·ℓ, n).
Source:   torch.nn.CrossEntropyLoss, whose mean is the quotient of the pair.
Contract: a step's loss is Σ sums / Σ weights over all its micro-batches (replica/objective.py), so
          it does not depend on how many targets of a micro-batch are ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from hvdlarge.models.parts import NoSuchPartError, part_of

# No target has this value: without `ignore_index` none is ignored, where torch ignores −100
_NONE_IGNORED = -(2**62)

Pair = tuple[torch.Tensor, torch.Tensor | int]


class CrossEntropyLoss(torch.nn.Module):
    """Cross entropy of logits, shape (n, classes, …), with class indices, shape (n, …), or class
    probabilities, shape (n, classes, …).

    Args:
        weight: a weight for each class; None: 1.
        ignore_index: targets of this value do not count; None: every target counts.
        label_smoothing: in [0, 1).

    Returns:
        The mean over all targets, shape (); with `weight` or `ignore_index` the pair (sum, weight
        of the targets that count).

    Raises:
        ValueError: for another `reduction`; for negative targets in the first micro-batch,
            without `ignore_index`.
    """

    def __init__(
        self,
        weight: list[float] | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if reduction != "mean":
            raise ValueError(f"reduction is {reduction!r}: a loss is a mean over samples")
        class_weights = None if weight is None else torch.tensor(weight, dtype=torch.float32)
        self.weight: torch.Tensor | None
        self.register_buffer("weight", class_weights, persistent=False)
        self._ignored = _NONE_IGNORED if ignore_index is None else ignore_index
        self._weighted = weight is not None or ignore_index is not None
        self._smoothing = label_smoothing
        self._is_first = True

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | Pair:
        """See the class."""
        if self._is_first and not self._weighted:
            self._refuse_negative(targets)
        self._is_first = False
        if _lacks_deterministic(outputs, targets):
            outputs, targets = outputs.movedim(1, -1).flatten(0, -2), targets.flatten()
        loss = cross_entropy(
            outputs,
            targets,
            weight=self.weight,
            ignore_index=self._ignored,
            reduction="sum" if self._weighted else "mean",
            label_smoothing=self._smoothing,
        )
        return (loss, self._total_weight(targets)) if self._weighted else loss

    def _total_weight(self, targets: torch.Tensor) -> torch.Tensor | int:
        if targets.is_floating_point():  # class probabilities, of which none is ignored
            return targets.numel() // targets.shape[1] if targets.ndim > 1 else 1
        counted = targets != self._ignored
        if self.weight is None:
            return counted.sum()
        return self.weight.double()[targets[counted]].sum()

    @staticmethod
    def _refuse_negative(targets: torch.Tensor) -> None:
        if targets.is_floating_point() or not targets.numel():
            return
        if (smallest := int(targets.min())) < 0:
            raise ValueError(
                f"a target is {smallest}, which is no class: if such targets are not to count, set "
                f"loss: {{name: cross_entropy, args: {{ignore_index: {smallest}}}}}"
            )


def _lacks_deterministic(outputs: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether torch would refuse the shape: for class indices of more than one dimension it has no
    deterministic algorithm on a GPU.
    """
    return (
        outputs.is_cuda
        and outputs.ndim > 2
        and not targets.is_floating_point()
        and torch.are_deterministic_algorithms_enabled()
    )


class FromModel:
    """The loss that the model computes itself, as Hugging Face's models do when they are given
    labels.

    Args:
        loss: key or attribute of the model's output that is the loss, a mean.
        weight: key or attribute of the output that is the number of targets in the mean; None: that
            of `labels`, else every sample counts once.
        labels: key of the batch that holds the labels; those that are not `ignore_index` count.
        shifted: whether the model predicts each label from those before, so that the first of each
            sequence does not count, as in causal language models.
        ignore_index: see `labels`.

    Returns:
        The mean, shape (), or the pair (sum, weight) where a weight is known.

    Raises:
        ValueError: if the output or batch has no such part.
    """

    def __init__(
        self,
        loss: str = "loss",
        weight: str | None = None,
        labels: str | None = None,
        shifted: bool = False,
        ignore_index: int = -100,
    ) -> None:
        if weight is not None and labels is not None:
            raise ValueError("give either weight or labels, not both")
        self._loss, self._weight, self._labels = loss, weight, labels
        self._shifted, self._ignored = shifted, ignore_index

    def __call__(self, outputs: Any, batch: Any) -> torch.Tensor | Pair:
        """See the class."""
        loss = _part(outputs, self._loss, "the model's output")
        if not isinstance(loss, torch.Tensor):
            raise ValueError(
                f"the model's {self._loss!r} is {loss!r}: does the batch hold what the model needs "
                "to compute it, such as labels?"
            )
        if self._weight is not None:
            weight = _part(outputs, self._weight, "the model's output")
        elif self._labels is not None:
            labels = _part(batch, self._labels, "the batch")
            weight = ((labels[..., 1:] if self._shifted else labels) != self._ignored).sum()
        else:
            return loss
        # Half precision does not hold the sum over more than a few targets
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        # A mean over no target is nan, which a weight of 0 would keep
        total = torch.where(torch.as_tensor(weight, device=loss.device) > 0, loss * weight, 0.0)
        return total, weight


def _part(value: Any, name: str, where: str) -> Any:
    try:
        return part_of(value, name)
    except NoSuchPartError as error:
        raise ValueError(f"{where}: {error}") from None
