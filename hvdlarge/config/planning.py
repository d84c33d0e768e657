"""A run before it is started: what a job comes to on a number of workers, and what cannot run
there. Needs no torch, Horovod or MPI.

`train` and `plan` both come through here, so that they refuse the same jobs in the same words.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hvdlarge.config import registry, yaml_source
from hvdlarge.config.job import Checkpoint, Job
from hvdlarge.exits import JobError
from hvdlarge.reduction.tree import depth_of
from hvdlarge.schedule.batch import BatchLayout
from hvdlarge.schedule.outline import StageOutline, curve
from hvdlarge.schedule.plan import Plan
from hvdlarge.schedule.progress import Clock, milestones_reached

_MOST_SAMPLES = 2**53  # a float counts samples exactly up to here


class UnknownSamples(JobError):
    """The number of training samples is known only when the data are loaded."""


def plan_run(job: Job, dataset_size: int, world_size: int) -> Plan:
    """The plan that the controller follows.

    Args:
        job: the job.
        dataset_size: training samples.
        world_size: workers.

    Raises:
        JobError: for a run without a sample in it, a learning rate that overflows, a number of
            workers that exact mode cannot serve, or too few lanes for the batch.
    """
    if job.reduction == "exact" and depth_of(world_size) is None:
        raise JobError(f"reduction: exact needs 1, 2, 4, 8, … workers, not {world_size}")
    try:
        plan = job.plan(dataset_size, world_size)
    except (ValueError, OverflowError) as error:
        raise JobError(f"epochs: {error}") from None
    if plan.clock.total_samples >= _MOST_SAMPLES:
        raise JobError(
            f"epochs: a run of {job.epochs:g} epochs over {dataset_size:,} samples is longer than "
            "can be counted"
        )
    try:
        stages = plan.stages
    except ValueError as error:
        raise JobError(f"batch.growth: {error}") from None
    for stage in stages:
        if not math.isfinite(stage.highest_lr):
            raise JobError(
                f"lr: the lr is {stage.highest_lr} in stage {stage.stage} (global batch "
                f"{stage.global_batch})"
            )
    if job.data.lanes is not None:
        _check_lanes(job, job.data.lanes, plan)
    return plan


def _check_lanes(job: Job, lanes: int, plan: Plan) -> None:
    size, largest = plan.clock.dataset_size, max(stage.global_batch for stage in plan.stages)
    growth = plan.growth
    if lanes > size:
        raise JobError(f"data.lanes: {size:,} samples cannot be cut into {lanes:,} lanes")
    if largest > lanes:
        key = "batch.initial" if plan.initial_batch > lanes else "batch.growth"
        most = (
            f"give {largest:,} lanes or more"
            if largest <= size
            else f"there can be {size:,} lanes, as many as samples"
        )
        raise JobError(
            f"{key}: the global batch reaches {largest:,} samples, and a step takes at most one of "
            f"each of {lanes:,} lanes (data.lanes); {most}, or a smaller batch"
        )
    limit = getattr(growth, "max", None)
    if growth.depends_on_measurement and not (isinstance(limit, int) and limit <= lanes):
        raise JobError(
            f"batch.growth: {growth.policy} depends on what is measured: with data.lanes it needs "
            f"a setting `max` of at most {lanes:,} samples, since a step takes at most one of each "
            "lane"
        )


def training_samples(job: Job) -> int:
    """Samples of the job's training set, without loading it.

    Raises:
        UnknownSamples: where the job does not say it and the data set is not a built-in one.
    """
    samples = job.data.samples or registry.training_samples(job.data.name, job.data.args)
    if samples is None:
        raise UnknownSamples(
            f"data.samples: a plan does not load {job.data.name}; write data.samples in the job, "
            "or give --samples N"
        )
    return samples


class TrainingSamples(NamedTuple):
    """Samples of a training set, and how they are known."""

    number: int
    was_built: bool = False  # the set was built to count them


def known_or_counted_samples(job: Job, count: Callable[[Job], int]) -> TrainingSamples:
    """Samples of the job's training set, which is built to count them where nothing else says it.

    Args:
        job: the job.
        count: builds the training set and returns its size; what it prints goes to stderr.

    Raises:
        UnknownSamples: where the set cannot be built here either.
    """
    try:
        return TrainingSamples(training_samples(job))
    except UnknownSamples:
        pass
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return TrainingSamples(count(job), was_built=True)
    except (JobError, ImportError) as error:
        raise UnknownSamples(
            f"data.samples: {job.data.name} cannot be built here to count its samples "
            f"({str(error).splitlines()[0]}); write data.samples in the job, or give --samples N "
            "to a plan"
        ) from None


def curve_of(plan: Plan) -> list[tuple[float, int, float]]:
    """Epoch, global batch and lr over its stages, some hundred points each."""
    return curve(plan.clock, plan.base_batch, plan.initial_batch, plan.growth, plan.lr_schedule)


def layout_of(plan: Plan, global_batch: int) -> BatchLayout:
    """How a step of `global_batch` samples is divided among the plan's workers."""
    return BatchLayout(global_batch, plan.micro_batch_of(global_batch), plan.world_size)


