"""Fits of the distance of the weights from the start: logarithmic and by a power of the steps.

Formula:  d(t) = a·log t + b, by least squares; d(t) = a·t^p, by least squares of log d over log t
Source:   Hoffer, Hubara, Soudry, "Train longer, generalize better" (2017), section 3: ultra-slow
          diffusion, d ~ log t, against normal diffusion, d ~ √t.
Contract: pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Fit(NamedTuple):
    """Slope and intercept of a line, and the standard error of the slope."""

    slope: float
    intercept: float
    slope_error: float


def line_fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The line through points by least squares.

    Raises:
        ValueError: for fewer than three points, or all at one place.

    >>> line_fit([0, 1, 2], [1, 3, 5])
    Fit(slope=2.0, intercept=1.0, slope_error=0.0)
    """
    count = len(x)
    if count < 3 or max(x) == min(x):
        raise ValueError("a fit needs three points, not all at one place")
    middle_x, middle_y = math.fsum(x) / count, math.fsum(y) / count
    spread = math.fsum((value - middle_x) ** 2 for value in x)
    slope = math.fsum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = middle_y - slope * middle_x
    left = math.fsum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return Fit(slope, intercept, math.sqrt(left / (count - 2) / spread))


def logarithmic(steps: Sequence[float], distances: Sequence[float]) -> Fit:
    """A (the slope) and b of d = a·log t + b."""
    return line_fit([math.log(step) for step in steps], distances)


def power(steps: Sequence[float], distances: Sequence[float]) -> Fit:
    """P (the slope) and log a of d = a·t^p."""
    return line_fit(
        [math.log(step) for step in steps], [math.log(distance) for distance in distances]
    )
