"""The cost of an all-reduce: the formulas against a ring and a tree that pass messages, and what was put in found again."""

import pytest

from hvdlarge.bench.interleave import Timing, run_interleaved, stopwatch
from hvdlarge.comm.cost_model import ALGORITHMS, AllreduceCost, AllreduceTimes, Link, fit

SIZES = [4 * 4**power for power in range(13)]


def link(hop=1e-6, per_byte=1e-9):
    return Link(hop, ((1, per_byte), (2**40, per_byte * 2**40)))


def cost(within=None, between=None, cycle=0.0, message=0.0):
    within = within or link()
    return AllreduceCost(cycle, message, within, between or within)


def slowest_of_a_ring(workers, size, hop, per_byte):
    """Passes chunks around: in each step every worker sends one, and waits for the one that it gets."""
    clocks = [0.0] * workers
    for _ in range(2 * (workers - 1)):
        sent = [clock + hop + size / workers * per_byte for clock in clocks]
        clocks = [max(sent[rank], sent[rank - 1]) for rank in range(workers)]
    return max(clocks)


def slowest_of_a_tree(workers, hop):
    """Passes an empty message up a binary tree and down again, both children at once."""

    def height(count):
        left = 2 ** (count - 1).bit_length() // 2
        return 0.0 if count <= 1 else hop + max(height(left), height(count - left))

    return 2 * height(workers)


@pytest.mark.parametrize("workers", [2, 3, 4, 7, 64])
def test_a_ring_and_a_tree_take_as_long_as_passing_messages_does(workers):
    ring = cost(link(2e-6, 1e-9)).seconds(10**6, 1, workers, 1, "ring")
    assert ring == pytest.approx(slowest_of_a_ring(workers, 10**6, 2e-6, 1e-9))
    tree = cost(link(2e-6, 0.0)).seconds(10**6, 1, workers, 1, "tree")
    assert tree == pytest.approx(slowest_of_a_tree(workers, 2e-6))


def test_a_rings_bandwidth_does_not_depend_on_its_length_and_a_trees_latency_hardly():
    ring = [cost(link(0.0)).seconds(10**9, 1, workers, 1, "ring") for workers in (2, 4, 4096)]
    assert ring == pytest.approx([1.0, 1.5, 2.0], rel=0.01)
    few, many = (
        cost(link(per_byte=0.0)).seconds(4, 1, workers, 1, "tree") for workers in (16, 16384)
    )
    assert many / few == pytest.approx(14 / 4)


def test_the_fastest_is_a_tree_for_short_and_a_ring_for_long_messages():
    for size, chosen in ((4, "tree"), (10**9, "ring")):
        both = {name: cost().seconds(size, 1, 8, 8, name) for name in ("ring", "tree")}
        assert cost().seconds(size, 1, 8, 8) == both[chosen] == min(both.values())


def test_hierarchical_sums_use_the_slow_links_for_the_hosts_alone():
    slow, fast = link(1e-4, 1e-8), link(1e-7, 1e-11)
    spread = cost(fast, slow)
    assert spread.seconds(10**6, 1, 64, 8, "ring") == cost(slow).seconds(10**6, 1, 64, 8, "ring")
    hosts = cost(slow).seconds(10**6, 1, 8, 1, "tree") - 2 * 10**6 * 1e-8
    expected = hosts + 2 * 7 / 8 * 10**6 * 1e-8
    found = spread.seconds(10**6, 1, 64, 8, "hierarchical")
    assert found == pytest.approx(expected, rel=0.01)
    # On one host there is nothing but its ring
    one = spread.seconds(10**6, 1, 8, 8, "hierarchical")
    assert one == pytest.approx(cost(fast).seconds(10**6, 1, 8, 8, "ring"))


def test_messages_follow_each_other_and_a_step_waits_for_one_cycle():
    costs = cost(cycle=1e-3, message=1e-5)
    one, ten = costs.seconds(4000, 1, 4, 4, "ring"), costs.seconds(4000, 10, 4, 4, "ring")
    assert ten - one == pytest.approx(9 * (1e-5 + 6 * 1e-6))
    for algorithm in ALGORITHMS:
        assert costs.seconds(4000, 10, 1, 4, algorithm) == 0
    assert costs.seconds(0, 0, 4, 4) == 0
    with pytest.raises(ValueError, match="there are fastest, ring"):
        costs.seconds(4, 1, 2, 2, "star")


def test_a_link_is_linear_between_measured_sizes():
    measured = Link(0.0, ((1000, 1e-3), (2000, 4e-3)))
    sizes = (0, 500, 1000, 1500, 2000, 4000)
    expected = [0, 0.5e-3, 1e-3, 2.5e-3, 4e-3, 8e-3]
    assert [measured.carry(size) for size in sizes] == pytest.approx(expected)


@pytest.mark.parametrize("workers", [2, 3, 64])
@pytest.mark.parametrize(
    ("cycle", "message", "hop", "per_byte"),
    [(1e-3, 1e-5, 1e-6, 1e-9), (0.0, 0.0, 2e-5, 0.0), (5e-3, 3e-5, 0.0, 1e-10)],
)
def test_a_fit_finds_the_figures_behind_the_times(workers, cycle, message, hop, per_byte):
    hops = cost(link(hop, 0.0)).seconds(4, 1, workers, 1, "tree")
    another = message + hops

    def step(messages, size):
        return cycle + messages * another + 2 * (workers - 1) / workers * size * per_byte

    times = AllreduceTimes(
        workers=workers,
        one=step(1, 0),
        many=step(64, 0),
        messages=64,
        control=hops,
        by_size={size: step(1, size) for size in SIZES},
    )
    found = fit(times)
    assert found[:2] == pytest.approx((cycle, message), rel=1e-6, abs=1e-12)
    assert found[2].hop_seconds == pytest.approx(hop, rel=1e-6)
    for size in (*SIZES, 3_000_000):
        assert found[2].carry(size) == pytest.approx(size * per_byte, rel=1e-6, abs=1e-12)


def test_no_cost_is_below_zero_and_no_longer_message_cheaper_than_a_shorter_one():
    odd = AllreduceTimes(2, one=1e-3, many=9e-4, messages=64, control=5e-4,
                         by_size={4: 1e-3, 64: 9e-4, 1024: 3e-3, 4096: 2e-3})  # fmt: skip
    cycle, message, found = fit(odd)
    assert (cycle, message, found.hop_seconds) == (1e-3, 0, 0)
    assert [found.carry(size) for size in (4, 64, 1024, 4096)] == pytest.approx([0, 0, 2e-3, 2e-3])


@pytest.mark.parametrize(
    ("workers", "messages", "by_size"), [(1, 64, {4: 1.0}), (2, 1, {4: 1.0}), (2, 64, {})]
)
def test_a_fit_needs_two_workers_two_messages_and_a_size(workers, messages, by_size):
    with pytest.raises(ValueError, match="two workers, two messages and a size"):
        fit(AllreduceTimes(workers, 1.0, 2.0, messages, 1.0, by_size))


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
