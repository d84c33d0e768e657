"""Times the engine's steps against a hand-written loop of the same computation.

The bare loop has the same model, data, optimizer and Horovod wrapper, but no engine. The engine
runs its own training loop, with decisions, consistency checks and logs, on a schedule of one stage
and without checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from hvdlarge.bench.interleave import run_interleaved
from hvdlarge.checkpoint.content import RunFacts
from hvdlarge.checkpoint.folder import NoCheckpoints
from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.comm.rank_checks import raise_on_all_ranks
from hvdlarge.comm.solo import SoloCollectives
from hvdlarge.config.job import Checkpoint, Job
from hvdlarge.controller import Controller, DecisionFeed
from hvdlarge.data import seeds
from hvdlarge.data.in_memory import reads_batches
from hvdlarge.exits import JobError
from hvdlarge.optim.param_groups import set_lr
from hvdlarge.preflight.rehearsal import Rehearsal, Rehearsed
from hvdlarge.replica.replica import Replica
from hvdlarge.replica.train_state import TrainState
from hvdlarge.resilience.consistency import ConsistencyCheck
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.schedule.batch import MicroBatch
from hvdlarge.schedule.growth import NoGrowth
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.schedule.progress import Clock
from hvdlarge.telemetry.run_log import RunLog, SilentRunLog
from hvdlarge.training.build import (
    Components,
    build_learning,
    build_loader,
    build_replica,
    device_mover,
)
from hvdlarge.training.loop import train
from hvdlarge.training.run import Run
from hvdlarge.world import RankContext

_WARM_UP = 5  # steps of each round that are not timed
_VARIANTS = ("engine", "control", "bare loop", "one worker alone")


class StepClock(Watchdog):
    """A watchdog that also records the start time of each step."""

    def __init__(self, rank: int, limits: dict[str, float]) -> None:
        super().__init__(rank, limits)
        self.starts: list[float] = []  # time.perf_counter()

    def progress(self, phase: str, step: int | None = None, times: int = 1) -> None:
        """See Watchdog; records the time when a step starts."""
        if step is not None:
            self.starts.append(time.perf_counter())
        super().progress(phase, step, times)


def measure_step(
    job: Job,
    components: Components,
    context: RankContext,
    clock: StepClock,
    steps: int,
    rounds: int,
    only: str | None = None,
) -> dict[str, list[float]]:
    """Time a step on this rank. Every rank calls this together.

    Args:
        job: defines model, data, first batch, optimizer and precision.
        components: of the job.
        context: of this rank; its watchdog is `clock`.
        clock: records the engine's steps.
        steps: timed steps per round.
        rounds: number of rounds, in each of which every variant is measured once.
        only: the variant to measure; None for all.

    Returns:
        Seconds per step by variant, one for each round: `engine`; `bare loop`; `one worker alone`,
        the bare loop without communication; `control`, only the decision and the consistency check
        of a step.

    Raises:
        JobError: on every rank, for an unknown variant, a micro-batch that fails in
            model and loss, or a job that the bare loop cannot follow.
    """
    if only not in (None, *_VARIANTS):
        raise JobError(f"command line: --only {only}: the variants are {', '.join(_VARIANTS)}")
    components = raise_on_all_ranks(context.control, lambda: _tried(job, components, only))
    plan = _one_stage(components.plan, _WARM_UP + steps + 1)
    # No checkpoints between the timed steps
    job = job.model_copy(update={"checkpoint": Checkpoint(every_epochs=1e9)})
    control, tensors = context.control, context.tensors
    with tempfile.TemporaryDirectory(prefix="hvdlarge-bench-") as folder:
        replica = build_replica(job, components, control, tensors)
        engine = _one_stage_run(job, components, context, replica, plan)
        variants: dict[str, Callable[[], float]] = {
            "engine": lambda: _engine_round(engine, clock, Path(folder)),
            "control": lambda: _control(plan, context, list(replica.names.values())),
        }
        if only not in ("engine", "control"):
            variants["bare loop"] = _bare(job, components, control, tensors, plan)
            alone = SoloCollectives()
            variants["one worker alone"] = _bare(job, components, control, alone, plan)
        variants = variants if only is None else {only: variants[only]}

        def synchronized(variant: Callable[[], float]) -> Callable[[], float]:
            def one_round() -> float:
                control.barrier()
                with contextlib.redirect_stdout(io.StringIO()):
                    return variant()

            return one_round

        rounds_of = {name: synchronized(variant) for name, variant in variants.items()}
        run_interleaved(rounds_of, 1)  # warm-up: allocates memory, fills caches, opens connections
        return run_interleaved(rounds_of, rounds)


def _tried(job: Job, components: Components, only: str | None) -> Components:
    """The components after a pass of the first micro-batch, which shows what the loss returns."""
    plan = components.plan
    loader = build_loader(job.data, components.form, components.training_set, job.seed)
    try:
        size = min(plan.micro_batch_of(plan.initial_batch), plan.initial_batch)
        loader.enqueue([MicroBatch(0, 0, size)], is_last=False)
        _, inputs, targets = components.transforms.train(next(iter(loader.fetch(1))))
    finally:
        loader.close()
    rehearsal = Rehearsal(components.objective, seeds.key(job.seed, seeds.MICRO_BATCH, 0))
    if components.objective.carries:
        rehearsal.find_state_form(inputs)
    weighted = rehearsal.run_once(inputs, targets, "the first micro-batch").weight is not None
    if only not in ("engine", "control"):
        data = job.data
        plain = not (data.targets is not None or data.collate or data.transforms)
        plain = plain and job.model.output is None and job.data.lanes is None
        pairs = isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor)
        if job.reduction == "exact" or weighted or not (plain and pairs):
            raise JobError(
                "bench step: the bare loop takes samples that are pairs of tensors, without "
                "data.targets, data.collate, data.transforms, data.lanes and model.output, a loss "
                "that is a mean, and reduction: fast; --only engine times the engine alone"
            )
    return replace(components, rehearsed=Rehearsed(weighted_loss=weighted))


def _one_stage(plan: Plan, steps: int) -> Plan:
    """A plan of `steps` steps with the first batch."""
    size = plan.clock.dataset_size
    return replace(plan, clock=Clock(size, steps * plan.initial_batch / size), growth=NoGrowth())


def _one_stage_run(
    job: Job, components: Components, context: RankContext, replica: Replica, plan: Plan
) -> Run:
    """A run without evaluations and checkpoints."""
    facts = RunFacts({}, components.sizes, {}, context.control.size)
    components = replace(components, plan=plan, test_set=None)
    return Run(job, context, components, replica, facts, NoCheckpoints(), SilentRunLog())


def _engine_round(run: Run, clock: StepClock, folder: Path) -> float:
    state, plan = TrainState(), run.components.plan
    if run.context.control.rank == 0:
        run = replace(run, log=RunLog(folder, plan, {}, RunProgress(), state))
    job, components = run.job, run.components
    loader = build_loader(job.data, components.form, components.training_set, job.seed)
    parts = run.build_loop(loader, RunProgress(), state)
    run.replica.statistics.to_partial()
    clock.starts.clear()
    try:
        train(parts, state)
    finally:
        parts.loader.close()
    run.replica.statistics.all_reduce(run.context.tensors.sum)
    run.log.close()
    return _seconds_per_step(clock.starts)


def _control(plan: Plan, context: RankContext, names: list[str]) -> float:
    """One round of the engine's control messages: a decision and a consistency check per step."""
    controller = Controller(plan) if context.control.rank == 0 else None
    feed = DecisionFeed(context.control, controller, 1, lambda decision: None)
    check = ConsistencyCheck(context.control, 0, dict)
    starts = []
    while (decision := feed.next()) is not None:
        starts.append(time.perf_counter())
        check.start(decision, names, None)
        check.finish()
    return _seconds_per_step(starts)


