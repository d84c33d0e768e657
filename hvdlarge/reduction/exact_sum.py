"""The exact sum over workers: gradients of micro-batches are added in one fixed tree, so 1, 2, 4, …
workers agree bit for bit.

Each worker adds up the gradients of its own node of the tree (tree.py), gathers the others' sums,
and adds those in the tree above. That moves as many copies of the gradients as there are workers:
slower than an allreduce, and the proof that the engine adds nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer
from hvdlarge.reduction import tree


class ExactOptimizer:
    """An optimizer whose gradients are reduced by the exact sum.

    Args:
        optimizer: a plain one; nothing else may sum its gradients.
        gather: every worker's tensor, stacked in the order of the ranks, given a name for it.
        rank: this worker.
        world_size: workers, a power of two.

    Raises:
        ValueError: for another number of workers.
    """

    def __init__(
        self,
        optimizer: MeanGradientOptimizer,
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
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        types = dict.fromkeys(weight.dtype for weight in weights)
        # What is added and sent as one vector has one type.
        self._groups_by_dtype = [
            [weight for weight in weights if weight.dtype == dtype] for dtype in types
        ]
        self._stack: list[list[torch.Tensor]] = []
        self._additions: list[int] = []
        self._num_micro_batches = 0

    def zero_grad(self, numbers: range, num_micro_batches: int) -> None:
        """Drop the old gradients and look up this worker's part of the tree."""
        self.optimizer.zero_grad()
        self._stack = []
        self._additions = tree.additions(num_micro_batches, self._depth, self._rank)[::-1]
        self._num_micro_batches = num_micro_batches
        if len(self._additions) != len(numbers):
            raise ValueError(
                f"{len(numbers)} micro-batches were dealt, the tree has {len(self._additions)}"
            )

    def backward(self, loss: torch.Tensor) -> None:
        """Leave the pass's gradients on the parameters."""
        loss.backward()

    def backward_done(self) -> None:
        """Take the pass's gradients off the parameters and into the tree."""
        self._stack.append(
            [
                torch.cat([self._gradient(weight).reshape(-1) for weight in weights])
                for weights in self._groups_by_dtype
            ]
        )
        self.optimizer.zero_grad()
        for _ in range(self._additions.pop()):
            right = self._stack.pop()
            for left, added in zip(self._stack[-1], right, strict=True):
                left.add_(added)

    def synchronize(self) -> None:
        """Give each parameter its gradient's sum over all micro-batches. Every rank calls this
        together.
        """
        numbers = self._stack.pop() if self._stack else [None] * len(self._groups_by_dtype)
        for number, (weights, part) in enumerate(zip(self._groups_by_dtype, numbers, strict=True)):
            self._reduce(weights, part, f"exact.{number}")

    def _reduce(self, weights: list[torch.Tensor], numbers: torch.Tensor | None, name: str) -> None:
        sizes = [weight.numel() for weight in weights]
        gathered = self._gather(
            weights[0].new_zeros(sum(sizes)) if numbers is None else numbers, name
        )
        # An idle worker's zeros are left out: -0.0 + 0.0 would change a bit.
        nodes = [
            gathered[rank] if tree.additions(self._num_micro_batches, self._depth, rank) else None
            for rank in range(self._world_size)
        ]
        total = tree.combine(nodes, torch.add)
        assert total is not None  # a step has at least one micro-batch
        for weight, part in zip(weights, total.split(sizes), strict=True):
            weight.grad = part.view(weight.shape).clone()

    def apply(self, norms: GradientNorms, lr: float) -> None:
        """Update the weights."""
        self.optimizer.update(norms, lr)

    @staticmethod
    def _gradient(weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(weight) if weight.grad is None else weight.grad
