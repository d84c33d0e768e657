"""The tables of a report, as rows of text: runs side by side, stages, targets, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvdlarge.reporting.describe import duration
from hvdlarge.reporting.run_reader import RunRecords, settings_of

Table = list[tuple[str, ...]]  # the first row is the heading
_UNKNOWN = "—"
_MOST_LAYERS = 10
_LONGEST_SETTING = 60  # characters


def overview(figures: Sequence[Mapping[str, Any]]) -> Table:
    """The runs side by side: a column each.

    Args:
        figures: of each run, as `derive` gives them.
    """
    rows: Table = [("run", *(each["name"] for each in figures))]
    rows.append(("state", *(each["state"] for each in figures)))
    rows.append(("epochs", *map(_epochs, figures)))
    rows.append(("weight updates", *(f"{each['updates']:,.0f}" for each in figures)))
    rows.append(("samples", *(f"{each['samples_seen']:,.0f}" for each in figures)))
    rows.append(("training time", *(seconds(each["seconds"]) for each in figures)))
    if any(each["evaluate_seconds"] for each in figures):
        rows.append(("of it evaluations", *(seconds(each["evaluate_seconds"]) for each in figures)))
    rows.append(("samples per second", *(_number(each["samples_per_second"]) for each in figures)))
    rows.append(("workers", *(_workers(each["world_sizes"]) for each in figures)))
    rows.append(("device", *(str(each["device"] or _UNKNOWN) for each in figures)))
    rows.append(("starts", *(f"{each['starts']:,}" for each in figures)))
    rows.append(("training loss, last", *(_number(each["last_loss"]) for each in figures)))
    for name in dict.fromkeys(name for each in figures for name in each["results"]):
        results = [each["results"].get(name) for each in figures]
        rows.append((f"{name}, last", *(_number(each and each["last"]) for each in results)))
        rows.append((f"{name}, best", *map(_best, results)))
    rows += _target_rows(figures)
    if any(each["noise_scale"] is not None for each in figures):
        noise = (_number(each["noise_scale"]) for each in figures)
        rows.append(("gradient noise scale, last", *noise))
    for key, title in (("trust_ratio", "trust ratio"), ("update_ratio", "update / weight norm")):
        if any(each[key] for each in figures):
            shown = (_spread(each[key]) for each in figures)
            rows.append((f"{title} of layers, last", *shown))
    if any(each["weight_distance"] is not None for each in figures):
        distances = (_number(each["weight_distance"]) for each in figures)
        rows.append(("distance of the weights, last", *distances))
    return rows


def _target_rows(figures: Sequence[Mapping[str, Any]]) -> Table:
    rows: Table = []
    for number in range(len(figures[0]["targets"])):
        targets = [each["targets"][number] for each in figures]
        shown = []
        for target in targets:
            if target["seconds"] is not None:
                epoch, updates = target["epoch"], target["updates"]
                after = f"epoch {epoch:.4g}, {updates:,.0f} updates"
                shown.append(f"{seconds(target['seconds'])} ({after})")
            else:
                shown.append("not reached" if target["evaluated"] else "not evaluated")
        rows.append((f"time to {targets[0]['target']}", *shown))
    return rows


def stages(figures: Mapping[str, Any]) -> Table:
    """The stages of a run: neighbouring steps with one batch. Empty if they are unknown."""
    if not figures["stages"]:
        return []
    names = list(dict.fromkeys(name for each in figures["stages"] for name in each["results"]))
    rows: Table = [
        ("stage", "epochs", "steps", "global batch", "micro-batch")
        + ("lr: first", "highest", "last", "time", *names)
    ]
    for each in figures["stages"]:
        rows.append(
            (
                f"{each['stage']}",
                f"{each['first_epoch']:.4g} to {each['last_epoch']:.4g}",
                f"{each['steps']:,}",
                f"{each['global_batch']:,.0f}",
                _number(each["micro_batch"]),
                *(_number(each[key]) for key in ("lr_first", "lr_highest", "lr_last")),
                _UNKNOWN if each["seconds"] is None else seconds(each["seconds"]),
                *(_number(each["results"].get(name)) for name in names),
            )
        )
    return rows


def phases(figures: Sequence[Mapping[str, Any]]) -> Table:
    """Each phase's share of the time of the steps; empty if the runs have not logged them."""
    names = dict.fromkeys(name for each in figures for name in each["phase_shares"])
    if not names:
        return []
    rows: Table = [("phase", *(each["name"] for each in figures))]
    for name in names:
        shares = (each["phase_shares"].get(name) for each in figures)
        rows.append((name, *(_UNKNOWN if share is None else f"{share:.1%}" for share in shares)))
    return rows


