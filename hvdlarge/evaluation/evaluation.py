"""Evaluation: every sample of the test set exactly once, on any number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch

from hvdlarge.comm.interfaces import Collectives
from hvdlarge.data import seeds
from hvdlarge.data.lanes import Lanes
from hvdlarge.data.loader import LoadedMicroBatch, MicroBatchDataset, make_dataloader
from hvdlarge.data.rng import seed_all
from hvdlarge.evaluation.metric import Metrics, predict_of, result_of, totals_of
from hvdlarge.evaluation.states import StateMetric
from hvdlarge.exits import JobError
from hvdlarge.replica.carried import LaneStates
from hvdlarge.replica.replica import Replica
from hvdlarge.resilience.out_of_memory import explain_out_of_memory
from hvdlarge.schedule.batch import BatchLayout


class Evaluation:
    """Evaluates a test set, split over the workers in consecutive micro-batches.

    Args:
        dataset: the test set, in its own order.
        size: its samples.
        metrics: results beside the loss, by name.
        micro_batch: samples in one forward pass.
        rank: this worker.
        world_size: workers.
        num_workers: loader processes; 0 loads in this process.
        prefetch_factor: micro-batches that each loader process prepares in advance.
        transform: changes each micro-batch as it is loaded.
        lanes: of a test set along which the model carries a state; None: samples are independent.
    """

    def __init__(
        self,
        dataset: MicroBatchDataset,
        size: int,
        metrics: Metrics,
        micro_batch: int,
        rank: int,
        world_size: int,
        num_workers: int,
        prefetch_factor: int,
        transform: Callable[[LoadedMicroBatch], LoadedMicroBatch],
        lanes: Lanes | None = None,
    ) -> None:
        self._transform, self._lanes = transform, lanes
        parts = BatchLayout(size if lanes is None else lanes.number, micro_batch, world_size)
        local = parts.of_rank(rank, start=0)
        if lanes is not None:
            local = lanes.along(local)
        self._names = list(metrics)
        self._with_states = {
            name: metric for name, metric in metrics.items() if isinstance(metric, StateMetric)
        }
        self._with_totals = {
            name: metric for name, metric in metrics.items() if not isinstance(metric, StateMetric)
        }
        self._loader: Iterable[LoadedMicroBatch] = make_dataloader(
            dataset, local, num_workers, prefetch_factor, torch.cuda.is_available()
        )

    @torch.no_grad()
    def run(self, replica: Replica, tensors: Collectives) -> dict[str, float]:
        """Evaluate the model as it stands. Every rank calls this together, with the running
        statistics all-reduced.

        Returns:
            `test_loss`, the mean over all samples, and the metrics that apply, by their names; the
            same on every rank.

        Raises:
            JobError: on every rank, if a metric is NaN although the loss is finite, or no target of
                the test set counts.
            MetricError: on one rank, if a metric's totals have another shape than it promised.
            OutOfMemory: on one rank, naming what needs the memory.
        """
        for state_metric in self._with_states.values():
            state_metric.begin(replica.objective.precision.device)
        replica.objective.set_mode(training=False)
        totals = self._local_totals(replica)
        replica.objective.set_mode(training=True)
        total_loss, total_weight, *others = tensors.sum(totals, "evaluation").tolist()
        if total_weight == 0:
            raise JobError(
                "evaluate: no target of the test set counts (the weights of its losses add up to "
                "0, as where all targets are ignored), so it has no loss: give another test set, "
                "or none"
            )
        results = {"test_loss": total_loss / total_weight}
        for name, state_metric in self._with_states.items():
            with _explained(name):
                state_metric.combine(tensors)
        sums = {}
        for name, metric in self._with_totals.items():
            sums[name], others = others[: metric.num_totals], others[metric.num_totals :]
        for name in self._names:
            try:
                with _explained(name):
                    if name in sums:
                        result = result_of(name, self._with_totals[name], sums[name])
                    else:
                        result = self._with_states[name].result()
            except JobError:
                if math.isfinite(total_loss):
                    raise
                continue  # the model has diverged, which its loss says better
            if result is not None:
                results[name] = result
        return results

    def _local_totals(self, replica: Replica) -> torch.Tensor:
        """Sums over this rank's samples, float64: the loss and its weight, then each metric's
        totals.
        """
        objective = replica.objective
        sizes = [metric.num_totals for metric in self._with_totals.values()]
        device = objective.precision.device
        totals = torch.zeros(2 + sum(sizes), dtype=torch.float64, device=device)
        total_loss, total_weight, *parts = totals.split([1, 1, *sizes])  # views
        states = None
        if self._lanes is not None:
            assert objective.state_form is not None  # found in the rehearsal
            states = LaneStates(self._lanes, objective.state_form)
        for micro_batch, inputs, targets in map(self._transform, self._loader):
            size = micro_batch.size
            # What a model draws while it is evaluated belongs to the micro-batch, and is the same
            # in every evaluation.
            seed_all(seeds.key(replica.seed, seeds.EVALUATION, micro_batch.start))
            with explain_out_of_memory(
                f"an evaluation of {size:,} samples at once", "set evaluate.micro_batch lower"
            ):
                window = None if states is None else states.window(micro_batch)
                loss, outputs, targets = objective.evaluate(inputs, targets, window)
                if states is not None:
                    states.accept()
                loss_sum, weight = loss.totals(size)
                total_loss += loss_sum
                total_weight += weight
                for part, (name, metric) in zip(parts, self._with_totals.items(), strict=True):
                    predict = predict_of(metric)
                    seen = outputs if predict is None else objective.predict(predict, inputs)
                    part += totals_of(name, metric, seen, targets).to(totals)
            for name, state_metric in self._with_states.items():
                with _explained(name):
                    state_metric.update(outputs, targets)
        return totals


def _explained(name: str) -> AbstractContextManager[None]:
    """Out of memory in the `with` block is explained as that of a metric over the test set."""
    return explain_out_of_memory(
        f"evaluate.metrics: {name}",
        "what it keeps may grow with the test set: take a metric whose states do not (for curves, "
        "one with fixed thresholds), or evaluate fewer samples",
    )
