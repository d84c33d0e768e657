"""The fixed tree in which exact mode adds up micro-batches, whatever the number of workers.

Formula:  node (j, i) of a step of M micro-batches holds those from ⌊i·M/2^j⌋ to ⌊(i+1)·M/2^j⌋ − 1,
          and its value is the value of (j+1, 2i) plus the value of (j+1, 2i+1); an empty node has
          none, and a node of one micro-batch is that one
Source:   docs/design.md. With 2^k workers the block of worker r is node (k, r): so each worker adds
          up its own node, and the tree above it is the same for 1, 2, 4, … workers.
Contract: pure; the order of every addition depends on M alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def depth_of(world_size: int) -> int | None:
    """K for 2^k workers; None for another number."""
    depth = world_size.bit_length() - 1
    return depth if world_size == 1 << depth else None


def additions(num_micro_batches: int, depth: int, index: int) -> list[int]:
    """How many additions follow each micro-batch of node (`depth`, `index`), in their order.

    Keep a stack: push a micro-batch's value, then that many times add the topmost to the one below
    it. What is left is the value of the node, in memory for about log2(M) values.

    >>> additions(4, 0, 0)
    [0, 1, 0, 2]
    >>> additions(5, 0, 0)
    [0, 1, 0, 0, 3]
    """
    low, high = _limits(num_micro_batches, depth, index)
    if high - low <= 1:
        return [0] * (high - low)
    left = additions(num_micro_batches, depth + 1, 2 * index)
    right = additions(num_micro_batches, depth + 1, 2 * index + 1)
    if left and right:
        right[-1] += 1
    return left + right


def combine(values: Sequence[Value | None], add: Callable[[Value, Value], Value]) -> Value | None:
    """The value of the root from those of the 2^k nodes at depth k, None standing for an empty
    node.
    """
    level = list(values)
    while len(level) > 1:
        level = [_sum(level[number], level[number + 1], add) for number in range(0, len(level), 2)]
    return level[0]


def _sum(
    left: Value | None, right: Value | None, add: Callable[[Value, Value], Value]
) -> Value | None:
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)


def _limits(num_micro_batches: int, depth: int, index: int) -> tuple[int, int]:
    return index * num_micro_batches >> depth, (index + 1) * num_micro_batches >> depth