def fits(figures: Sequence[Mapping[str, Any]]) -> Table:
    """The fits of the weight distance, a row each; empty if there are none."""
    rows: Table = []
    for each in figures:
        fits = each["distance_fits"]
        for fit in [] if fits is None else [fits["log"], fits["power"]]:
            if fit is None:
                continue
            values = (
                f"{letter} = {estimate['value']:.4g} ± {estimate['error']:.2g}"
                for letter, estimate in fit["parameters"].items()
            )
            over = f"{fits['first_update']:,.0f} to {fits['last_update']:,.0f}"
            over += " (constant lr)" if fits["constant_lr"] else " (lr not constant)"
            residual = f"{fit['rms']:.3g}"
            rows.append(
                (each["name"], fit["form"], *values, residual, f"{fit['r_squared']:.4f}", over)
            )
    heading = ("run", "distance", "first parameter", "second parameter")
    return [(*heading, "residual (rms)", "R²", "updates"), *rows] if rows else []


def largest_distances(figures: Mapping[str, Any]) -> Table:
    """The parameters that are furthest from their start; empty if unknown."""
    distances = sorted(figures["weight_distances"].items(), key=lambda item: -item[1])
    if not distances:
        return []
    rows = [(str(name), _number(value)) for name, value in distances[:_MOST_LAYERS]]
    return [("parameter", "distance from its start"), *rows]


def differing_settings(runs: Sequence[RunRecords]) -> Table:
    """Keys of the jobs in which the runs differ; empty for one run, and if there are none."""
    settings = [settings_of(run.job) for run in runs]
    rows: Table = []
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [str(each.get(key, _UNKNOWN)) for each in settings]
        if len(set(values)) > 1:
            rows.append((key, *(value[:_LONGEST_SETTING] for value in values)))
    return [("key of the job", *(run.label for run in runs)), *rows] if rows else []


def seconds(value: float) -> str:
    """A duration: with a fraction below a minute, else as 2:03 or 1:02:03.

    >>> seconds(7.25), seconds(123)
    ('7.2 s', '2:03')
    """
    return f"{value:.1f} s" if value < 60 else duration(value)


def _epochs(figures: Mapping[str, Any]) -> str:
    planned = figures["epochs_planned"]
    return f"{figures['epochs']:.4g}" + ("" if planned is None else f" of {planned:g}")


def _workers(sizes: Sequence[int | None]) -> str:
    known = [f"{size:,}" for size in sizes if size is not None]
    return ", then ".join(known) or _UNKNOWN


def _number(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    if abs(value) >= 1e15:
        return f"{value:.4g}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e5 else f"{value:.4g}"


def _best(result: Mapping[str, float] | None) -> str:
    if result is None:
        return _UNKNOWN
    return f"{_number(result['best'])} (epoch {result['best_epoch']:.4g})"


def _spread(quantiles: Mapping[str, float] | None) -> str:
    if not quantiles:
        return _UNKNOWN
    median = f", median {_number(quantiles['0.5'])}" if "0.5" in quantiles else ""
    return f"{_number(quantiles['0'])} to {_number(quantiles['1'])}{median}"
