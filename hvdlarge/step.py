"""One step: from decided micro-batches to moved weights. It stays on one screen; a new idea is an object handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hvdlarge.comm.world import SummedUpdate
from hvdlarge.data import seeds
from hvdlarge.data.draws import seed_torch
from hvdlarge.data.layout import BatchLayout
from hvdlarge.data.loader import Loaded
from hvdlarge.measure.timers import PhaseTimers
from hvdlarge.models.running_statistics import RunningStatistics
from hvdlarge.optim.groups import set_rate
from hvdlarge.schedule.decision import Decision


@dataclass(frozen=True)
class Learner:
    """What learns, on one worker."""

    model: torch.nn.Module
    loss: Callable[[Any, Any], torch.Tensor]  # a mean over the samples of a micro-batch
    update: SummedUpdate
    statistics: RunningStatistics
    to_device: Callable[[Any], Any]  # moves a micro-batch's inputs or targets, and gives floats the run's precision
    seed: int
    rank: int


def train_step(
    decision: Decision, layout: BatchLayout, fetched: Iterable[Loaded], learner: Learner, timed: PhaseTimers
) -> torch.Tensor:
    """Take the decided step. Every rank calls this together, with its own micro-batches in `fetched`.

    Returns:
        This worker's share of the mean loss over the global batch, float64, shape (); all workers' shares add up to it.
    """
    mine = layout.numbers_of_rank(learner.rank)
    loss_share = torch.zeros((), dtype=torch.float64, device=next(learner.model.parameters()).device)
    learner.update.begin(num_micro_batches=len(mine))
    learner.statistics.begin_step(others_before=mine.start)
    for micro_batch, inputs, targets in fetched:
        # Dropout belongs to the micro-batch, named by its first sample: not to the worker that happens to process it.
        seed_torch(seeds.key(learner.seed, seeds.MICRO_BATCH, micro_batch.start))
        with timed("forward"):
            outputs = learner.model(learner.to_device(inputs))
            share = learner.loss(outputs, learner.to_device(targets)) * (micro_batch.size / decision.global_batch)
        with timed("backward"):
            share.backward()
        loss_share += share.detach()
    learner.statistics.end_step(layout.num_micro_batches - mine.stop, layout.num_micro_batches)
    with timed("allreduce"):
        learner.update.reduce()
    with timed("update"):  # only now: the trust ratios of LARS are those of the mean gradient
        set_rate(learner.update.optimizer, decision.lr)
        learner.update.apply()
    return loss_share
