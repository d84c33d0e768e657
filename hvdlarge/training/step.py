"""One step: from decided micro-batches to updated weights.

`train_step` stays short: new behaviour is passed in as an object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from hvdlarge.data import seeds
from hvdlarge.data.loader import LoadedMicroBatch
from hvdlarge.data.rng import seed_all
from hvdlarge.replica.replica import Replica
from hvdlarge.resilience.consistency import ConsistencyCheck, StepFlags
from hvdlarge.resilience.nonfinite import NonFinitePolicy
from hvdlarge.schedule.batch import BatchLayout
from hvdlarge.schedule.decision import Decision
from hvdlarge.telemetry.measurements import Measurements, NoMeasurements
from hvdlarge.telemetry.timers import PhaseTimers


class StepOutcome(NamedTuple):
    """The result of a step."""

    # This worker's share of the mean loss, float64, shape (); all workers' shares add up to it, or
    # to no number if the step `has_no_loss`
    loss_share: torch.Tensor
    # Those of its micro-batches, in their order, each of shape ()
    micro_batch_shares: list[torch.Tensor]
    flags: StepFlags  # the same on every rank
    applied: bool  # whether the weights were updated; the same on every rank
    has_no_loss: bool  # whether no target of the step counts; the same on every rank


def train_step(
    decision: Decision,
    layout: BatchLayout,
    micro_batches: Iterable[LoadedMicroBatch],
    replica: Replica,
    consistency: ConsistencyCheck,
    digest: int | None,
    policy: NonFinitePolicy,
    timers: PhaseTimers,
    measurements: Measurements | NoMeasurements,
) -> StepOutcome:
    """Take the decided step. Every rank calls this together, with its own micro-batches.

    Args:
        decision: of the step.
        layout: how its samples are divided into micro-batches.
        micro_batches: this rank's, loaded; each is fetched when the one before is done.
        replica: the model and what updates it.
        consistency: compares the ranks.
        digest: of this rank's state, where states are compared in this step.
        policy: decides what happens if gradients are not finite.
        timers: of the phases.
        measurements: within the step.

    Raises:
        JobError, RanksDisagreeError, ModeChangedError, DivergedError, RollBack: on every rank.
        PartError, OutOfMemory: on one rank.
    """
    numbers = layout.numbers_of_rank(replica.rank)
    policy.before_step(replica)
    replica.update.zero_grad(numbers, layout.num_micro_batches)
    replica.statistics.begin_step()
    with timers("allreduce"):
        replica.carried.begin_step(layout, decision.samples_seen)
    micro_batch_shares: list[torch.Tensor] = []
    # In any pass so far: exact mode takes the gradients of each pass off the parameters
    without_gradient = {} if replica.zero_if_missing else dict(replica.names)
    for loaded in micro_batches:
        share, weight = _forward(loaded, decision, replica, timers)
        with timers("backward"):
            replica.update.backward(replica.loss_scaler.scaled(share))
            measurements.end_pass(weight)
            micro_batch_shares.append(share.detach())
            without_gradient = {w: name for w, name in without_gradient.items() if w.grad is None}
            replica.update.backward_done()
    got_gradient = _got_gradient(replica, without_gradient) if numbers else None
    with timers("allreduce"):
        uneven = replica.statistics.count_uses(len(numbers))
        consistency.start(decision, got_gradient, digest, uneven=uneven)
        replica.update.synchronize()
        flags = consistency.finish()
        replica.statistics.end_step(layout, flags.uneven)
        factor = replica.averaging.factor(decision.global_batch)
    with timers("update"):
        applied = not math.isnan(factor) and _update(
            decision, replica, policy, factor, measurements
        )
        replica.carried.end_step(applied)
    shares = _shares(micro_batch_shares, factor, replica)
    return StepOutcome(*shares, flags, applied, has_no_loss=math.isnan(factor))


def _forward(
    loaded: LoadedMicroBatch, decision: Decision, replica: Replica, timers: PhaseTimers
) -> tuple[torch.Tensor, torch.Tensor | int]:
    """The share of a micro-batch in the step's loss, and its weight there."""
    micro_batch, inputs, targets = loaded
    # Random draws of model and loss are keyed by the micro-batch, not by the worker
    seed_all(seeds.key(replica.seed, seeds.MICRO_BATCH, micro_batch.start))
    with timers("forward"):
        loss = replica.objective(inputs, targets, replica.carried.window(micro_batch))
        share = replica.averaging.share(loss, micro_batch.size, decision.global_batch)
    return share, micro_batch.size if loss.weight is None else loss.weight


def _update(
    decision: Decision,
    replica: Replica,
    policy: NonFinitePolicy,
    factor: float,
    measurements: Measurements | NoMeasurements,
) -> bool:
    """Update the weights if the policy allows it, and return whether it does. After the
    all-reduce: norms, and so the trust ratios of LARS, are those of the mean gradient.
    """
    replica.loss_scaler.unscale(replica.names, factor)
    norms = replica.update.optimizer.measure()
    if not policy.check(decision, replica, norms):
        return False
    measurements.before_update(norms)
    replica.update.apply(norms.clipped(replica.clip_norm), decision.lr)
    measurements.after_update()
    return True


def _shares(
    micro_batch_shares: list[torch.Tensor], factor: float, replica: Replica
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The share of this worker in the mean loss, and those of its micro-batches."""
    if factor != 1:
        micro_batch_shares = [share.double() * factor for share in micro_batch_shares]
    loss_share = torch.zeros((), dtype=torch.float64, device=replica.objective.precision.device)
    for share in micro_batch_shares:
        loss_share += share
    return loss_share, micro_batch_shares


def _got_gradient(
    replica: Replica, without_gradient: Mapping[torch.nn.Parameter, str]
) -> list[str] | None:
    """The names for the consistency check; None where missing gradients count as zeros."""
    if replica.zero_if_missing:
        return None
    return [name for weight, name in replica.names.items() if weight not in without_gradient]
