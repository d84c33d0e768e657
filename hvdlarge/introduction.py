"""What a run says before its first step: the batch as arithmetic, the schedule as a small table, where the files go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvdlarge.controller import Plan
from hvdlarge.data.layout import BatchLayout
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.outline import StageOutline, outline


def stages_of(plan: Plan) -> list[StageOutline]:
    """The stages that the plan's controller will go through."""
    return outline(plan.clock, plan.base_batch, plan.initial_batch, plan.growth, plan.rate)


def world_line(environment: Mapping[str, Any], cores: int) -> str:
    """Who runs, on what, and what was set in its environment."""
    workers, hosts = environment["world_size"], len({worker["host"] for worker in environment["workers"]})
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    world = f"{workers} {'worker' if workers == 1 else 'workers'}"
    world += f" on {hosts} hosts" if hosts > 1 else ""
    world += f" by {environment['launcher']}" if environment["launcher"] else " without a launcher"
    settings = ", ".join(f"{name}={value}" for name, value in environment["settings"].items())
    line = f"hvdlarge: {world}, {cores} {'core' if cores == 1 else 'cores'} each, on {environment['device']}; {versions}"
    return line + (f"\nset      {settings} (your own values would have been kept)" if settings else "")


def model_line(model: Any) -> str:
    """The size of a torch model."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    return f"{sum(sizes):,} weights in {len(sizes)} tensors"


def update_line(optimizer: Any) -> str:
    """A torch optimizer, its settings and what they are for."""
    groups = optimizer.param_groups
    settings = ", ".join(
        f"{name} {groups[0][name]:g}" for name in ("momentum", "weight_decay", "trust_coefficient") if name in groups[0]
    )
    adapted = sum(weight.numel() for group in groups if group["adapt"] for weight in group["params"])
    others = sum(weight.numel() for group in groups if not group["adapt"] for weight in group["params"])
    verb = "adapted and decayed" if "trust_coefficient" in groups[0] else "decayed"
    return f"{type(optimizer).__name__}, {settings}; {adapted:,} weights {verb}, {others:,} (biases, normalisation) not"


def batch_line(plan: Plan) -> str:
    """The batch arithmetic of the first step, with its words."""
    layout = _layout(plan, min(plan.initial_batch, plan.clock.total_samples))
    line = f"{layout.equation()}   (global batch = micro-batch × accumulation steps × workers)"
    return line + _idle(layout)


def stage_table(plan: Plan) -> list[str]:
    """One line for each stage, under a heading."""
    rows = [("stage", "epochs", "steps", "global batch", "lr: first step", "highest", "last")]
    for stage in stages_of(plan):
        layout = _layout(plan, stage.global_batch)
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
            )
        )
    return _columns(rows)


def notes(plan: Plan, micro_is_auto: bool, model: Any) -> list[str]:
    """What the user may not expect of this plan with this torch model, a line each."""
    lines = []
    normalises = any("BatchNorm" in type(module).__name__ for module in model.modules())
    if micro_is_auto and normalises:
        lines.append("note     batch.micro is auto: batch statistics and dropout follow the number of workers")
    elif micro_is_auto:
        lines.append("note     batch.micro is auto: dropout, where there is any, follows the number of workers")
    stages = stages_of(plan)
    batches = {stage.global_batch for stage in stages if stage.steps > 1} | {stages[-1].last_batch}
    single = sorted(batch for batch in batches if batch % plan.micro_batch_of(batch) == 1)
    if normalises and single:
        layout = _layout(plan, single[0])
        lines.append(
            f"note     {layout.equation()}: a micro-batch of one sample; batch normalisation without further dimensions "
            "(BatchNorm1d) refuses it"
        )
    return lines


def growth_line(plan: Plan, batch_before: int, lr_before: float | None, after: Decision) -> str:
    """One line in words about a growth of the batch."""
    layout = BatchLayout(after.stage_batch, after.micro_batch, plan.world_size)
    lr = f"lr {after.lr:.4g}" if lr_before is None else f"lr {lr_before:.4g} becomes {after.lr:.4g}"
    return f"epoch {after.epoch:.2f}: the global batch grows from {batch_before} to {layout.equation()}{_idle(layout)}; {lr}"


def _layout(plan: Plan, global_batch: int) -> BatchLayout:
    return BatchLayout(global_batch, plan.micro_batch_of(global_batch), plan.world_size)


def _idle(layout: BatchLayout) -> str:
    idle = layout.idle_workers
    return f"; {idle} of {layout.world_size} workers idle, a smaller batch.micro would use them" if idle else ""


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
