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

from hvdlarge import build
from hvdlarge.bench.interleave import run_interleaved
from hvdlarge.comm.interfaces import Collectives
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
from hvdlarge.run import Components, RankContext, build_loop, join
from hvdlarge.schedule.growth import NoGrowth
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.schedule.progress import Clock
from hvdlarge.telemetry.run_folder import FolderLock
from hvdlarge.telemetry.run_log import RunLog
from hvdlarge.train_state import TrainState

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
    found: Components,
    worker: RankContext,
    clock: StepClock,
    steps: int,
    rounds: int,
    only: str | None = None,
) -> dict[str, list[float]]:
    """Seconds of a step on this rank, for each side in turn. Every rank calls this together.

    Args:
        job: whose model, data, first batch, optimizer and precision are used.
        found: what it names.
        worker: this rank; its watchdog is `clock`.
        clock: keeps the moments of the engine's steps.
        steps: counted in each turn.
        rounds: turns of each side.
        only: the one side to be measured; None for all.

    Returns:
        By the name of the side: `engine`; `bare loop`; `one worker alone`, the bare loop without
        any other worker; `control`, the decision and the agreement of a step, without any training
        around them.

    Raises:
        JobError: on every rank, for an unknown side.
    """
    plan = _one_stage(found.plan, _WARM_UP + steps + 1)
    # Steps are timed, not what comes between them
    job = job.model_copy(update={"checkpoint": Checkpoint(every_epochs=1e9)})
    rank, control = worker.control.rank, worker.control
    with tempfile.TemporaryDirectory(prefix="hvdlarge-bench-") as folder:
        engine = join(job, found, control, worker.tensors)
        alone = replace(found, plan=plan, test_set=None)
        sides: dict[str, Callable[[], float]] = {
            "engine": lambda: _engine_turn(job, alone, worker, engine, clock, Path(folder)),
            "control": lambda: _control(plan, worker, list(engine.names.values())),
        }
        if only not in sides:
            sides["bare loop"] = _bare(job, found, worker, worker.tensors, plan)
            sides["one worker alone"] = _bare(job, found, worker, SoloCollectives(), plan)
        if only is not None and only not in sides:
            raise JobError(f"command line: --only {only}: the sides are {', '.join(sides)}")
        sides = sides if only is None else {only: sides[only]}

        def together(side: Callable[[], float]) -> Callable[[], float]:
            def turn() -> float:
                control.barrier()
                with (
                    contextlib.redirect_stdout(io.StringIO())
                    if rank == 0
                    else contextlib.nullcontext()
                ):
                    return side()

            return turn

        turns = {name: together(side) for name, side in sides.items()}
        run_interleaved(turns, 1)  # memory is taken, caches and connections are made
        return run_interleaved(turns, rounds)


def _one_stage(plan: Plan, steps: int) -> Plan:
    """The plan of so many steps of the first batch."""
    size = plan.clock.dataset_size
    return replace(plan, clock=Clock(size, steps * plan.initial_batch / size), growth=NoGrowth())


def _engine_turn(
    job: Job,
    found: Components,
    worker: RankContext,
    learner: Replica,
    clock: StepClock,
    folder: Path,
) -> float:
    state, log, controller = TrainState(), None, None
    if worker.control.rank == 0:
        controller = Controller(found.plan)
        log = RunLog(folder, found.plan, FolderLock(folder), {}, RunProgress(), state)
    loader = build.build_loader(job.data, found.training_set, job.seed)
    parts = build_loop(job, found, worker, learner, loader, controller, None, {}, log, state)
    learner.statistics.to_partial()
    clock.moments.clear()
    try:
        train(parts, state)
    finally:
        parts.loader.close()
    learner.statistics.all_reduce(worker.tensors.sum)
    if log is not None:
        log.close()
    return _per_step(clock.moments)


def _control(plan: Plan, worker: RankContext, names: list[str]) -> float:
    """A turn of what the engine says in a step: one decision received, one agreement sent and
    heard.
    """
    controller = Controller(plan) if worker.control.rank == 0 else None
    feed = DecisionFeed(worker.control, controller, 1, lambda decision: None)
    agreement = ConsistencyCheck(worker.control, 0, dict)
    moments = []
    while (decision := feed.next()) is not None:
        moments.append(time.perf_counter())
        agreement.start(decision, names, None)
        agreement.finish()
    return _per_step(moments)


def _bare(
    job: Job, found: Components, worker: RankContext, tensors: Collectives, plan: Plan
) -> Callable[[], float]:
    """A turn of a loop written by hand, on a model of its own."""
    model, loss, optimizer, _ = build.build_learning(
        job.model, job.loss, job.optimizer, found.arithmetic, job.seed
    )
    learner = join(
        job, replace(found, model=model, loss=loss, optimizer=optimizer), worker.control, tensors
    )
    layout = plan.layout(_first(plan))
    mine = layout.numbers_of_rank(worker.control.rank)
    sizes = [batch.size for batch in layout.of_rank(worker.control.rank, 0)]
    batches = _batches(job, found.training_set)
    optimizer, steps = (
        learner.update.optimizer,
        round(plan.clock.total_samples / plan.initial_batch),
    )
    settle = torch.cuda.synchronize if found.arithmetic.device.type == "cuda" else (lambda: None)

    def turn() -> float:
        # Horovod counts the passes of a step
        learner.update.zero_grad(mine, layout.num_micro_batches)
        set_lr(optimizer, _first(plan).lr)
        moments = []
        for _ in range(steps):
            moments.append(time.perf_counter())
            optimizer.zero_grad()
            for size in sizes:
                inputs, targets = (learner.to_device(part) for part in batches(size))
                with found.arithmetic.autocast():
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