def checkpoints_of(cadence: Checkpoint, stages: list[StageOutline], clock: Clock) -> list[int]:
    """Checkpoints written in each stage at the job's cadence in epochs and steps, the one at the
    end of the run among them.
    """
    counts, step = [], 0
    every_steps = cadence.every_steps
    for stage in stages:
        milestones = _MilestoneSteps(cadence.epochs, stage, clock)
        count, end = len(milestones), step + stage.steps
        if every_steps is not None:
            count += end // every_steps - step // every_steps
            count -= milestones.also_every(every_steps, step)
        if (
            stage is stages[-1]
            and not stage.open_end
            and not milestones.end_at(stage.steps - 1)
            and (every_steps is None or end % every_steps)
        ):
            count += 1
        counts.append(count)
        step = end
    return counts


_MOST_LISTED = 100_000


class _MilestoneSteps:
    """The steps of a stage within which a milestone is reached: 1, 2, 3, … times `every_epochs`."""

    def __init__(self, every_epochs: float | None, stage: StageOutline, clock: Clock) -> None:
        self._every, self._stage, self._clock = every_epochs, stage, clock
        self._begin = round(stage.start * clock.dataset_size)
        first, last = (
            0 if every_epochs is None else milestones_reached(epoch, every_epochs, None)
            for epoch in (stage.start, stage.end)
        )
        self._numbers = range(first + 1, last + 1)
        # Milestones closer than steps: each step reaches one. Milestones farther apart than steps:
        # each of them has a step of its own.
        self._all = (
            every_epochs is not None and every_epochs * clock.dataset_size <= stage.global_batch
        )

    def __len__(self) -> int:
        return self._stage.steps if self._all else len(self._numbers)

    def end_at(self, step: int) -> bool:
        """Whether the last milestone of the stage is reached in its step of this number."""
        return self._all or (len(self._numbers) > 0 and self._step_of(self._numbers[-1]) == step)

    def also_every(self, every_steps: int, first_step: int) -> int:
        """How many milestone steps are also multiples of `every_steps`, counted from the start of
        the run; the stage begins at `first_step`.
        """
        if self._all:
            return (first_step + self._stage.steps) // every_steps - first_step // every_steps
        # Beyond that a plan need not know which of two rules wrote a checkpoint
        listed = self._numbers[:_MOST_LISTED]
        return sum((first_step + self._step_of(number) + 1) % every_steps == 0 for number in listed)

    def _step_of(self, number: int) -> int:
        assert self._every is not None
        samples = self._clock.samples_until(number * self._every) - self._begin
        return -(-samples // self._stage.global_batch) - 1


@dataclass(frozen=True)
class Measured:
    """Figures of a run that was measured."""

    samples_per_second: float  # of one busy worker
    world_size: int  # workers
    micro_batch: int | None  # samples; None if it differed from step to step
    peak_memory_bytes: int | None  # of the worker that needed most
    checkpoint_bytes: int | None
    # Of its job, by key, what the figures depend on
    settings: Mapping[str, Any] = field(default_factory=dict)


# Speed, memory and disk depend on these
_MEASURED_KEYS = (
    *("data.name", "data.args", "data.num_workers", "model.name", "model.args"),
    *("model.channels_last", "model.compile", "loss.name", "optimizer.name", "precision"),
    *("reduction", "deterministic", "batch.micro", "gradients.compression"),
)


def measured_settings(written: Mapping[str, Any]) -> dict[str, Any]:
    """Of a job as it is written, the values that its speed, memory and disk depend on, by key; keys
    that an older version did not write are left out.
    """
    settings = {}
    for key in _MEASURED_KEYS:
        value: Any = written
        for part in key.split("."):
            value = value.get(part, ...) if isinstance(value, Mapping) else ...
        if value is not ...:
            settings[key] = value
    return settings


def differences(job: Job, measured: Measured) -> list[tuple[str, Any, Any]]:
    """Where a measured run is not like the job: key, value there, value in the job."""
    own = measured_settings(yaml_source.read(job.to_yaml(), fill_in=False).values)
    return [
        (key, value, own[key])
        for key, value in measured.settings.items()
        if key in own and own[key] != value
    ]


def estimate(job: Job, plan: Plan, measured: Measured | None) -> dict[str, Any]:
    """Everything about a planned run, as JSON values under the words of the run's own files.

    Where the batch depends on what the run measures, steps, checkpoints, stages and seconds are
    those before `measured_from_epoch`, which is left out elsewhere.

    Args:
        job: a job.
        plan: of that job.
        measured: figures of an earlier run, for the time and the memory; None leaves those out.
    """
    stages = plan.stages
    checkpoints = checkpoints_of(job.checkpoint, stages, plan.clock)
    steps = sum(stage.steps for stage in stages)
    rows = [
        _stage_row(plan, stage, saved, measured)
        for stage, saved in zip(stages, checkpoints, strict=True)
    ]
    open_end = {"measured_from_epoch": stages[-1].end} if stages[-1].open_end else {}
    figures = {
        "name": job.name,
        "fingerprint": plan.fingerprint(),
        "world_size": plan.world_size,
        "training_samples": plan.clock.dataset_size,
        "epochs": plan.clock.epochs,
        "samples": plan.clock.total_samples,
        "steps": steps,
        "steps_at_the_base_batch": -(-plan.clock.total_samples // plan.base_batch),
        "growths": len(stages) - 1,
        "warmup_epochs": plan.lr_schedule.warmup.length(plan.initial_batch / plan.base_batch),
        "checkpoints": sum(checkpoints),
        **open_end,
        "stages": rows,
    }
    if measured is not None:
        figures["measured_differs"] = [key for key, _, _ in differences(job, measured)]
        figures |= _costs(plan, sum(row["seconds"] for row in rows), measured)
    return figures


def _stage_row(
    plan: Plan, stage: StageOutline, checkpoints: int, measured: Measured | None
) -> dict[str, Any]:
    """One stage of an estimate."""
    layout = layout_of(plan, stage.global_batch)
    row = {
        "stage": stage.stage,
        "start_epoch": stage.start,
        "end_epoch": stage.end,
        "steps": stage.steps,
        "samples": (stage.steps - 1) * stage.global_batch + stage.last_batch,
        "global_batch": stage.global_batch,
        "micro_batch": layout.micro_batch,
        "accumulation_steps": layout.accumulation_steps,
        "equation": layout.equation(),
        "idle_workers": layout.idle_workers,
        "lr_first": stage.first_lr,
        "lr_highest": stage.highest_lr,
        "lr_last": stage.last_lr,
        "full_lr_epoch": stage.full_lr,
        "checkpoints": checkpoints,
    }
    if measured is not None:
        samples = stage.steps * layout.accumulation_steps * layout.micro_batch
        row["seconds"] = samples / measured.samples_per_second
    return row


def _costs(
    plan: Plan,
    seconds: float,
    measured: Measured,
) -> dict[str, Any]:
    """Time, memory and disk of a run of so many seconds."""
    same = plan.micro_batch is not None and plan.micro_batch == measured.micro_batch
    return {
        "seconds": seconds,
        "peak_memory_bytes": measured.peak_memory_bytes if same else None,
        "checkpoint_bytes": measured.checkpoint_bytes,
    }
