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
_MORE_DRAWS = 29_999  # of p-values below _SMALL: corrections for many comparisons multiply them
_SMALL = 0.002
_COARSE = 0.1  # share of 1 - confidence that the smallest corrected p-value may be
_SEED = 20_230  # of the draws: the same results give the same report
_DOUBLINGS, _HALVINGS = 30, 13  # of the search for an end


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


def many_comparisons(comparisons: int, confidence: float) -> bool:
    """Whether the correction for so many comparisons needs more draws: their number times the
    smallest p-value, 1/5,000, is more than a tenth of 1 - confidence.

    >>> many_comparisons(25, 0.95), many_comparisons(26, 0.95)
    (False, True)
    """
    return comparisons / (_DRAWS + 1) > _COARSE * (1 - confidence) + 1e-12


def p_value(values: Sequence[float], mean: float = 0.0, precise: bool = True) -> float | None:
    """The p-value of a mean, two-sided; None with fewer than three values.

    Identical values that differ from the mean have the smallest p-value that n seeds allow,
    6^(1-n).

    Args:
        values: one for each seed.
        mean: that is tested.
        precise: whether small p-values are worth more draws.
    """
    if len(values) < 3:
        return None
    sums = _sums(values)
    p = _p(sums, mean)
    if not precise or sums.exact or sums.identical or p > _SMALL:
        return p
    return _p(_sums(values, _MORE_DRAWS), mean)


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
    """What T of each draw follows from, for any mean.

    With moved values y = x - mean(x) and s = m - mean(x), the numerator and the denominator of a
    monotone function of T², (Σ w (y - s))² and Σ w² (y - s)², are polynomials in s.
    """

    coefficients: Any  # of s⁰, s¹, s² of both, of shape (draws, 6)
    centre: float  # mean(x)
    squares: float  # Σ y²
    seeds: int
    exact: bool  # whether the draws are all there are
    identical: bool  # the values


@lru_cache(maxsize=16)
def _draws(count: int, draws: int) -> tuple[Any, Any, Any, Any]:
    """Weights of shape (draws, count), their squares, and the sums of both over the seeds.

    Of each pair w, -w there is only one where all are enumerated, as their T are equal.
    """
    both = np.concatenate([_WEIGHTS, -_WEIGHTS])
    if count <= _MOST_ENUMERATED:
        weights = np.array(list(itertools.product(_WEIGHTS, *[both] * (count - 1))))
    else:
        weights = np.random.default_rng(_SEED + count).choice(both, size=(draws, count))
    return weights, weights**2, weights.sum(1), (weights**2).sum(1)


def _sums(values: Sequence[float], draws: int = _DRAWS) -> _Sums:
    x = np.asarray(values, dtype=np.float64)
    centre = float(x.mean())
    weights, squared, ones, squares = _draws(len(x), draws)
    moved = x - centre
    first = weights @ moved
    numerator = first**2, -2 * first * ones, ones**2
    denominator = squared @ moved**2, -2 * (squared @ moved), squares
    return _Sums(
        np.stack([*numerator, *denominator], axis=1),
        centre,
        float(moved @ moved),
        len(x),
        len(x) <= _MOST_ENUMERATED,
        bool(np.ptp(x) <= 1e-12 * np.abs(x).max()),
    )


def _p(sums: _Sums, mean: float) -> float:
    count, shift = sums.seeds, mean - sums.centre
    if sums.identical:
        equal = abs(shift) <= 1e-12 * max(abs(sums.centre), abs(mean))
        return 1.0 if equal else 6.0 ** (1 - count)
    # That of the values themselves; draws that equal it but for rounding are as large
    own = (1 - 1e-9) * (count * shift) ** 2 / (sums.squares + count * shift**2)
    powers = np.array([1.0, shift, shift**2])
    difference = sums.coefficients @ np.concatenate([powers, -own * powers])
    extreme, draws = int(np.count_nonzero(difference >= 0)), len(difference)
    return extreme / draws if sums.exact else (1 + extreme) / (1 + draws)


def _end(sums: _Sums, mean: float, sign: int, level: float) -> float:
    """The end of the interval on one side: where the p-value falls to `level`."""
    step = sums.squares**0.5 / sums.seeds
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
