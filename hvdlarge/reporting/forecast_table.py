"""A job on several numbers of workers, as JSON values and as lines for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hvdlarge.config.forecast import Forecast, Limits
from hvdlarge.config.planning import layout_of
from hvdlarge.reporting.describe import columns, duration
from hvdlarge.schedule.plan import Plan


def sizes_as_json(plan: Plan, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """How each number of workers divides the steps of each stage."""
    return [
        {
            "world_size": size,
            "stages": [_stage_on(plan, stage.global_batch, size) for stage in plan.stages],
        }
        for size in sizes
    ]


def _stage_on(plan: Plan, global_batch: int, size: int) -> dict[str, Any]:
    layout = layout_of(replace(plan, world_size=size), global_batch)
    return {
        "global_batch": global_batch,
        "accumulation_steps": layout.accumulation_steps,
        "idle_workers": layout.idle_workers,
    }


def forecast_as_json(forecast: Forecast, sizes: Sequence[int]) -> dict[str, Any]:
    """The forecast for each number of workers, and the numbers beyond which more do not pay."""
    plan = forecast.plan
    rows = sizes_as_json(plan, sizes)
    for row in rows:
        size = row["world_size"]
        row["hosts"] = -(-size // forecast.cluster.workers_per_host)
        row["seconds"] = forecast.seconds(size)
        row["speedup"] = forecast.seconds(1) / row["seconds"]
        row["efficiency"] = forecast.efficiency(size)
        for stage in row["stages"]:
            step = forecast.step(stage["global_batch"], size)
            stage["step_seconds"] = step.total
            stage |= {f"{part}_seconds": value for part, value in step._asdict().items()}
    batches = dict.fromkeys([plan.base_batch, *(stage.global_batch for stage in plan.stages)])
    return {
        "workers_per_host": forecast.cluster.workers_per_host,
        "algorithm": forecast.cluster.algorithm,
        "world_sizes": rows,
        "limits": forecast.limits()._asdict(),
        "limits_by_batch": [
            {"global_batch": batch, **forecast.limits_of_batch(batch)._asdict()}
            for batch in batches
        ],
    }


def sizes_in_words(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accumulation steps of each stage by number of workers."""
    batches = [f"{stage['global_batch']:,}" for stage in rows[0]["stages"]]
    title = ("workers", *(f"batch {batch}" for batch in batches))
    return [
        "sizes    micro-batches of the busiest worker in a step, and workers without any",
        *columns([title, *(_size_row(row) for row in rows)]),
    ]


def _size_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    cells = (
        f"{stage['accumulation_steps']:,}"
        + (f", {stage['idle_workers']:,} idle" if stage["idle_workers"] else "")
        for stage in row["stages"]
    )
    return (f"{row['world_size']:,}", *cells)


def forecast_in_words(figures: Mapping[str, Any], plan: Plan) -> list[str]:
    """What `forecast_as_json` gave."""
    rows = figures["world_sizes"]
    first, last = (f"{plan.stages[index].global_batch:,}" for index in (0, -1))
    title = ["workers", "hosts", "run", "× one worker", "efficiency", f"step of {first}", "of sums"]
    if len(plan.stages) > 1:
        title += [f"step of {last}", "of sums"]
    per_host, algorithm = figures["workers_per_host"], figures["algorithm"]
    how = "the faster of ring and tree" if algorithm == "fastest" else algorithm
    return [
        f"forecast {per_host} {_workers(per_host)} on a host, sums by {how}; without evaluations "
        "and checkpoints",
        *columns([tuple(title), *(_forecast_row(row, len(plan.stages) > 1) for row in rows)]),
        *_limits_in_words(figures, plan),
    ]


def _forecast_row(row: Mapping[str, Any], grows: bool) -> tuple[str, ...]:
    stages = [row["stages"][0], row["stages"][-1]] if grows else [row["stages"][0]]
    steps: list[str] = []
    for stage in stages:
        shown = stage["allreduce_seconds"] - stage["hidden_seconds"]
        steps += [_milliseconds(stage["step_seconds"]), f"{shown / stage['step_seconds']:.0%}"]
    return (
        f"{row['world_size']:,}",
        f"{row['hosts']:,}",
        duration(row["seconds"]),
        f"{row['speedup']:,.3g}",
        f"{row['efficiency']:.0%}",
        *steps,
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms"


def _workers(count: int) -> str:
    return "worker" if count == 1 else "workers"


def _limits_in_words(figures: Mapping[str, Any], plan: Plan) -> list[str]:
    whole = Limits(**figures["limits"])
    lines = [
        f"pays     the run is fastest with {whole.fastest:,} {_workers(whole.fastest)}; up to "
        f"{whole.half_efficient:,} each does at least half of the work that it would do alone"
    ]
    by_batch = {
        each["global_batch"]: (each["fastest"], each["half_efficient"])
        for each in figures["limits_by_batch"]
    }
    if len(by_batch) == 1:
        return lines
    base = plan.base_batch
    title = ("global batch", "fastest with", "at least half efficient up to")
    cells = [
        (f"{batch:,}" + (" (base)" if batch == base else ""), f"{fast:,}", f"{half:,}")
        for batch, (fast, half) in sorted(by_batch.items())
    ]
    return [*lines, *columns([title, *cells])]
