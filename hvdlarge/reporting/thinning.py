"""Holds a log of any length as some thousand rows, for plots, in memory of a fixed size.

Rows are collected in buckets. When there are too many buckets, neighbours are merged, so that from
then on a bucket covers twice as many rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")
Row = tuple[float, ...]
Array = np.ndarray[Any, np.dtype[np.float64]]


class Buckets(Generic[T]):
    """At most `limit` merged items, each of equally many items; the last may be of fewer.

    Args:
        limit: even.
        merge: makes one item of two neighbours.

    >>> buckets = Buckets(4, lambda one, other: one + other)
    >>> for _ in range(11):
    ...     buckets.add(1)
    >>> buckets.items()
    [4, 4, 3]
    """

    def __init__(self, limit: int, merge: Callable[[T, T], T]) -> None:
        self._limit, self._merge = limit, merge
        self._full: list[T] = []
        self._open: T | None = None
        self._in_open, self._stride = 0, 1

    def add(self, item: T) -> None:
        """Append an item."""
        self._open = item if self._open is None else self._merge(self._open, item)
        self._in_open += 1
        if self._in_open < self._stride:
            return
        self._full.append(self._open)
        self._open, self._in_open = None, 0
        if len(self._full) == self._limit:
            pairs = zip(self._full[::2], self._full[1::2], strict=True)
            self._full = [self._merge(*pair) for pair in pairs]
            self._stride *= 2

    def items(self) -> list[T]:
        """The merged items, in order."""
        return [*self._full, *([] if self._open is None else [self._open])]


class _Extremes(NamedTuple):
    """The rows of the smallest and the largest value of a bucket, each with its number."""

    low: tuple[int, Row]
    high: tuple[int, Row]


class Series:
    """Rows of numbers in the order of the log; the first, the last and the extreme ones are kept.

    Args:
        width: numbers in a row.
        low: the column whose smallest value is kept in every bucket.
        high: the column whose largest value is kept.
        buckets: at most 2 · buckets + 2 rows are held; even.

    >>> series = Series(width=2, buckets=4)
    >>> for step in range(1000):
    ...     series.add((step, 9.0 if step == 500 else 1.0))
    >>> rows = series.rows()
    >>> len(rows) <= 10, rows[[0, -1], 0].tolist(), rows[:, 1].max().item()
    (True, [0.0, 999.0], 9.0)
    """

    def __init__(self, width: int, low: int = -1, high: int = -1, buckets: int = 600) -> None:
        self._width = width
        self._buckets: Buckets[_Extremes] = Buckets(
            buckets,
            lambda one, other: _Extremes(
                min(one.low, other.low, key=lambda each: each[1][low]),
                max(one.high, other.high, key=lambda each: each[1][high]),
            ),
        )
        self.first: Row | None = None
        self.last: Row | None = None
        self.count = 0  # rows received

    def add(self, row: Row) -> None:
        """Append a row of `width` numbers; those of the columns `low` and `high` are finite."""
        self._buckets.add(_Extremes((self.count, row), (self.count, row)))
        self.first, self.last = self.first or row, row
        self.count += 1

    def rows(self) -> Array:
        """The rows that are held, in order, of shape (rows, width)."""
        kept = {number: row for bucket in self._buckets.items() for number, row in bucket}
        if self.first is not None and self.last is not None:
            kept |= {0: self.first, self.count - 1: self.last}
        return _array([kept[number] for number in sorted(kept)], self._width)


class LogSeries:
    """Rows at times each at least a hundredth later than the one before, for axes of log t, and the
    last row.

    Args:
        width: numbers in a row; the first is the time, at least 1.
        growth: smallest ratio of the times of neighbouring rows.
    """

    def __init__(self, width: int, growth: float = 1.01) -> None:
        self._width, self._growth = width, growth
        self._kept: list[Row] = []
        self.last: Row | None = None

    def add(self, row: Row) -> None:
        """Append a row; one that is not later than the row before it is left out."""
        if self.last is not None and row[0] <= self.last[0]:
            return
        self.last = row
        if not self._kept or row[0] >= self._kept[-1][0] * self._growth:
            self._kept.append(row)

    def rows(self) -> Array:
        """The rows that are held, in order, of shape (rows, width)."""
        rows = list(self._kept)
        if self.last is not None and self.last is not rows[-1]:
            rows.append(self.last)
        return _array(rows, self._width)


def _array(rows: list[Row], width: int) -> Array:
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


class Interval(NamedTuple):
    """Sums over neighbouring lines of a log."""

    end: Row  # the position of the last of them
    sums: dict[str, float]


class IntervalSums:
    """Sums by name over intervals of a log, and over all of it.

    Args:
        buckets: at most so many intervals; even.
    """

    def __init__(self, buckets: int = 240) -> None:
        self._buckets: Buckets[Interval] = Buckets(
            buckets, lambda one, other: Interval(other.end, _sum(one.sums, other.sums))
        )
        self.totals: dict[str, float] = {}
        self.last_end: Row | None = None

    def add(self, end: Row, values: Mapping[str, float]) -> None:
        """Append the values of a line that ends at the position `end`."""
        self._buckets.add(Interval(end, dict(values)))
        self.totals = _sum(self.totals, values)
        self.last_end = end

    def intervals(self) -> list[Interval]:
        """The intervals, in order."""
        return self._buckets.items()


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    sums = dict(one)
    for name, value in other.items():
        sums[name] = sums.get(name, 0.0) + value
    return sums


class _Column(NamedTuple):
    """Logarithms by layer, summed, and how many there are of each."""

    end: Row
    sums: Array
    counts: Array


class LayerMeans:
    """Geometric means by layer over intervals of a log: the cells of a heat map.

    Args:
        buckets: at most so many intervals; even.
        layers: at most so many layers; further ones are only counted.
    """

    def __init__(self, buckets: int = 200, layers: int = 1000) -> None:
        self._columns: Buckets[_Column] = Buckets(buckets, _joined)
        self._layers = layers
        self.names: dict[str, int] = {}  # the row of each layer, in the order of the log
        self.omitted = 0  # layers beyond the limit, in the line that has the most
        self.first: Row | None = None

    def add(self, end: Row, values: Mapping[str, float]) -> None:
        """Append the values of the layers at a position; those that are not positive are left
        out.
        """
        self.first = self.first or end
        omitted = 0
        sums, counts = np.zeros(self._layers), np.zeros(self._layers)
        for name, value in values.items():
            if name not in self.names and len(self.names) >= self._layers:
                omitted += 1
                continue
            index = self.names.setdefault(name, len(self.names))
            if value > 0 and math.isfinite(value):
                sums[index], counts[index] = math.log(value), 1
        size = len(self.names)
        self._columns.add(_Column(end, sums[:size].copy(), counts[:size].copy()))
        self.omitted = max(self.omitted, omitted)

    def ends(self) -> list[Row]:
        """The position at which each column of the map ends."""
        return [column.end for column in self._columns.items()]

    def matrix(self) -> Array:
        """The cells, of shape (layers, columns); NaN where a layer has no value."""
        columns = self._columns.items()
        cells = np.full((len(self.names), len(columns)), np.nan)
        for number, column in enumerate(columns):
            there = column.counts > 0
            means = column.sums[there] / column.counts[there]
            cells[: len(there), number][there] = np.exp(means)
        return cells


def _joined(one: _Column, other: _Column) -> _Column:
    sums, counts = other.sums.copy(), other.counts.copy()
    sums[: len(one.sums)] += one.sums  # names are only ever added
    counts[: len(one.counts)] += one.counts
    return _Column(other.end, sums, counts)
