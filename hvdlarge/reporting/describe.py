"""What a run reports before its first step: the batch as arithmetic, the schedule as a small table,
where the files go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvdlarge.comm.launcher import THREADS, cores_per_worker, threads_per_worker
from hvdlarge.config.job import Job
from hvdlarge.config.planning import layout_of
from hvdlarge.schedule.batch import BatchLayout
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.plan import Plan

_LONGEST_FIGURE = 40  # characters


def startup_summary(
    job: Job,
    plan: Plan,
    model: Any,
    optimizer: Any,
    sizes: Mapping[str, int | None],
    environment: Mapping[str, Any],
    messages: Sequence[str],
) -> list[str]:
    """What a run reports before its first step, as lines.

    Args:
        job: of the run.
        plan: of the run.
        model: of torch.
        optimizer: of torch.
        sizes: of the data sets, in samples.
        environment: as environment.json has it.
        messages: what else the user should know.
    """
    return [
        world_line(environment),
        f"data     {job.data.name}: {sizes['training samples']:,} samples for training, "
        f"{sizes['test samples'] or 0:,} for testing",
        f"model    {job.model.name}: {model_line(model)}",
        f"update   {update_line(optimizer)}",
        *average_lines(job),
        f"batch    {batch_line(plan)}",
        f"schedule {plan.fingerprint()}",
        *stage_table(plan),
        *rule_notes(job, plan),
        *notes(plan, model),
        f"folder   {job.run_folder}",
        *(f"note     {message}" for message in messages),
    ]


def world_line(environment: Mapping[str, Any]) -> str:
    """Who runs, on what, and what was set in its environment."""
    workers, hosts = (
        environment["world_size"],
        len({worker["host"] for worker in environment["workers"]}),
    )
    versions = ", ".join(
        f"{name} {version}" for name, version in environment["versions"].items() if version
    )
    world = f"{workers} {'worker' if workers == 1 else 'workers'}"
    world += f" on {hosts} hosts" if hosts > 1 else ""
    world += f" by {environment['launcher']}" if environment["launcher"] else " without a launcher"
    settings = ", ".join(f"{name}={value}" for name, value in environment["settings"].items())
    places = [(worker["host"], worker["cores"]) for worker in environment["workers"]]
    cores = cores_per_worker(places, 0)
    threads = threads_per_worker(environment["workers"], 0)
    share = f"{cores} {'core' if cores == 1 else 'cores'} each"
    if threads < cores:
        share += f", {threads} {'thread' if threads == 1 else 'threads'} ({THREADS})"
    line = f"hvdlarge: {world}, {share}, on {environment['device']}; {versions}"
    return line + (f"\nset      {settings} (variables that you set are kept)" if settings else "")


def model_line(model: Any) -> str:
    """The size of a torch model."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    return f"{sum(sizes):,} weights in {len(sizes)} tensors"


def update_line(optimizer: Any) -> str:
    """A torch optimizer, its settings and what they are for."""
    groups = sorted(optimizer.param_groups, key=lambda group: not group["adapt"])
    settings = ", ".join(
        f"{name} {_figure(groups[0][name])}"
        for name in ("momentum", "betas", "alpha", "weight_decay", "trust_coefficient")
        if name in groups[0]
    )
    adapted = sum(
        weight.numel() for group in groups if group["adapt"] for weight in group["params"]
    )
    others = sum(
        weight.numel() for group in groups if not group["adapt"] for weight in group["params"]
    )
    verbs = ["adapted"] if hasattr(optimizer, "trust_ratio_of") else []
    verbs += ["decayed"] if groups[0]["weight_decay"] else []
    if not verbs:
        return f"{type(optimizer).__name__}, {settings}"
    return (
        f"{type(optimizer).__name__}, {settings}; {adapted:,} weights {' and '.join(verbs)}, "
        f"{others:,} not"
    )


def average_lines(job: Job) -> list[str]:
    """The average of the weights, a line; none without one."""
    if job.ema is None:
        return []
    half_life, batch = job.ema.half_life_samples, job.batch.first
    return [
        f"average  half-life {half_life:,.0f} samples: a decay of {0.5 ** (batch / half_life):.6g} "
        f"in a step of {batch:,}"
    ]


