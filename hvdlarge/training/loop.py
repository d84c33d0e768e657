"""The training loop: decisions in, steps taken, logs, evaluations and checkpoints out."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from hvdlarge.checkpoint.saver import CheckpointSaver
from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.comm.rank_checks import check_equal_across_ranks, raise_on_all_ranks
from hvdlarge.config.job import AVERAGED
from hvdlarge.controller import DecisionFeed
from hvdlarge.data.loader import LoadedMicroBatch, Loader
from hvdlarge.evaluation.evaluation import Evaluation
from hvdlarge.exits import DivergedError, JobError, Stopped
from hvdlarge.reduction.batch_norm import ModeChangedError
from hvdlarge.replica.replica import Replica
from hvdlarge.replica.train_state import TrainState
from hvdlarge.resilience.buffer_guard import BufferGuard
from hvdlarge.resilience.consistency import ConsistencyCheck, StepFlags
from hvdlarge.resilience.digest import combined, named_state, tensor_digests
from hvdlarge.resilience.nonfinite import NonFinitePolicy
from hvdlarge.resilience.out_of_memory import explain_out_of_memory, oom_hint
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.schedule.progress import milestones_reached
from hvdlarge.telemetry.hooks import Hooks, NoHooks, StepView
from hvdlarge.telemetry.measurements import Measurements, NoMeasurements
from hvdlarge.telemetry.run_log import RunLog, SilentRunLog
from hvdlarge.telemetry.timers import PhaseTimers
from hvdlarge.training.step import StepOutcome, train_step


@dataclass(frozen=True)
class Cadence:
    """Intervals of logging, evaluation and state comparison."""

    log_every_steps: int
    evaluate_every_epochs: float
    compare_every_steps: int


@dataclass(frozen=True)
class LoopComponents:
    """The objects of a run, on one rank."""

    control: ControlChannel
    tensors: Collectives
    plan: Plan
    feed: DecisionFeed
    loader: Loader
    transform: Callable[[LoadedMicroBatch], LoadedMicroBatch]  # of what the loader gives
    replica: Replica
    evaluation: Evaluation | None
    consistency: ConsistencyCheck
    policy: NonFinitePolicy
    saver: CheckpointSaver
    stop: StopRequest
    watchdog: Watchdog
    cadence: Cadence
    log: RunLog | SilentRunLog  # rank 0's; silent elsewhere
    rounds_differently: bool = False  # whether ranks use different floating-point rounding
    buffer_guard: BufferGuard = field(default_factory=BufferGuard)
    hooks: Hooks | NoHooks = field(default_factory=NoHooks)
    measurements: Measurements | NoMeasurements = field(default_factory=NoMeasurements)


def train(components: LoopComponents, state: TrainState) -> None:
    """Follow every decision to the end of the run. Every rank calls this together.

    Args:
        components: the run's objects; the running statistics are partial already.
        state: results so far; changed in place, and the same on every rank.

    Raises:
        Stopped: on every rank, when a stop was asked for; a checkpoint is on disk.
        DivergedError, RanksDisagreeError, CheckpointWriteError, JobError: on every rank.
        RollBack: on every rank, by the job's policy.
    """
    timers = PhaseTimers()
    components.replica.objective.set_mode(training=True)
    components.buffer_guard.begin(components.replica)
    while True:
        with timers("decide"):
            decision = components.feed.next()
        if decision is None:
            return
        components.watchdog.progress("step", decision.step)
        components.log.decision(decision)
        outcome = take_step(components, decision, timers)
        if outcome.flags.failed:  # rank 0 knows what could not be written, and why
            raise_on_all_ranks(
                components.control, lambda: check_files(components), name_ranks=False
            )
        if not outcome.applied:
            state.skipped += 1
        if outcome.has_no_loss:
            state.without_loss += 1
            if state.without_loss == 1:
                components.log.note(_no_loss_note(decision))
        measure(components, decision, timers)
        observe(components, decision, outcome, timers)
        record(components, state, decision, outcome, timers)
        call_hooks(components, "after_step", state, decision)
        best = evaluate(components, state, decision)
        save_if_due(components, state, decision, outcome.flags, best, timers)
        if outcome.flags.stop and not decision.is_last:
            raise Stopped(_stopped(components, decision))


def take_step(components: LoopComponents, decision: Decision, timers: PhaseTimers) -> StepOutcome:
    """Take the decided step; every `compare_every_steps` steps, compare the ranks' states first.
    Every rank calls this together.

    Raises:
        JobError: on every rank, for a changed mode, or a loss with a negative weight.
        RanksDisagreeError, DivergedError, RollBack, PartError, OutOfMemory: see `train_step`.
    """
    layout = components.plan.layout(decision)
    micro_batches = fetch_timed(
        components,
        len(layout.numbers_of_rank(components.replica.rank)),
        layout.accumulation_steps,
        timers,
    )
    compare = decision.step % components.cadence.compare_every_steps == 0
    if compare and components.rounds_differently:
        take_over(components.replica, components.tensors)
    digest = (
        combined(digests(components.replica))
        if compare and not components.rounds_differently
        else None
    )
    where = f"step {decision.step}, with micro-batches of {decision.micro_batch:,} samples"
    hint = oom_hint(decision.micro_batch, decision.global_batch)
    replica = components.replica
    try:
        with explain_out_of_memory(where, hint), components.measurements.step(decision):
            outcome = train_step(
                decision,
                layout,
                micro_batches,
                replica,
                components.consistency,
                digest,
                components.policy,
                timers,
                components.measurements,
            )
    except ModeChangedError as error:
        raise JobError(f"model.name: {error}") from None
    components.watchdog.progress("step")
    if outcome.applied and replica.ema is not None:
        with timers("update"):
            replica.ema.follow(decision.global_batch)
    if compare:
        components.buffer_guard.check_unchanged(components.control, components.replica)
    return outcome


def save_if_due(
    components: LoopComponents,
    state: TrainState,
    decision: Decision,
    flags: StepFlags,
    best: bool,
    timers: PhaseTimers,
) -> None:
    """Write a checkpoint if the cadence, the clock or a stop request asks for one, or after the
    best evaluation so far. Every rank calls this together; errors are those of `save`.
    """
    scheduled = best or components.saver.is_scheduled(decision)
    if not (scheduled or flags.save or flags.stop):
        return
    if scheduled:
        state.scheduled_step = decision.step + 1
    progress = components.feed.progress_after(decision)
    truncated = decision.global_batch < decision.stage_batch
    wait = flags.stop or decision.is_last
    with timers("save"), components.watchdog.during("save"):
        save(components, state, progress, best, scheduled, wait, truncated)
    call_hooks(components, "after_checkpoint", state, decision)


def call_hooks(
    components: LoopComponents, event: str, state: TrainState, decision: Decision
) -> None:
    """Call the hooks after a step that was taken. Every rank calls this together.

    Raises:
        JobError: on every rank, if a hook raised on any, or changed the model.
    """

    def view() -> list[StepView]:
        samples_seen = decision.samples_seen + decision.global_batch
        return [
            StepView(
                step=decision.step,
                epoch=components.plan.clock.epoch(samples_seen),
                samples_seen=samples_seen,
                global_batch=decision.global_batch,
                lr=decision.lr,
                loss=state.results["loss"] if _is_logged(components, decision) else None,
                results=MappingProxyType(dict(state.results)),
                model=components.replica.objective.model,
                rank=components.control.rank,
                world_size=components.control.size,
            )
        ]

    components.hooks.call(event, view)


def _no_loss_note(decision: Decision) -> str:
    return (
        f"step {decision.step} (epoch {decision.epoch:.2f}, global batch "
        f"{decision.global_batch:,}) has no target that counts: it updates no weight and has no "
        "loss; summary.json counts such steps, steps_without_loss"
    )


def _is_logged(components: LoopComponents, decision: Decision) -> bool:
    return decision.is_last or (decision.step + 1) % components.cadence.log_every_steps == 0


def _stopped(components: LoopComponents, decision: Decision) -> str:
    """The message of an orderly stop. Every rank calls this together."""
    answers = components.control.allgather((components.stop.reason or "").encode())
    reasons = sorted({answer.decode() for answer in answers} - {""})
    return (
        f"stopped after step {decision.step} (epoch {decision.epoch:.2f}) as asked by "
        f"{' and '.join(reasons)}; a checkpoint was written; run the same command to resume"
    )


def measure(components: LoopComponents, decision: Decision, timers: PhaseTimers) -> None:
    """Log what was measured within the step. Every rank calls this together."""
    with timers("measure"):
        records = components.measurements.finish(decision)
    samples_seen = decision.samples_seen + decision.global_batch
    place = {
        "step": decision.step,
        "epoch": components.plan.clock.epoch(samples_seen),
        "samples_seen": samples_seen,
    }
    for each in records:
        components.log.metrics({**place, **each})


def observe(
    components: LoopComponents, decision: Decision, outcome: StepOutcome, timers: PhaseTimers
) -> None:
    """Pass the step's mean loss, and the gradient noise scale where it is available, to the
    controller, if the growth depends on measurements. Every rank calls this together.

    The loss is the exact sum of the micro-batches' shares, rounded once, so its bits do not depend
    on the number of workers.
    """
    if not components.plan.growth.depends_on_measurement:
        return
    measured = {}
    if outcome.applied:
        with timers("measure"):
            own = [share.item() for share in outcome.micro_batch_shares]
            messages = components.control.allgather(struct.pack(f"<{len(own)}d", *own))
        shares = [share for message in messages for (share,) in struct.iter_unpack("<d", message)]
        finite = all(map(math.isfinite, shares))
        measured["loss"] = math.fsum(shares) if finite else math.nan
        noise_scale = components.measurements.settled_noise_scale
        if noise_scale is not None:
            measured["noise_scale"] = noise_scale
    components.feed.observe(decision.step, measured)


def record(
    components: LoopComponents,
    state: TrainState,
    decision: Decision,
    outcome: StepOutcome,
    timers: PhaseTimers,
) -> None:
    """Log the step and check its loss, every `log_every_steps` steps and after the last one. Every
    rank calls this together.

    Raises:
        DivergedError, RollBack: on every rank, if the step was applied and its loss is not finite.
    """
    if not _is_logged(components, decision):
        return
    with timers("measure"):
        # Over MPI: for eight bytes a hundred times faster than in Horovod's next cycle
        shares = components.control.allgather(struct.pack("<d", outcome.loss_share.item()))
        loss = sum(struct.unpack("<d", share)[0] for share in shares)
    samples_seen = decision.samples_seen + decision.global_batch
    # After a skipped step the optimizer still holds the ratios of an earlier one
    ratios = trust_ratios(components.replica.update.optimizer) if outcome.applied else {}
    measured = {
        "step": decision.step,
        "epoch": components.plan.clock.epoch(samples_seen),
        "samples_seen": samples_seen,
        "global_batch": decision.global_batch,
        "lr": decision.lr,
        "loss": loss,
    }
    components.log.metrics(measured | ratios | timers.read())
    components.log.progress(decision, samples_seen, loss)
    state.results["loss"] = loss
    if outcome.applied and not math.isfinite(loss):
        components.policy.check_loss(decision, loss)


def evaluate(components: LoopComponents, state: TrainState, decision: Decision) -> bool:
    """Evaluate every `evaluate_every_epochs` epochs and at the end. Every rank calls this together.

    Returns:
        Whether this is the best evaluation so far; the same on every rank.

    Raises:
        DivergedError: on every rank, if the test loss is not finite.
        JobError: on every rank, if a metric is NaN although the loss is finite, or a hook fails.
    """
    samples_seen = decision.samples_seen + decision.global_batch
    epoch, every = (
        components.plan.clock.epoch(samples_seen),
        components.cadence.evaluate_every_epochs,
    )
    passed = milestones_reached(epoch, every, None) > milestones_reached(
        decision.epoch, every, None
    )
    if components.evaluation is None or not (passed or decision.is_last):
        return False
    began = time.monotonic()
    components.replica.statistics.all_reduce(components.tensors.sum)
    results = evaluate_weights(
        components.evaluation, components.replica, components.tensors, components.watchdog
    )
    components.replica.statistics.to_partial()
    seconds = time.monotonic() - began
    # A metric of an earlier evaluation may be gone from the job, or may not apply any more
    for name in state.results.keys() - results.keys() - {"loss"}:
        del state.results[name]
    state.results.update(results)
    place = {"step": decision.step, "epoch": epoch, "samples_seen": samples_seen}
    components.log.metrics(place | results | {"evaluate_seconds": seconds})
    components.log.evaluated(results)
    if not math.isfinite(loss := results["test_loss"]):
        raise DivergedError(
            f"the test loss is {loss} at epoch {epoch:.2f}: lower lr.base or warm up longer"
        )
    call_hooks(components, "after_evaluation", state, decision)
    return components.saver.is_best(state, decision, results)


def evaluate_weights(
    evaluation: Evaluation, replica: Replica, tensors: Collectives, watchdog: Watchdog
) -> dict[str, float]:
    """The results of the weights, and those of the averaged ones under names with `ema_`. Every
    rank calls this together, as `Evaluation.run`.
    """
    with watchdog.during("evaluate"):
        results = evaluation.run(replica, tensors)
    if replica.ema is None:
        return results
    with watchdog.during("evaluate"), replica.ema.in_use():
        averaged = evaluation.run(replica, tensors)
    return results | {f"{AVERAGED}{name}": value for name, value in averaged.items()}


def save(
    components: LoopComponents,
    state: TrainState,
    progress: RunProgress | None,
    best: bool,
    scheduled: bool,
    wait: bool,
    truncated: bool = False,
) -> None:
    """Write a checkpoint after checking that all ranks agree and all weights are finite. Every rank
    calls this together.

    Args and errors are those of `CheckpointSaver.save`, and:

    Raises:
        RanksDisagreeError, DivergedError: on every rank.
        JobError: on every rank, if a saved buffer or extra state has changed.
    """
    if components.rounds_differently:
        take_over(components.replica, components.tensors)
    else:
        compare_states(components.control, components.replica)
    components.buffer_guard.check_unchanged(components.control, components.replica)
    names = components.replica.names
    # One wait for a GPU, not one for each weight
    finite = torch.stack([torch.isfinite(weight).all() for weight in names]).tolist()
    if not all(finite):
        name = list(names.values())[finite.index(False)]
        raise DivergedError(
            f"the weight {name} is not finite, so nothing is saved: lower lr.base or warm up longer"
        )
    state.train_seconds = components.log.seconds
    raise_on_all_ranks(
        components.control,
        lambda: components.saver.save(progress, state, best, scheduled, wait, truncated),
        name_ranks=False,
    )


def check_files(components: LoopComponents) -> None:
    """Raise CheckpointWriteError on rank 0 if the last checkpoint or a log could not be written."""
    components.saver.finish()
    components.log.check()


def shared_state(replica: Replica) -> dict[str, torch.Tensor]:
    """The tensors that must be the same on every rank, by name."""
    partial = replica.statistics.partial_buffers()
    state = named_state(replica.modules, replica.update.optimizer, replica.names, partial)
    return state if replica.ema is None else state | replica.ema.named_tensors()


def digests(replica: Replica) -> dict[str, int]:
    """A digest of each tensor that must be the same on every rank."""
    return tensor_digests(shared_state(replica))


def take_over(replica: Replica, tensors: Collectives) -> None:
    """Broadcast rank 0's state to ranks that round differently and have drifted apart. Every rank
    calls this together.
    """
    tensors.broadcast_(list(shared_state(replica).items()))


def compare_states(control: ControlChannel, replica: Replica) -> None:
    """Compare the states of all ranks. Every rank calls this together.

    Raises:
        RanksDisagreeError: on every rank, naming the first differing tensor.
    """
    local = digests(replica)
    if len(set(control.allgather(combined(local).to_bytes(8, "little")))) > 1:
        check_equal_across_ranks(control, local, "weights, buffers and optimizer state (by digest)")


def fetch_timed(
    components: LoopComponents, count: int, most: int, timers: PhaseTimers
) -> Iterator[LoadedMicroBatch]:
    """Yield the loader's next `count` micro-batches, transformed; waiting for them is the phase
    `fetch`.

    After the last one begins the phase `allreduce`: other ranks may still wait for the data of all
    of theirs, which are `most` at most.
    """
    fetched = components.loader.fetch(count)
    for _ in range(count):
        components.watchdog.progress("fetch")
        with timers("fetch"):
            loaded = next(fetched)
        components.watchdog.progress("step")
        with timers("forward"):
            loaded = components.transform(loaded)
        yield loaded
        components.watchdog.progress("fetch")
        with timers("fetch"):
            components.loader.read_ahead()
    components.watchdog.progress("allreduce", times=most)


def trust_ratios(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Smallest and largest trust ratio of the adapted tensors in the last step, for an optimizer
    that has them.
    """
    if not hasattr(optimizer, "trust_ratio_of"):
        return {}
    adapted = (
        weight for group in optimizer.param_groups if group["adapt"] for weight in group["params"]
    )
    ratios = [ratio for ratio in map(optimizer.trust_ratio_of, adapted) if ratio is not None]
    return {"trust_ratio_min": min(ratios), "trust_ratio_max": max(ratios)} if ratios else {}
