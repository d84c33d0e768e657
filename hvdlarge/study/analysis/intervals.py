"""Confidence intervals and p-values of means over seeds, by a studentized wild bootstrap.

Formulas: for values x_i of n seeds and a mean m that is tested, u_i = x_i - m. The statistic is
          T = |mean(u)| / (sd(u) / √n). Its distribution if m is the mean is that of T of w_i u_i,
          where each w_i is one of ±√(1/2), ±1, ±√(3/2), all equally likely. The p-value is the
          share of draws with a T at least as large; the interval holds the m with a p-value above
          1 - confidence.
Source:   Webb, Reworking wild bootstrap-based inference for clustered errors, Canadian Journal of
          Economics 56 (2023): the six weights. Hall, The Bootstrap and Edgeworth Expansion (1992):
          the studentized statistic. Holm, A simple sequentially rejective multiple test procedure,
          Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

_WEIGHTS = np.sqrt([0.5, 1.0, 1.5])  # each with both signs
_MOST_ENUMERATED = 5  # seeds: 3 · 6^4 draws, all there are
_DRAWS = 4_999  # with more seeds
_SEED = 20_230  # of the draws: the same results give the same report
_DOUBLINGS, _HALVINGS = 30, 17  # of the search for an end


class Interval(NamedTuple):
    """A mean over seeds with its confidence interval.

    Attributes:
        mean: of the values; None if there are none.
        low: the lower end; None if there are too few seeds for the confidence level.
        high: the upper end.
        seeds: number of values.
    """

    mean: float | None
    low: float | None
    high: float | None
    seeds: int

    @property
    def known(self) -> bool:
        """Whether it has ends."""
        return self.low is not None

    def exponential(self) -> Interval:
        """That of a geometric mean, from the interval of the logarithms."""
        mean, low, high = (None if each is None else math.exp(each) for each in self[:3])
        return Interval(mean, low, high, self.seeds)


def seeds_needed(confidence: float, comparisons: int = 1) -> int:
    """The fewest seeds with which a p-value can be as small as 1 - confidence.

    Args:
        confidence: level, in (0, 1).
        comparisons: that Holm's correction counts.

    >>> seeds_needed(0.95), seeds_needed(0.95, 10)
    (3, 4)
    """
    seeds = 2
    while 6.0 ** (1 - seeds) > (1 - confidence) / comparisons:
        seeds += 1
    return max(3, seeds)


def p_value(values: Sequence[float], mean: float = 0.0) -> float | None:
    """The p-value of a mean, two-sided; None with fewer than three values.

    Identical values that differ from the mean have the smallest p-value that n seeds allow,
    6^(1-n).

    Args:
        values: one for each seed.
        mean: that is tested.
    """
    if len(values) < 3:
        return None
    return _p(_sums(values), mean)


def interval(values: Sequence[float], confidence: float) -> Interval:
    """The mean of values with its confidence interval.

    Args:
        values: one for each seed.
        confidence: level, in (0, 1).
    """
    count = len(values)
    mean = float(np.mean(values)) if count else None
    if mean is None or count < seeds_needed(confidence):
        return Interval(mean, None, None, count)
    sums = _sums(values)
    if sums.identical:
        return Interval(mean, mean, mean, count)
    ends = [_end(sums, mean, sign, 1 - confidence) for sign in (-1, 1)]
    if not np.isfinite(ends).all():  # p-values are never below 1 - confidence, by a rounding error
        return Interval(mean, None, None, count)
    return Interval(mean, ends[0], ends[1], count)


def holm(p_values: Sequence[float | None], comparisons: int | None = None) -> list[float | None]:
    """P-values corrected for several comparisons, so that one false positive among all is as likely
    as one of a single comparison; None stays None and does not count.

    Args:
        p_values: of the comparisons.
        comparisons: that count, if there are more than p-values. Default: those with a p-value.

    >>> holm([0.01, None, 0.04])
    [0.02, None, 0.04]
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest, total = 0.0, len(known) if comparisons is None else comparisons
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (total - rank) * p))
        corrected[place] = largest
    return corrected


class _Sums(NamedTuple):
    """Sums over seeds of each draw, from which T follows for any mean."""

    values: Any
    ones: Any  # Σ w, of shape (draws,)
    first: Any  # Σ w x
    squares: Any  # Σ w², Σ w² x, Σ w² x²
    cross: Any
    second: Any
    exact: bool  # whether the draws are all there are
    identical: bool  # the values


@lru_cache(maxsize=64)
def _draws(count: int) -> tuple[Any, Any, Any, Any]:
    """Weights of shape (draws, count), their squares, and the sums of both over the seeds.

    Of each pair w, -w there is only one where all are enumerated, as their T are equal.
    """
    both = np.concatenate([_WEIGHTS, -_WEIGHTS])
    if count <= _MOST_ENUMERATED:
        weights = np.array(list(itertools.product(_WEIGHTS, *[both] * (count - 1))))
    else:
        weights = np.random.default_rng(_SEED + count).choice(both, size=(_DRAWS, count))
    return weights, weights**2, weights.sum(1), (weights**2).sum(1)


def _sums(values: Sequence[float]) -> _Sums:
    x = np.asarray(values, dtype=np.float64)
    centre = x.mean()
    weights, squared, ones, squares = _draws(len(x))
    moved = x - centre  # no digits are lost to a large mean
    identical = bool(np.ptp(x) <= 1e-12 * np.abs(x).max())
    return _Sums(
        x,
        ones,
        weights @ moved,
        squares,
        squared @ moved,
        squared @ moved**2,
        len(x) <= _MOST_ENUMERATED,
        identical,
    )


def _p(sums: _Sums, mean: float) -> float:
    count = len(sums.values)
    centre = float(sums.values.mean())
    if sums.identical:
        return (
            1.0 if abs(centre - mean) <= 1e-12 * max(abs(centre), abs(mean)) else 6.0 ** (1 - count)
        )
    shift = mean - centre
    total = sums.first - shift * sums.ones
    squares = sums.second - 2 * shift * sums.cross + shift**2 * sums.squares
    # T² grows with total² / squares: ranks are the same, and neither is divided by zero
    drawn = total**2 / np.maximum(squares, 1e-300)
    own = (count * shift) ** 2 / (float(np.sum((sums.values - centre) ** 2)) + count * shift**2)
    extreme = int(np.count_nonzero(drawn >= own * (1 - 1e-9)))
    return extreme / len(drawn) if sums.exact else (1 + extreme) / (1 + len(drawn))


def _end(sums: _Sums, mean: float, sign: int, level: float) -> float:
    """The end of the interval on one side: where the p-value falls to `level`."""
    step = float(sums.values.std()) / len(sums.values) ** 0.5
    for _ in range(_DOUBLINGS):
        if _p(sums, mean + sign * step) <= level:
            break
        step *= 2
    else:
        return float("inf")
    inside, outside = 0.0, step
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        if _p(sums, mean + sign * middle) <= level:
            outside = middle
        else:
            inside = middle
    return mean + sign * outside