def batch_line(plan: Plan) -> str:
    """The batch arithmetic of the first step, with its words."""
    layout = layout_of(plan, min(plan.initial_batch, plan.clock.total_samples))
    line = f"{layout.equation()}   (global batch = micro-batch × accumulation steps × workers)"
    return line + _idle(layout)


def stage_table(plan: Plan, estimated: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
    """One line for each stage, under a heading; with `estimated`, the stages of
    `planning.estimate`, what else is known of them.
    """
    rows: list[tuple[str, ...]] = [
        ("stage", "epochs", "steps", "global batch", "lr: first step", "highest", "last")
    ]
    if estimated is not None:
        rows[0] += ("full lr", "samples", "saved")
        rows[0] += ("time",) if "seconds" in estimated[0] else ()
    stages = plan.stages
    for stage in stages:
        more: tuple[str, ...] = ()
        if estimated is not None:
            row = estimated[stage.stage]
            more = (
                f"epoch {row['full_lr_epoch']:.4g}",
                f"{row['samples']:,}",
                f"{row['checkpoints']:,}",
            )
            more += (duration(row["seconds"]),) if "seconds" in row else ()
        layout = layout_of(plan, stage.global_batch)
        idle = f", {layout.idle_workers} idle" if layout.idle_workers else ""
        rows.append(
            (
                str(stage.stage),
                f"{stage.start:.4g} to {stage.end:.4g}",
                f"{stage.steps:,}",
                layout.equation() + idle,
                f"{stage.first_lr:.4g}",
                f"{stage.highest_lr:.4g}",
                f"{stage.last_lr:.4g}",
                *more,
            )
        )
    lines = columns(rows)
    if stages[-1].open_end:
        lines.append(
            f"  from epoch {stages[-1].end:.4g} on the batch depends on what is measured "
            f"({getattr(plan.growth, 'policy', type(plan.growth).__name__)})"
        )
    return lines


def notes(plan: Plan, model: Any) -> list[str]:
    """What the user may not expect of this plan with this torch model, a line each."""
    lines = []
    normalises = any("BatchNorm" in type(module).__name__ for module in model.modules())
    if plan.largest_micro_batch is not None:
        fit = (
            f"{plan.largest_micro_batch:,} samples" if plan.largest_micro_batch > 1 else "1 sample"
        )
        lines.append(
            f"note     batch.micro is auto: no micro-batch is larger than {fit}, which fit on "
            "every GPU"
        )
    if plan.micro_batch is None and normalises:
        lines.append(
            "note     batch.micro is auto: batch statistics and dropout depend on the number of "
            "workers"
        )
    elif plan.micro_batch is None:
        lines.append(
            "note     batch.micro is auto: dropout, if there is any, depends on the number of "
            "workers"
        )
    stages = plan.stages
    batches = {stage.last_batch for stage in stages}
    batches |= {stage.global_batch for stage in stages if stage.steps > 1}
    single = sorted(batch for batch in batches if (batch - 1) % plan.micro_batch_of(batch) == 0)
    if normalises and single:
        layout = layout_of(plan, single[0])
        lines.append(
            f"note     {layout.equation()}: a micro-batch of one sample; batch normalisation "
            "without further dimensions (BatchNorm1d) refuses it"
        )
    return lines


def rule_notes(job: Job, plan: Plan) -> list[str]:
    """What the user may not expect of this schedule, a line each."""
    epochs = plan.clock.epochs
    lines = [
        f"note     {'.'.join(path)}.{note}"
        for path, policy in job.policies()
        for note in policy.notes(epochs)
    ]
    if job.batch.first > plan.clock.dataset_size:
        epoch = f"the {plan.clock.dataset_size:,} samples of an epoch"
        lines.append(f"note     the first global batch of {job.batch.first:,} is more than {epoch}")
    scheduled = job.checkpoint.epochs or job.checkpoint.every_steps
    if job.on_nonfinite.can_roll_back and not scheduled:
        lines.append(
            f"note     on_nonfinite: {job.on_nonfinite.policy} returns only to checkpoints at "
            "fixed steps or epochs: with checkpoint.every_minutes alone, to the start or to the "
            "best evaluation"
        )
    lines += _loss_notes(job, plan)
    lines += _average_notes(job, plan)
    lines += _lane_notes(job, plan)
    lines += _noise_notes(job, plan)
    last = plan.stages[-1]
    if last.full_lr > epochs and not last.open_end:
        lines.append(
            "note     the run ends before the lr reaches its full value, which would be at epoch "
            f"{last.full_lr:.4g}"
        )
    return lines


def _loss_notes(job: Job, plan: Plan) -> list[str]:
    largest = layout_of(
        plan, max(min(stage.global_batch, plan.clock.total_samples) for stage in plan.stages)
    )
    of_torch = job.loss.name.startswith("torch.nn:")
    if not (of_torch and "ignore_index" in job.loss.args and largest.num_micro_batches > 1):
        return []
    return [
        f"note     loss.args.ignore_index: {largest.equation()}; each micro-batch is averaged over "
        "its own targets that are not ignored, and all micro-batches have equal weight; the "
        "built-in cross_entropy takes the mean over the whole step"
    ]


def _average_notes(job: Job, plan: Plan) -> list[str]:
    if job.ema is None:
        return []
    half_life, samples = job.ema.half_life_samples, plan.clock.total_samples
    share = 0.5 ** (samples / half_life)
    if share < 0.01:
        return []
    return [
        f"note     ema.half_life_samples is {half_life:,.0f}, the run has {samples:,} samples: "
        f"{share:.0%} of the average at its end are the first weights"
    ]


def _lane_notes(job: Job, plan: Plan) -> list[str]:
    lanes = job.data.lanes
    if lanes is None:
        return []
    length, longer = divmod(plan.clock.dataset_size, lanes)
    samples = f"{length:,} or {length + 1:,} samples" if longer else f"{length:,} samples"
    rounds = lanes / plan.initial_batch
    turn = f"; at first each advances once in {rounds:.4g} steps" if rounds > 1 else ""
    return [f"note     data.lanes: {lanes:,} lanes of {samples}, in the order of the text{turn}"]


def _noise_notes(job: Job, plan: Plan) -> list[str]:
    if job.log.noise_every_steps is None:
        return []
    counts = [layout_of(plan, stage.global_batch).num_micro_batches for stage in plan.stages]
    if min(counts) > 1:
        return []
    who = "no step has" if max(counts) == 1 else "not every step has"
    return [
        "note     log.noise_every_steps: the gradient noise is the difference between the "
        f"micro-batches of a step, and {who} two; a smaller batch.micro gives more"
    ]


def growth_line(plan: Plan, batch_before: int, lr_before: float | None, after: Decision) -> str:
    """One line in words about a growth of the batch."""
    layout = layout_of(plan, after.stage_batch)
    lr = f"lr {after.lr:.4g}" if lr_before is None else f"lr {lr_before:.4g} becomes {after.lr:.4g}"
    return (
        f"epoch {after.epoch:.2f}: the global batch grows from {batch_before} to "
        f"{layout.equation()}{_idle(layout)}; {lr}"
    )


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _figure(value: Any) -> str:
    """A setting of an optimizer, which may be of any type."""
    if callable(getattr(value, "tolist", None)):  # a tensor
        value = value.tolist()
    if isinstance(value, (tuple, list)):
        shown = " and ".join(map(_figure, value))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        shown = f"{value:g}"
    else:
        shown = str(value)
    return shown if len(shown) <= _LONGEST_FIGURE else f"{shown[: _LONGEST_FIGURE - 1]}…"


def _idle(layout: BatchLayout) -> str:
    idle = layout.idle_workers
    return (
        f"; {idle} of {layout.world_size} workers idle, a smaller batch.micro would use them"
        if idle
        else ""
    )


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
