"""The summation tree: one shape for any number of workers that is a power of two."""

import random

import pytest

from hvdlarge.reduction.tree import additions, combine, depth_of
from hvdlarge.schedule.batch import BatchLayout


def value(values, num_micro_batches, depth, index):
    """The node's value as a worker computes it, with a stack; floating-point addition shows every other order."""
    plan, stack = additions(num_micro_batches, depth, index), []
    mine = BatchLayout(num_micro_batches, 1, 1 << depth).numbers_of_rank(index)
    assert len(plan) == len(mine)
    most = 0
    for number, count in zip(mine, plan, strict=True):
        stack.append(values[number])
        most = max(most, len(stack))
        for _ in range(count):
            right = stack.pop()
            stack[-1] = stack[-1] + right
    assert len(stack) == (1 if plan else 0)
    assert most <= max(1, len(mine)).bit_length() + 1  # memory grows with the logarithm only
    return stack[0] if stack else None


@pytest.mark.parametrize("num_micro_batches", [*range(1, 40), 64, 100, 333])
def test_every_power_of_two_adds_up_bit_for_bit_alike(num_micro_batches):
    chance = random.Random(num_micro_batches)
    values = [
        chance.uniform(-1, 1) * 10.0 ** chance.randint(-8, 8) for _ in range(num_micro_batches)
    ]
    sums = set()
    for depth in range(7):
        nodes = [value(values, num_micro_batches, depth, index) for index in range(1 << depth)]
        sums.add(combine(nodes, lambda left, right: left + right))
    assert len(sums) == 1


def test_only_powers_of_two_have_a_depth():
    assert [depth_of(size) for size in (1, 2, 3, 4, 6, 8, 64)] == [0, 1, None, 2, None, 3, 6]
