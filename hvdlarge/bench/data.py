"""Measures a job's data loading: its throughput, and how long steps wait for their samples."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.config.job import Data
from hvdlarge.controller import Controller
from hvdlarge.data.in_memory import reads_batches
from hvdlarge.schedule.plan import Plan
from hvdlarge.training import build


class DataWait(NamedTuple):
    """Seconds that the steps of this rank waited for their samples.

    The median and the maximum exclude the first step, which waits for the loader processes to
    start. Borders are the starts of stages and epochs.
    """

    step_seconds: float  # simulated compute of the first step
    steps: int
    median: float
    longest: float
    longest_at_border: float  # in the first two steps after a border
    borders: int


def loading_speed(
    data: Data, plan: Plan, training_set: Any, seed: int, num_workers: int, seconds: float
) -> float:
    """Data loading throughput of one worker, in samples per second.

    Args:
        data: the job's section.
        plan: its first micro-batch is loaded repeatedly.
        training_set: the data set.
        seed: of the run.
        num_workers: loader processes, in place of the job's.
        seconds: duration of the measurement, after the processes have started.
    """
    section = data.model_copy(update={"num_workers": num_workers})
    decision = Controller(plan).decide()
    assert decision is not None  # a plan has at least one step
    micro_batches = plan.layout(decision).of_rank(0, 0)[:1]
    prefetched = max(1, num_workers * data.prefetch_factor)
    loader = build.build_loader(section, build.sample_form(data), training_set, seed)
    loader.enqueue(micro_batches * (prefetched + 1), is_last=False)
    next(loader.fetch(1))
    start, samples = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        loader.enqueue(micro_batches, is_last=False)
        next(loader.fetch(1))
        samples += micro_batches[0].size
    elapsed = time.perf_counter() - start
    loader.close()
    return samples / elapsed


def measure_waits(
    data: Data,
    plan: Plan,
    training_set: Any,
    seed: int,
    control: ControlChannel,
    sample_seconds: float,
    steps: int,
) -> DataWait:
    """Load the plan's steps as a run does, sleeping in place of compute. Every rank calls this
    together.

    Args:
        data: the job's section.
        plan: of the run.
        training_set: the data set.
        seed: of the run.
        control: the channel for decisions.
        sample_seconds: simulated compute time per sample.
        steps: limit on the number of steps.
    """
    loader = build.build_loader(data, build.sample_form(data), training_set, seed)
    controller = Controller(plan) if control.rank == 0 else None
    feed = build.build_feed(data, plan, control, controller, loader)
    waits: list[tuple[bool, float]] = []
    stage, epoch, borders, first_step_seconds = 0, 0, 0, 0.0
    steps_since_border = 2
    while (decision := feed.next()) is not None and len(waits) < steps:
        micro_batches = plan.layout(decision).of_rank(control.rank, decision.samples_seen)
        if (decision.stage, int(decision.epoch)) != (stage, epoch):
            stage, epoch, steps_since_border = decision.stage, int(decision.epoch), 0
            borders += 1
        waited = 0.0
        loaded = loader.fetch(len(micro_batches))
        for micro_batch in micro_batches:
            start = time.perf_counter()
            next(loaded)
            waited += time.perf_counter() - start
            time.sleep(sample_seconds * micro_batch.size)
        if controller is not None:  # nothing is measured: a growth that depends on it never acts
            controller.observe(decision.step, {})
        waits.append((steps_since_border < 2, waited))
        steps_since_border += 1
        first_step_seconds = first_step_seconds or sample_seconds * sum(
            micro_batch.size for micro_batch in micro_batches
        )
    loader.close()
    counted = waits[1:] or waits
    ordered = sorted(wait for _, wait in counted)
    at_border = [wait for is_border, wait in counted if is_border]
    return DataWait(
        first_step_seconds,
        len(waits),
        statistics.median(ordered),
        ordered[-1],
        max(at_border, default=0.0),
        borders,
    )


def loads_in_place(training_set: Any) -> bool:
    """Whether the data set is read in the training process, without loader processes."""
    return reads_batches(training_set)