def _rebuilt(job: Job, components: Components) -> Components:
    """The components with a new model, loss and optimizer."""
    objective, optimizer, _ = build_learning(job, components.objective.precision)
    return replace(components, objective=objective, optimizer=optimizer)


def _bare(
    job: Job,
    components: Components,
    control: ControlChannel,
    tensors: Collectives,
    plan: Plan,
) -> Callable[[], float]:
    """A hand-written training loop, on its own model."""
    components = _rebuilt(job, components)
    objective, precision = components.objective, components.objective.precision
    model, loss = objective.model, objective.loss
    move = device_mover(precision, job.model.channels_last)
    replica = build_replica(job, components, control, tensors)
    layout = plan.layout(_first(plan))
    numbers = layout.numbers_of_rank(control.rank)
    sizes = [batch.size for batch in layout.of_rank(control.rank, 0)]
    batches = _batches(job, components.training_set)
    optimizer = replica.update.optimizer
    steps = round(plan.clock.total_samples / plan.initial_batch)
    synchronize = torch.cuda.synchronize if precision.device.type == "cuda" else (lambda: None)

    def one_round() -> float:
        # Tells Horovod the backward passes per step
        replica.update.zero_grad(numbers, layout.num_micro_batches)
        set_lr(optimizer, _first(plan).lr)
        starts = []
        for _ in range(steps):
            starts.append(time.perf_counter())
            optimizer.zero_grad()
            for size in sizes:
                inputs, targets = (move(part) for part in batches(size))
                with precision.autocast():
                    scaled_loss = loss(model(inputs), targets) * (size / plan.initial_batch)
                scaled_loss.backward()
            optimizer.step()
        synchronize()
        return _seconds_per_step(starts)

    return one_round


def _first(plan: Plan) -> Any:
    decision = Controller(plan).decide()
    assert decision is not None  # a plan has at least one step
    return decision


def _batches(job: Job, training_set: Any) -> Callable[[int], Any]:
    """A function that loads a random batch of a given size: by indexing a set of tensors, otherwise
    by torch's DataLoader.
    """
    if reads_batches(training_set):
        return lambda size: training_set.batch(torch.randint(len(training_set), (size,)))
    iterators: dict[int, Iterator[Any]] = {}

    def load(size: int) -> Any:
        if size not in iterators:
            num_workers = job.data.num_workers
            loader: Any = DataLoader(
                training_set,
                batch_size=size,
                shuffle=True,
                drop_last=True,
                num_workers=num_workers,
                prefetch_factor=job.data.prefetch_factor if num_workers else None,
                multiprocessing_context="forkserver" if num_workers else None,
            )
            iterators[size] = itertools.chain.from_iterable(itertools.repeat(loader))
        return next(iterators[size])

    return load


def _seconds_per_step(starts: list[float]) -> float:
    """Mean seconds from the start of a step to that of the next, after the warm-up."""
    return (starts[-1] - starts[_WARM_UP]) / (len(starts) - 1 - _WARM_UP)
