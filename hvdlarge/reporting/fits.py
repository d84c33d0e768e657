"""Fits the distance of the weights from their start against the number of steps t.

Formulas: a · ln t + b, and a · t^p, by least squares in the distance.
Source:   Hoffer, Hubara, Soudry, Train longer, generalize better, arXiv:1705.08741: in the first
          phase of training, at a high lr, the distance grows as the logarithm of the number of
          updates (ultra-slow diffusion); ordinary diffusion is the power 1/2. You et al., The Limit
          of the Batch Size, arXiv:2006.08517, on training with few updates of very large batches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

MIN_POINTS = 5  # two parameters and their errors
_LOWEST_POWER, _HIGHEST_POWER = -1.0, 3.0


class Estimate(NamedTuple):
    """A parameter of a fit."""

    value: float
    error: float  # the standard error, for independent residuals of equal variance


class Fit(NamedTuple):
    """A curve with two parameters.

    Attributes:
        form: the formula, in letters.
        parameters: by their letters, in the order of the formula.
        rms: root of the mean squared residual, in the unit of the distance.
        r_squared: share of the variance that the curve explains; 1 is all.
    """

    form: str
    parameters: dict[str, Estimate]
    rms: float
    r_squared: float

    def at(self, t: Any) -> Any:
        """The curve at times `t`, a number or an array."""
        a = self.parameters["a"].value
        if "p" in self.parameters:
            return a * np.asarray(t, dtype=np.float64) ** self.parameters["p"].value
        return a * np.log(t) + self.parameters["b"].value


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def fit_log(t: Any, distance: Any) -> Fit | None:
    """The fit of a · ln t + b; None if the points do not determine it.

    Args:
        t: steps, positive, of shape (points,).
        distance: of shape (points,), finite.
    """
    t, distance = _checked(t, distance)
    if len(t) < MIN_POINTS or np.ptp(t) == 0:
        return None
    jacobian = np.stack([np.log(t), np.ones_like(t)], axis=1)
    solution = np.linalg.lstsq(jacobian, distance, rcond=None)[0]
    return _fit("a · ln t + b", ("a", "b"), solution, jacobian, distance, jacobian @ solution)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def fit_power(t: Any, distance: Any) -> Fit | None:
    """The fit of a · t^p with p in [-1, 3]; None if the points do not determine it.

    For each p the best a has a closed form; p is searched in one dimension: on a grid, then by
    sections of the interval around the best point of the grid.

    Args:
        t: steps, positive, of shape (points,).
        distance: of shape (points,), finite.
    """
    t, distance = _checked(t, distance)
    if len(t) < MIN_POINTS or np.ptp(t) == 0 or not np.any(distance):
        return None
    scale = np.exp(np.log(t).mean())  # keeps t^p near 1
    relative = t / scale

    def curves_of(powers: Any) -> Any:
        """The best curve of each power, and its factor: of shapes (powers, points), (powers, 1)."""
        bases = relative ** powers[:, None]
        factors = (bases @ distance / np.sum(bases**2, axis=1))[:, None]
        return factors * bases, factors

    low, high = _LOWEST_POWER, _HIGHEST_POWER
    while high - low > 1e-10:
        grid = np.linspace(low, high, 41)
        best = int(np.argmin(np.sum((distance - curves_of(grid)[0]) ** 2, axis=1)))
        low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    power = (low + high) / 2
    curves, factors = curves_of(np.array([power]))
    curve, factor = curves[0], float(factors[0, 0])
    # Gauss-Newton at the optimum, in a of the formula itself: a = factor / scale^p
    a = factor / scale**power
    jacobian = np.stack([t**power, a * t**power * np.log(t)], axis=1)
    return _fit("a · t^p", ("a", "p"), np.array([a, power]), jacobian, distance, curve)


def _checked(t: Any, distance: Any) -> tuple[Any, Any]:
    t, distance = np.asarray(t, dtype=np.float64), np.asarray(distance, dtype=np.float64)
    if t.shape != distance.shape or t.ndim != 1:
        raise ValueError(f"t has shape {t.shape}, distance {distance.shape}: two equal lists meant")
    usable = (t > 0) & np.isfinite(distance)
    return t[usable], distance[usable]


def _fit(
    form: str, letters: tuple[str, str], solution: Any, jacobian: Any, distance: Any, curve: Any
) -> Fit | None:
    residual = distance - curve
    squares = float(residual @ residual)
    if not (np.isfinite(jacobian).all() and np.isfinite([*solution, squares]).all()):
        return None  # too large for squares
    variance = squares / (len(distance) - 2)
    covariance = variance * np.linalg.pinv(jacobian.T @ jacobian, hermitian=True)
    errors = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    spread = float(np.sum((distance - distance.mean()) ** 2))
    return Fit(
        form,
        {
            letter: Estimate(float(value), float(error))
            for letter, value, error in zip(letters, solution, errors, strict=True)
        },
        rms=(squares / len(distance)) ** 0.5,
        r_squared=1 - squares / spread if spread else 0.0,
    )
