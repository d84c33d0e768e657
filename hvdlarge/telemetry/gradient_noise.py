"""The gradient noise scale: the batch at which noise and gradient are equally large.

Formula:  g_i, the mean gradient of micro-batch i of n_i samples; G = Σ n_i·g_i / B, that of a step
          of B samples; γ the expected gradient, Σ the covariance of a single sample's:

              E|g_i|² = |γ|² + tr Σ / n_i,      E|G|² = |γ|² + tr Σ / B

          so tr Σ ≈ (mean |g_i|² − |G|²) / (mean 1/n_i − 1/B) and |γ|² ≈ |G|² − tr Σ / B, both
          without bias. The noise scale is tr Σ / |γ|², in samples, each averaged over measurements
          first: a mean of ratios would be biased.
Source:   McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training" (2018), section
          2.2 and appendix A.1. The critical batch, up to which a larger batch saves nearly as many
          steps as it costs samples, is about the noise scale.
Contract: pure. Sums run over the micro-batches in their order, so the result does not depend on the
          number of workers beyond the rounding of G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

KEPT = 0.9  # of the average, at each measurement: about the last ten count
ENOUGH = 10  # measurements until a growth may follow the average


class MicroBatchGradient(NamedTuple):
    """The gradient of one micro-batch."""

    samples: float  # n_i
    square: float  # |g_i|²


class GradientNoise(NamedTuple):
    """Both sides of the ratio, of one measurement or averaged."""

    square: float  # |γ|²
    variance: float  # tr Σ, for one sample

    @property
    def scale(self) -> float | None:
        """The noise scale, in samples; None if chance has made one side not positive."""
        if not (self.square > 0 and self.variance > 0):
            return None
        return self.variance / self.square

    def averaged(self, before: GradientNoise | None) -> GradientNoise:
        """The average after this measurement. The first counts as much as each later one, so the
        weights add up to less than one at first; on both sides alike, so the ratio needs no
        correction.
        """
        before = before or GradientNoise(0.0, 0.0)
        return GradientNoise(
            KEPT * before.square + (1 - KEPT) * self.square,
            KEPT * before.variance + (1 - KEPT) * self.variance,
        )


def estimate(
    gradients: Sequence[MicroBatchGradient], total_square: float, global_batch: int
) -> GradientNoise | None:
    """The noise of one step.

    Args:
        gradients: of all its micro-batches, in their order.
        total_square: |G|².
        global_batch: B, in samples.

    Returns:
        None for fewer than two micro-batches, one without samples, or numbers that are not finite.

    >>> estimate([MicroBatchGradient(2, 5.0), MicroBatchGradient(2, 3.0)], 3.0, 4)
    GradientNoise(square=2.0, variance=4.0)
    """
    if len(gradients) < 2 or not all(gradient.samples > 0 for gradient in gradients):
        return None
    mean = math.fsum(gradient.square for gradient in gradients) / len(gradients)
    inverse = math.fsum(1 / gradient.samples for gradient in gradients) / len(gradients)
    variance = (mean - total_square) / (inverse - 1 / global_batch)
    square = total_square - variance / global_batch
    if not (math.isfinite(variance) and math.isfinite(square)):
        return None
    return GradientNoise(square, variance)
