"""Times the engine's steps beside a bare loop of the same mathematics, by turns in one process.

The bare loop is what one would write by hand: the same model, data, optimizer and Horovod wrapper,
and no engine. The engine's side is the loop of a run as it is, decisions, agreement, logs and all,
on a schedule of one stage and without checkpoints.
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
from hvdlarge.build import Components, build_learning, build_loader, build_replica
from hvdlarge.checkpoint.content import RunFacts
from hvdlarge.checkpoint.folder import NoCheckpoints
from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.comm.solo import SoloCollectives
from hvdlarge.config.job import Checkpoint, Job
from hvdlarge.controller import Controller, DecisionFeed
from hvdlarge.data.in_memory import reads_batches
from hvdlarge.exits import JobError
from hvdlarge.loop import train
from hvdlarge.optim.param_groups import set_lr
from hvdlarge.replica import Replica
from hvdlarge.resilience.consistency import ConsistencyCheck
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.run import Run
from hvdlarge.schedule.growth import NoGrowth
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.schedule.progress import Clock
from hvdlarge.telemetry.run_log import RunLog, SilentRunLog
from hvdlarge.train_state import TrainState
from hvdlarge.world import RankContext

_WARM_UP = 5  # steps of each turn that are not counted


class StepClock(Watchdog):
    """A watchdog that also keeps the moment at which each step began."""

    def __init__(self, rank: int, limits: dict[str, float]) -> None:
        super().__init__(rank, limits)
        self.moments: list[float] = []

    def progress(self, phase: str, step: int | None = None) -> None:
        """As a watchdog's."""
        if step is not None:
            self.moments.append(time.perf_counter())
        super().progress(phase, step)


def measure_step(
    job: Job,
    components: Components,
    context: RankContext,
    clock: StepClock,
    steps: int,
    rounds: int,
    only: str | None = None,
) -> dict[str, list[float]]:
    """Seconds of a step on this rank, for each variant in turn. Every rank calls this together.

    Args:
        job: whose model, data, first batch, optimizer and precision are used.
        components: what it names.
        context: of this rank; its watchdog is `clock`.
        clock: keeps the moments of the engine's steps.
        steps: counted in each turn.
        rounds: turns of each variant.
        only: the one variant to be measured; None for all.

    Returns:
        By the name of the variant: `engine`; `bare loop`; `one worker alone`, the bare loop without
        any other worker; `control`, the decision and the consistency check of a step, without any
        training around them.

    Raises:
        JobError: on every rank, for an unknown variant.
    """
    plan = _one_stage(components.plan, _WARM_UP + steps + 1)
    # Steps are timed, not what comes between them
    job = job.model_copy(update={"checkpoint": Checkpoint(every_epochs=1e9)})
    control, tensors = context.control, context.tensors
    with tempfile.TemporaryDirectory(prefix="hvdlarge-bench-") as folder:
        replica = build_replica(job, components, control, tensors)
        engine = _one_stage_run(job, components, context, replica, plan)
        variants: dict[str, Callable[[], float]] = {
            "engine": lambda: _engine_turn(engine, clock, Path(folder)),
            "control": lambda: _control(plan, context, list(replica.names.values())),
        }
        if only not in variants:
            variants["bare loop"] = _bare(job, components, control, tensors, plan)
            alone = SoloCollectives()
            variants["one worker alone"] = _bare(job, components, control, alone, plan)
        if only is not None and only not in variants:
            raise JobError(f"command line: --only {only}: the variants are {', '.join(variants)}")
        variants = variants if only is None else {only: variants[only]}

        def together(variant: Callable[[], float]) -> Callable[[], float]:
            def turn() -> float:
                control.barrier()
                with contextlib.redirect_stdout(io.StringIO()):
                    return variant()

            return turn

        turns = {name: together(variant) for name, variant in variants.items()}
        run_interleaved(turns, 1)  # memory is taken, caches and connections are made
        return run_interleaved(turns, rounds)


def _one_stage(plan: Plan, steps: int) -> Plan:
    """The plan of so many steps of the first batch."""
    size = plan.clock.dataset_size
    return replace(plan, clock=Clock(size, steps * plan.initial_batch / size), growth=NoGrowth())


