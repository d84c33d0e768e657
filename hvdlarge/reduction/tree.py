"""The binary tree in which exact mode sums micro-batches, the same on any number of workers.

Formula:  node (j, i) of a step of M micro-batches covers those from ⌊i·M/2^j⌋ to
          ⌊(i+1)·M/2^j⌋ − 1. Its value is that of (j+1, 2i) plus that of (j+1, 2i+1); a node of one
          micro-batch has that micro-batch's value, an empty node has none
Source:   docs/design.md. With 2^k workers, the micro-batches of worker r are node (k, r), so each
          worker sums its own node, and the tree above is the same for 1, 2, 4, … workers.
Contract: pure; the order of every addition depends on M alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def depth_of(world_size: int) -> int | None:
    """The depth k of the workers' nodes for 2^k workers; None for other numbers."""
    depth = world_size.bit_length() - 1
    return depth if world_size == 1 << depth else None


def additions(num_micro_batches: int, depth: int, index: int) -> list[int]:
    """The number of additions after each micro-batch of node (`depth`, `index`), in order.

    To evaluate the node, keep a stack: push the value of each micro-batch, then replace the top two
    values by their sum that many times. The stack holds about log2(M) values at most.

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
    """The value of the root, given those of the 2^k nodes at depth k; None for an empty node."""
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
