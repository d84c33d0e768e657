"""The exact sum over workers: gradients of micro-batches are added in one fixed tree, so 1, 2, 4, … workers agree bit for bit.

Each worker adds up the gradients of its own node of the tree (data/tree.py), gathers the others' sums, and adds those in the
tree above. That moves as many copies of the gradients as there are workers: slower than an allreduce, and the proof that the
engine adds nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdlarge.data import tree


class ExactUpdate:
    """An optimizer behind the exact sum.

    Args:
        optimizer: a plain one; nothing else may sum its gradients.
        gather: every worker's tensor, stacked in the order of the ranks, given a name for it.
        rank: this worker.
        world_size: workers, a power of two.

    Raises:
        ValueError: for another number of workers, or weights of more than one type.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gather: Callable[[torch.Tensor, str], torch.Tensor],
        rank: int,
        world_size: int,
    ) -> None:
        depth = tree.depth_of(world_size)
        if depth is None:
            raise ValueError(f"reduction exact needs 1, 2, 4, 8, … workers, not {world_size}")
        self.optimizer = optimizer
        self._gather = gather
        self._rank, self._world_size, self._depth = rank, world_size, depth
        self._weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if len({weight.dtype for weight in self._weights}) != 1:
            raise ValueError("reduction exact needs weights of one type")
        self._stack: list[torch.Tensor] = []
        self._additions: list[int] = []
        self._num_micro_batches = 0

    def begin(self, mine: range, num_micro_batches: int) -> None:
        """Drop the old gradients and look up this worker's part of the tree."""
        self.optimizer.zero_grad()
        self._stack = []
        self._additions = tree.additions(num_micro_batches, self._depth, self._rank)[::-1]
        self._num_micro_batches = num_micro_batches
        if len(self._additions) != len(mine):
            raise ValueError(f"{len(mine)} micro-batches were dealt, the tree has {len(self._additions)}")

    def end_pass(self) -> None:
        """Take the pass's gradients off the parameters and into the tree."""
        self._stack.append(torch.cat([self._gradient(weight).reshape(-1) for weight in self._weights]))
        self.optimizer.zero_grad()
        for _ in range(self._additions.pop()):
            right = self._stack.pop()
            self._stack[-1].add_(right)

    def reduce(self) -> None:
        """Give each parameter its gradient's sum over all micro-batches. Every rank calls this together."""
        size = sum(weight.numel() for weight in self._weights)
        mine = self._stack.pop() if self._stack else self._weights[0].new_zeros(size)
        gathered = self._gather(mine, "exact")
        # An idle worker's zeros are left out: -0.0 + 0.0 would change a bit.
        nodes = [
            gathered[rank] if tree.additions(self._num_micro_batches, self._depth, rank) else None
            for rank in range(self._world_size)
        ]
        total = tree.combine(nodes, torch.add)
        assert total is not None  # a step has at least one micro-batch
        for weight, part in zip(self._weights, total.split([weight.numel() for weight in self._weights]), strict=True):
            weight.grad = part.view(weight.shape).clone()

    def apply(self) -> None:
        """Move the weights."""
        self.optimizer.step()

    @staticmethod
    def _gradient(weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(weight) if weight.grad is None else weight.grad