def _one_stage_run(
    job: Job, components: Components, context: RankContext, replica: Replica, plan: Plan
) -> Run:
    """The engine's side: a run that evaluates and saves nothing."""
    facts = RunFacts({}, components.sizes, {}, context.control.size)
    components = replace(components, plan=plan, test_set=None)
    return Run(job, context, components, replica, facts, NoCheckpoints(), SilentRunLog())


def _engine_turn(run: Run, clock: StepClock, folder: Path) -> float:
    state, plan = TrainState(), run.components.plan
    if run.context.control.rank == 0:
        run = replace(run, log=RunLog(folder, plan, {}, RunProgress(), state))
    loader = build_loader(run.job.data, run.components.training_set, run.job.seed)
    parts = run.build_loop(loader, RunProgress(), state)
    run.replica.statistics.to_partial()
    clock.moments.clear()
    try:
        train(parts, state)
    finally:
        parts.loader.close()
    run.replica.statistics.all_reduce(run.context.tensors.sum)
    run.log.close()
    return _per_step(clock.moments)


def _control(plan: Plan, context: RankContext, names: list[str]) -> float:
    """A turn of what the engine says in a step: one decision received, one consistency check sent
    and received.
    """
    controller = Controller(plan) if context.control.rank == 0 else None
    feed = DecisionFeed(context.control, controller, 1, lambda decision: None)
    check = ConsistencyCheck(context.control, 0, dict)
    moments = []
    while (decision := feed.next()) is not None:
        moments.append(time.perf_counter())
        check.start(decision, names, None)
        check.finish()
    return _per_step(moments)


def _anew(job: Job, components: Components) -> Components:
    """The components with a model, a loss and an optimizer of their own."""
    model, loss, optimizer, _ = build_learning(job, components.precision)
    return replace(components, model=model, loss=loss, optimizer=optimizer)


def _bare(
    job: Job,
    components: Components,
    control: ControlChannel,
    tensors: Collectives,
    plan: Plan,
) -> Callable[[], float]:
    """A turn of a loop written by hand, on a model of its own."""
    components = _anew(job, components)
    model, loss, precision = components.model, components.loss, components.precision
    replica = build_replica(job, components, control, tensors)
    layout = plan.layout(_first(plan))
    numbers = layout.numbers_of_rank(control.rank)
    sizes = [batch.size for batch in layout.of_rank(control.rank, 0)]
    batches = _batches(job, components.training_set)
    optimizer = replica.update.optimizer
    steps = round(plan.clock.total_samples / plan.initial_batch)
    settle = torch.cuda.synchronize if precision.device.type == "cuda" else (lambda: None)

    def turn() -> float:
        # Horovod counts the passes of a step
        replica.update.zero_grad(numbers, layout.num_micro_batches)
        set_lr(optimizer, _first(plan).lr)
        moments = []
        for _ in range(steps):
            moments.append(time.perf_counter())
            optimizer.zero_grad()
            for size in sizes:
                inputs, targets = (replica.to_device(part) for part in batches(size))
                with precision.autocast():
                    share = loss(model(inputs), targets) * (size / plan.initial_batch)
                share.backward()
            optimizer.step()
        settle()
        return _per_step(moments)

    return turn


def _first(plan: Plan) -> Any:
    decision = Controller(plan).decide()
    assert decision is not None  # a plan has at least one step
    return decision


def _batches(job: Job, training_set: Any) -> Callable[[int], Any]:
    """Random batches of a size: by an index for tensors, by torch's own DataLoader for any other
    set.
    """
    if reads_batches(training_set):
        return lambda size: training_set.batch(torch.randint(len(training_set), (size,)))
    waiting: dict[int, Iterator[Any]] = {}

    def loaded(size: int) -> Any:
        if size not in waiting:
            processes = job.data.num_workers
            loader: Any = DataLoader(
                training_set,
                batch_size=size,
                shuffle=True,
                drop_last=True,
                num_workers=processes,
                prefetch_factor=job.data.prefetch_factor if processes else None,
                multiprocessing_context="forkserver" if processes else None,
            )
            waiting[size] = itertools.chain.from_iterable(itertools.repeat(loader))
        return next(waiting[size])

    return loaded


def _per_step(moments: list[float]) -> float:
    """Seconds from the first counted step to the beginning of the last one."""
    return (moments[-1] - moments[_WARM_UP]) / (len(moments) - 1 - _WARM_UP)
