"""What a report derives from the records of a run, as JSON values: results, times, stages, fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hvdlarge.reporting.fits import MIN_POINTS, Fit, fit_log, fit_power
from hvdlarge.reporting.jsonl import finite
from hvdlarge.reporting.metrics_log import QUANTILES, Stage
from hvdlarge.reporting.run_reader import RunRecords
from hvdlarge.reporting.thinning import Array, Series

_FIRST_UPDATES = 10  # left out of the fits where no stretch of constant lr is long enough
_MIN_STRETCH_POINTS, _MIN_STRETCH_RATIO = 8, 2.0


class DistanceFits(NamedTuple):
    """The fits of a weight distance.

    Attributes:
        first: update of the first point that they use.
        last: that of the last.
        constant_lr: whether the lr is constant between them.
        log: of a · ln t + b; None if the points do not determine it.
        power: of a · t^p.
    """

    first: float
    last: float
    constant_lr: bool
    log: Fit | None
    power: Fit | None


def fits_of(run: RunRecords) -> DistanceFits | None:
    """The fits over the longest stretch of constant lr, or over all points after the first 10
    updates; None if there are too few.

    A stretch counts if it has 8 points and its last update is at least twice its first.
    """
    if run.metrics.distance.last is None:
        return None
    rows = run.metrics.distance.rows()
    updates, distances = rows[:, 0], rows[:, 3]
    stretch = run.metrics.constant_lr
    if stretch is not None and stretch.last >= _MIN_STRETCH_RATIO * stretch.first:
        inside = (updates >= stretch.first) & (updates <= stretch.last)
        if inside.sum() >= _MIN_STRETCH_POINTS:
            return _fits(updates[inside], distances[inside], constant_lr=True)
    later = updates > _FIRST_UPDATES
    return _fits(updates[later], distances[later], constant_lr=False)


def _fits(updates: Array, distances: Array, constant_lr: bool) -> DistanceFits | None:
    if len(updates) < MIN_POINTS:
        return None
    log, power = fit_log(updates, distances), fit_power(updates, distances)
    return DistanceFits(float(updates[0]), float(updates[-1]), constant_lr, log, power)


def seconds_at(run: RunRecords, updates: Any) -> Any:
    """Seconds of training after so many updates, a number or an array, between the lines of the
    log; NaN without any.
    """
    rows = run.metrics.steps["lr"].rows()
    if not len(rows):
        return np.full_like(np.asarray(updates, dtype=np.float64), np.nan)
    known = np.concatenate([[[0.0, 0.0]], rows[:, [0, 2]]])
    return np.interp(updates, known[:, 0], known[:, 1])


def schedule_of(run: RunRecords, name: str) -> Array:
    """Rows of updates, epoch, seconds and `lr` or `global_batch`, at the beginning of each step:
    from the decisions, or from the lines of the log where there are none.
    """
    series = run.decisions.lr if name == "lr" else run.decisions.batch
    if series.count == 0:
        return run.metrics.steps[name].rows()
    rows = series.rows()
    # Decisions are written ahead of the lines of metrics.jsonl
    rows = rows[rows[:, 0] <= run.metrics.position[0]] if run.metrics.records else rows
    return np.column_stack([rows[:, :2], seconds_at(run, rows[:, 0]), rows[:, 2]])


def derive(run: RunRecords) -> dict[str, Any]:
    """The figures of a run; None stands for what its log does not have, `nan` and `inf` do not
    occur.
    """
    log, summary = run.metrics, run.summary
    updates, epoch, seconds = log.position
    phases = _without(log.phases.totals, ("updates", "samples"))
    busy = sum(phases.values())
    samples = log.phases.totals.get("samples", 0.0)
    return {
        "name": run.label,
        "folder": str(run.folder),
        "state": run.state,
        "job": run.job.get("name"),
        "epochs": epoch,
        "epochs_planned": finite(run.job.get("epochs")),
        "updates": updates,
        "samples_seen": log.samples_seen,
        "seconds": seconds,
        "seconds_are_of_phases": log.without_time > 0,
        "evaluate_seconds": log.evaluate_seconds,
        "samples_per_second": finite(summary.get("samples_per_second"))
        or (samples / busy if busy else None),
        "world_sizes": list(dict.fromkeys(start.world_size for start in run.starts)),
        "device": run.environment.get("device"),
        "starts": len(run.starts),
        "resumed_at_epochs": [position[1] for position in log.resumed],
        "last_loss": _last(log.steps["loss"]),
        "results": {name: _result(run, name) for name in log.results},
        "targets": [_target(run, target) for target in run.targets],
        "phase_shares": {name: value / busy for name, value in phases.items()} if busy else {},
        "stages": _stages(run),
        "noise_scale": _last(log.noise),
        "trust_ratio": _quantiles(run, "trust_ratio"),
        "update_ratio": _quantiles(run, "update_ratio"),
        "weight_distance": None if log.distance.last is None else log.distance.last[3],
        "weight_distances": log.distances,
        "distance_fits": _fits_as_json(fits_of(run)),
        "missing": missing(run),
        "notes": run.notes(),
    }


def missing(run: RunRecords) -> list[str]:
    """What the log does not have, and the key of the job that writes it, in sentences."""
    log, sentences = run.metrics, []
    if not log.results:
        sentences.append(
            "There are no results of evaluations: the job has no test set, or the first evaluation "
            "is yet to come (evaluate.every_epochs)."
        )
    if "trust_ratio" not in log.layers and log.layers:
        sentences.append(
            "No layer has a trust ratio: the optimizer does not adapt the lr by layer; the ratio "
            "of update and weight norms is shown."
        )
    if not log.layers:
        sentences.append("There is no heat map of the layers: " + _why(run, "layers_every_steps"))
    if log.noise.count == 0 and log.noise_missing == 0:
        sentences.append("There is no gradient noise scale: " + _why(run, "noise_every_steps"))
    elif log.noise_missing:
        sentences.append(
            f"The gradient noise scale is not available in {log.noise_missing:,} of "
            f"{log.noise_missing + log.noise.count:,} lines: chance has made one side of the ratio "
            "negative, or the step has only one micro-batch."
        )
    if log.distance.last is None:
        sentences.append(
            "There is no distance of the weights from their start: " + _why(run, "distances")
        )
    sentences += _omitted(run)
    if run.decisions.lr.count == 0:
        sentences.append("There is no table of stages: decisions.jsonl is missing or empty.")
    if log.without_time:
        sentences.append(
            "Lines of metrics.jsonl have no time (an older version wrote them): the seconds are "
            "those of the phases of steps on rank 0, without evaluations."
        )
    return sentences


def _why(run: RunRecords, key: str) -> str:
    settings = run.job.get("log")
    if isinstance(settings, Mapping) and settings.get(key):
        return "the log has no such line yet."
    return f"set log.{key} in the job to log it."


def _omitted(run: RunRecords) -> list[str]:
    """What the log has beyond the most that a report holds."""
    results, stages = len(run.metrics.omitted_results), run.decisions.omitted
    layers = max((each.omitted for each in run.metrics.layers.values()), default=0)
    counts = ((results, "results of evaluations"), (layers, "parameters"), (stages, "steps"))
    return [f"{count:,} further {what} are not shown." for count, what in counts if count]


def _without(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in names}


def _last(series: Series) -> float | None:
    return None if series.last is None else series.last[-1]


def _result(run: RunRecords, name: str) -> dict[str, Any]:
    """The last and the best value of a result, and where the best was first reached."""
    rows = run.metrics.results[name].rows()
    best = int(rows[:, 3].argmin() if run.lower_is_better(name) else rows[:, 3].argmax())
    return {
        "last": float(rows[-1, 3]),
        "best": float(rows[best, 3]),
        "best_epoch": float(rows[best, 1]),
        "best_seconds": float(rows[best, 2]),
    }


def _target(run: RunRecords, target: Any) -> dict[str, Any]:
    row = run.metrics.reached.get(target)
    at = dict(zip(("updates", "epoch", "seconds"), row or (None, None, None), strict=True))
    return {"target": target.text(run.job), "evaluated": target.name in run.metrics.results, **at}


def _quantiles(run: RunRecords, kind: str) -> dict[str, float] | None:
    """The quantiles over the layers in the last line; without such lines, the extremes of the last
    step line.
    """
    series = run.metrics.quantiles.get(kind)
    if series is not None and series.last is not None:
        return dict(zip((f"{share:g}" for share in QUANTILES), series.last[3:], strict=True))
    if kind == "trust_ratio" and run.metrics.trust.last is not None:
        return dict(zip(("0", "1"), run.metrics.trust.last[3:], strict=True))
    return None


def _stages(run: RunRecords) -> list[dict[str, Any]]:
    done = run.metrics.position[0]
    rows = []
    for stage in run.decisions.stages:
        begin, end = seconds_at(run, [stage.first_step, stage.first_step + stage.steps])
        whole = stage.first_step + stage.steps <= done
        rows.append(
            {
                "stage": stage.stage,
                "global_batch": stage.batch,
                "micro_batch": stage.micro_batch,
                "first_epoch": stage.first_epoch,
                "last_epoch": stage.last_epoch,
                "steps": stage.steps,
                "samples": stage.samples,
                "lr_first": stage.lrs[0],
                "lr_highest": stage.lrs[1],
                "lr_last": stage.lrs[2],
                "seconds": float(end - begin) if whole and math.isfinite(end - begin) else None,
                "results": _results_in(run, stage),
            }
        )
    return rows


def _results_in(run: RunRecords, stage: Stage) -> dict[str, float]:
    """The results of the last evaluation within a stage."""
    last = {}
    for name, series in run.metrics.results.items():
        rows = series.rows()
        # An evaluation after the first update of the stage up to that after its last
        inside = (rows[:, 0] > stage.first_step) & (rows[:, 0] <= stage.first_step + stage.steps)
        if inside.any():
            last[name] = float(rows[inside][-1, 3])
    return last


def _fits_as_json(fits: DistanceFits | None) -> dict[str, Any] | None:
    if fits is None:
        return None
    return {
        "first_update": fits.first,
        "last_update": fits.last,
        "constant_lr": fits.constant_lr,
        "log": _fit_as_json(fits.log),
        "power": _fit_as_json(fits.power),
    }


def _fit_as_json(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    parameters = {name: estimate._asdict() for name, estimate in fit.parameters.items()}
    return {
        "form": fit.form,
        "parameters": parameters,
        "rms": fit.rms,
        "r_squared": fit.r_squared,
    }
