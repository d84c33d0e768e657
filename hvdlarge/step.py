"""One step: from decided micro-batches to moved weights. It stays on one screen; a new idea is an
object handed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from hvdlarge.data import seeds
from hvdlarge.data.loader import LoadedMicroBatch
from hvdlarge.data.rng import seed_all
from hvdlarge.replica import Replica
from hvdlarge.resilience.consistency import ConsistencyCheck, StepFlags
from hvdlarge.resilience.nonfinite import NonFinitePolicy
from hvdlarge.schedule.batch import BatchLayout
from hvdlarge.schedule.decision import Decision
from hvdlarge.telemetry.timers import PhaseTimers


class StepOutcome(NamedTuple):
    """What came of a step."""

    # This worker's share of the mean loss, float64, shape (); all workers' shares add up to it
    loss_share: torch.Tensor
    # Those of its micro-batches, in their order, each of shape ()
    micro_batch_shares: list[torch.Tensor]
    verdict: StepFlags  # the same on every rank
    applied: bool  # whether the weights have moved; the same on every rank


def train_step(
    decision: Decision,
    layout: BatchLayout,
    fetched: Iterable[LoadedMicroBatch],
    learner: Replica,
    agreement: ConsistencyCheck,
    digest: int | None,
    policy: NonFinitePolicy,
    timed: PhaseTimers,
) -> StepOutcome:
    """Take the decided step. Every rank calls this together, with its own micro-batches in
    `fetched`.
    """
    mine = layout.numbers_of_rank(learner.rank)
    loss_share = torch.zeros((), dtype=torch.float64, device=learner.arithmetic.device)
    policy.before_step(learner)
    learner.update.zero_grad(mine, layout.num_micro_batches)
    learner.statistics.begin_step()
    micro_batch_shares: list[torch.Tensor] = []
    got_gradient: list[str] | None = None  # an idle worker has no view of it
    for micro_batch, inputs, targets in fetched:
        # What model and loss draw belongs to the micro-batch, named by its first sample: not to the
        # worker that processes it.
        seed_all(seeds.key(learner.seed, seeds.MICRO_BATCH, micro_batch.start))
        with timed("forward"), learner.arithmetic.autocast():
            outputs = learner.model(learner.to_device(inputs))
            share = learner.loss(outputs, learner.to_device(targets)) * (
                micro_batch.size / decision.global_batch
            )
        with timed("backward"):
            learner.update.backward(learner.scale.scaled(share))
            micro_batch_shares.append(share.detach())
            loss_share += micro_batch_shares[-1]
            if micro_batch.number == mine.stop - 1 and not learner.zero_if_missing:
                got_gradient = [
                    name for weight, name in learner.names.items() if weight.grad is not None
                ]
            learner.update.backward_done()
    with timed("allreduce"):
        agreement.start(
            decision, got_gradient, digest, uneven=learner.statistics.count_uses(len(mine))
        )
        learner.update.synchronize()
        verdict = agreement.finish()
        learner.statistics.end_step(layout, verdict.uneven)
    # Only now: the norms, and so the trust ratios of LARS, are those of the mean gradient
    with timed("update"):
        learner.scale.unscale(learner.names)
        norms = learner.update.optimizer.measure()
        applied = policy.check(decision, learner, norms)
        if applied:
            learner.update.apply(norms.clipped(learner.clip_norm), decision.lr)
    return StepOutcome(loss_share, micro_batch_shares, verdict, applied)
