"""The cost of an allreduce: what was put in is found again, and the ring's formula holds."""

import numpy as np
import pytest

from hvdlarge.bench.interleave import Timing, run_interleaved, stopwatch
from hvdlarge.comm.cost_model import AllreduceCost, fit

SIZES = [4 * 4**power for power in range(13)]


@pytest.mark.parametrize("workers", [2, 3, 64])
@pytest.mark.parametrize(
    ("latency", "per_byte"), [(1e-5, 1e-9), (1e-3, 1e-10), (0.0, 3e-9), (2e-4, 0.0)]
)
def test_a_fit_finds_the_figures_behind_the_times(workers, latency, per_byte):
    truth = AllreduceCost(latency, per_byte)
    sizes = [size for size in SIZES if truth.seconds(size, workers) > 0]
    found = fit(sizes, [truth.seconds(size, workers) for size in sizes], workers)
    assert found.latency_seconds == pytest.approx(latency, rel=1e-9, abs=1e-15)
    assert found.seconds_per_byte == pytest.approx(per_byte, rel=1e-9, abs=1e-18)


def test_a_fit_of_noisy_times_is_near_and_never_below_zero():
    truth, noise = AllreduceCost(1e-4, 5e-10), np.random.default_rng(3)
    times = [truth.seconds(size, 4) * noise.uniform(0.8, 1.25) for size in SIZES]
    found = fit(SIZES, times, 4)
    assert found.latency_seconds == pytest.approx(1e-4, rel=0.3)
    assert found.seconds_per_byte == pytest.approx(5e-10, rel=0.3)
    falling = fit(
        [4, 400_000_000], [1e-3, 1e-5], 2
    )  # large messages faster than small ones: no bandwidth explains that
    assert falling.seconds_per_byte == 0
    assert falling.latency_seconds > 0


def test_the_rings_formula():
    cost = AllreduceCost(latency_seconds=1e-6, seconds_per_byte=1e-9)
    assert cost.seconds(10**9, 1) == 0
    assert cost.seconds(10**9, 2) == pytest.approx(2e-6 + 1.0)
    assert cost.seconds(10**9, 4) == pytest.approx(6e-6 + 1.5)
    assert cost.seconds(10**9, 4096) == pytest.approx(
        2.0, rel=0.01
    )  # a ring's bandwidth does not depend on its length


@pytest.mark.parametrize(("sizes", "workers"), [([4, 8], 1), ([4, 4], 2), ([], 2)])
def test_a_fit_needs_two_workers_and_two_sizes(sizes, workers):
    with pytest.raises(ValueError, match="two workers and two sizes"):
        fit(sizes, [1.0] * len(sizes), workers)


def test_sides_take_turns_and_none_is_always_behind_the_same_one():
    order = []
    sides = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    seconds = run_interleaved(sides, 3)
    assert order == [*"abc", *"cba", *"abc"]
    assert seconds == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert Timing.of([3.0, 1.0, 2.0, 9.0]) == Timing(2.5, 1.0, 9.0)
    calls = []
    assert 0 <= stopwatch(lambda: calls.append("work"), lambda: calls.append("settle"))() < 1
    assert calls == ["settle", "work", "settle"]
