"""Series of bounded size: what they keep, and how much they hold."""

import math
import random

import numpy as np
import pytest

from hvdlarge.reporting.thinning import IntervalSums, LayerMeans, LogSeries, Series


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 1000, 1023, 1024, 12345])
def test_a_series_keeps_first_last_and_extremes_in_order(count):
    draw = random.Random(count)
    values = [draw.gauss(0, 1) for _ in range(count)]
    series = Series(2, buckets=8)
    for number, value in enumerate(values):
        series.add((number, value))
    rows = series.rows()
    assert rows.shape == (len(rows), 2)
    assert len(rows) <= 18
    assert series.count == count
    if count:
        assert (rows[0, 0], rows[-1, 0]) == (0, count - 1)
        assert (rows[:, 1].min(), rows[:, 1].max()) == (min(values), max(values))
        assert np.all(np.diff(rows[:, 0]) > 0)
    if count <= 7:
        assert rows[:, 1].tolist() == values


def test_a_logarithmic_series_keeps_the_beginning_dense():
    series = LogSeries(2)
    for t in range(1, 100_001):
        series.add((t, 2 * t))
    series.add((3, 0))  # goes back: left out
    rows = series.rows()
    assert rows[:100, 0].tolist() == list(range(1, 101))
    assert rows[-1].tolist() == [100_000, 200_000]
    assert len(rows) < 1000


def test_intervals_keep_every_sum():
    sums = IntervalSums(buckets=8)
    for number in range(1000):
        sums.add((number,), {"a": 1.0} | ({"b": 2.0} if number % 10 == 0 else {}))
    intervals = sums.intervals()
    assert len(intervals) <= 8
    assert sums.totals == {"a": 1000, "b": 200}
    assert sum(each.sums["a"] for each in intervals) == 1000
    assert intervals[-1].end == (999,)


def test_a_heat_map_has_geometric_means_and_gaps():
    layers = LayerMeans(buckets=4, layers=3)
    for number in range(8):
        ratios = {"a": 2.0 ** (number % 2), "b": 0.0, "c": math.inf, "late": 1.0}
        layers.add((number,), ratios if number else {"a": 1.0})
    cells = layers.matrix()
    assert list(layers.names) == ["a", "b", "c"]
    assert layers.omitted == 1
    assert cells.shape == (3, len(layers.ends()))
    assert len(layers.ends()) <= 4
    np.testing.assert_allclose(cells[0], math.sqrt(2))
    assert np.isnan(cells[1:]).all()
