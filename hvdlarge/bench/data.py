"""Times a job's data path: how fast its samples are loaded, and whether a step ever waits for
them.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from hvdlarge import build
from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.config.job import Data
from hvdlarge.controller import Controller
from hvdlarge.data.in_memory import reads_batches
from hvdlarge.schedule.plan import Plan


class DataWait(NamedTuple):
    """How long this rank's steps waited for their samples, in seconds."""

    step_seconds: float  # of a step of the first batch
    steps: int
    median: float
    longest: float  # of all but the first step, which waits for the loader processes to start
    # Of those, in the first step of a stage or an epoch, and the one after it
    longest_at_border: float
    borders: int


def loading_speed(
    data: Data, plan: Plan, training_set: Any, seed: int, num_workers: int, seconds: float
) -> float:
    """Samples per second that one worker loads as fast as it can, with so many loader processes.

    Args:
        data: the job's section.
        plan: whose first micro-batch is loaded again and again.
        training_set: the set.
        seed: of the run.
        num_workers: loader processes.
        seconds: for how long, after the processes have started.
    """
    section = data.model_copy(update={"num_workers": num_workers})
    decision = Controller(plan).decide()
    assert decision is not None  # a plan has at least one step
    batches = plan.layout(decision).of_rank(0, 0)[:1]
    ahead = max(1, num_workers * data.prefetch_factor)
    loader = build.build_loader(section, training_set, seed)
    loader.enqueue(batches * (ahead + 1), is_last=False)
    next(loader.fetch(1))
    begin, samples = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        loader.enqueue(batches, is_last=False)
        next(loader.fetch(1))
        samples += batches[0].size
    seconds_taken = time.perf_counter() - begin
    loader.close()
    return samples / seconds_taken


def measure_waits(
    data: Data,
    plan: Plan,
    training_set: Any,
    seed: int,
    control: ControlChannel,
    sample_seconds: float,
    steps: int,
) -> DataWait:
    """Follow the plan's decisions with its loader, and sleep where a run would compute. Every rank
    calls this together.

    Args:
        data: the job's section.
        plan: whose decisions are followed.
        training_set: the set.
        seed: of the run.
        control: carries the decisions.
        sample_seconds: what a worker is taken to compute for one sample.
        steps: at most.
    """
    loader = build.build_loader(data, training_set, seed)
    controller = Controller(plan) if control.rank == 0 else None
    feed = build.build_feed(data, plan, control, controller, loader)
    waits: list[tuple[bool, float]] = []
    stage, epoch, borders, first = 0, 0, 0, 0.0
    since_border = 2
    while (decision := feed.next()) is not None and len(waits) < steps:
        mine = plan.layout(decision).of_rank(control.rank, decision.samples_seen)
        if (decision.stage, int(decision.epoch)) != (stage, epoch):
            stage, epoch, since_border = decision.stage, int(decision.epoch), 0
            borders += 1
        waited = 0.0
        fetched = loader.fetch(len(mine))
        for micro_batch in mine:
            begin = time.perf_counter()
            next(fetched)
            waited += time.perf_counter() - begin
            time.sleep(sample_seconds * micro_batch.size)
        if controller is not None:
            controller.observe(
                decision.step, {}
            )  # nothing is measured, so its growths are left out
        waits.append((since_border < 2, waited))
        since_border += 1
        first = first or sample_seconds * sum(micro_batch.size for micro_batch in mine)
    loader.close()
    counted = waits[1:] or waits
    ordered = sorted(wait for _, wait in counted)
    at_border = [wait for is_border, wait in counted if is_border]
    return DataWait(
        first,
        len(waits),
        ordered[len(ordered) // 2],
        ordered[-1],
        max(at_border, default=0.0),
        borders,
    )


def loads_in_place(training_set: Any) -> bool:
    """Whether the set is indexed in the training process, without loader processes."""
    return reads_batches(training_set)
