"""Evaluation: every sample of the test set exactly once, on any number of workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hvdlarge.comm.interfaces import Collectives
from hvdlarge.data import seeds
from hvdlarge.data.loader import LoadedMicroBatch, MicroBatchDataset, make_dataloader
from hvdlarge.data.rng import seed_all
from hvdlarge.replica import Replica
from hvdlarge.resilience.out_of_memory import explain_out_of_memory
from hvdlarge.schedule.batch import BatchLayout, MicroBatch


class Evaluation:
    """A test set, dealt to the workers in consecutive micro-batches.

    Args:
        dataset: map-style, of pairs (input, target).
        size: its samples.
        micro_batch: samples in one forward pass.
        rank: this worker.
        world_size: workers.
        num_workers: loader processes; 0 loads in this process.
        prefetch_factor: micro-batches in hand for each loader process.
    """

    def __init__(
        self,
        dataset: Any,
        size: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        num_workers: int,
        prefetch_factor: int,
    ) -> None:
        fetch = MicroBatchDataset(dataset, seed=0, shuffled=False)
        mine: list[MicroBatch] = BatchLayout(size, micro_batch, world_size).of_rank(rank, start=0)
        self._size = size
        self._loader: Iterable[LoadedMicroBatch] = make_dataloader(
            fetch, mine, num_workers, prefetch_factor
        )

    @torch.no_grad()
    def run(self, learner: Replica, tensors: Collectives) -> dict[str, float]:
        """Evaluate the model as it stands. Every rank calls this together, with the running
        statistics gathered.

        Returns:
            `test_loss`, the mean over all samples, and `accuracy` where the targets are classes;
            the same on every rank.
        """
        learner.set_mode(training=False)
        device = learner.arithmetic.device
        # Loss, right answers, samples that have an answer
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        for micro_batch, inputs, targets in self._loader:
            targets = learner.to_device(targets)
            size = micro_batch.size
            # What a model draws while it is evaluated belongs to the micro-batch, and is the same
            # in every evaluation.
            seed_all(seeds.key(learner.seed, seeds.EVALUATION, micro_batch.start))
            with (
                explain_out_of_memory(
                    f"an evaluation of {size:,} samples at once", "set evaluate.micro_batch lower"
                ),
                learner.arithmetic.autocast(),
            ):
                outputs = learner.model(learner.to_device(inputs))
                loss = learner.loss(outputs, targets)
            totals[0] += loss.double() * size
            if _are_classes(outputs, targets):
                totals[1] += (outputs.argmax(dim=1) == targets).sum()
                totals[2] += targets.numel()
        learner.set_mode(training=True)
        total_loss, right, answered = tensors.sum(totals, "evaluation").tolist()
        result = {"test_loss": total_loss / self._size}
        if answered:
            result["accuracy"] = right / answered
        return result


def _are_classes(outputs: Any, targets: Any) -> bool:
    """Whether outputs are scores (n, classes, …) and targets the right class of each, (n, …)."""
    return (
        isinstance(outputs, torch.Tensor)
        and isinstance(targets, torch.Tensor)
        and not targets.is_floating_point()
        and outputs.ndim == targets.ndim + 1
    )
