"""Draws runs: loss and metrics, learning rate and batch, layers, gradient noise, distance, phases.

Every figure is readable in greyscale: runs differ in line style and marker too. matplotlib is
imported by the functions that draw, since it is an extra.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hvdlarge.reporting.fits import logarithmic, power
from hvdlarge.reporting.run_reader import RunRecords, column, metrics_of

_STYLES = ["-", "--", ":", "-."]
_MARKERS = ["o", "s", "^", "D", "v", "P"]
_COLOURS = ["#1b3a6b", "#c8651b", "#3a7d44", "#7a3b8f", "#8c8c00", "#555555"]
_SETTLED = 10  # steps before the distance is fitted
_MOST_NAMES = 40  # of layers along an axis


class Drawn(NamedTuple):
    """A figure, or why there is none."""

    title: str
    file: str  # its name, without the suffix
    png: bytes | None
    missing: str = ""


def draw_all(runs: Sequence[RunRecords]) -> list[Drawn]:
    """All figures of some runs.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    drawn = [
        _draw("Loss and metrics", "loss", _loss, runs),
        _draw("Learning rate and batch", "schedule", _schedule, runs),
        _draw("Trust ratios", "trust-ratios", _trust_ratios, runs),
        _draw("Gradient noise scale and batch", "noise", _noise, runs),
        _draw("Distance from the start", "distance", _distance, runs),
        _draw("Time of steps by phase", "phases", _phases, runs),
    ]
    for run in runs:
        file = "layers" if len(runs) == 1 else f"layers-{run.name}"
        title = "Trust ratios by layer" + (f": {run.name}" if len(runs) > 1 else "")
        drawn.insert(3, _draw(title, file, _layers, [run]))
    return drawn


def _draw(
    title: str, file: str, draw: Callable[[Sequence[RunRecords]], Any], runs: Sequence[RunRecords]
) -> Drawn:
    from matplotlib import pyplot

    figure = draw(runs)
    if isinstance(figure, str):
        return Drawn(title, file, None, figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return Drawn(title, file, buffer.getvalue())


def _axes(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(10, height), layout="constrained", squeeze=False, **options
    )
    for one in axes.flat:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(number: int, **more: Any) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _STYLES[number % len(_STYLES)],
        "linewidth": 1.4,
        **more,
    }


def _loss(runs: Sequence[RunRecords]) -> Any:
    if not any(len(run.steps) for run in runs):
        return "no step has been logged yet"
    names = list(dict.fromkeys(itertools.chain.from_iterable(map(metrics_of, runs))))[:3]
    figure, axes = _axes(1 + bool(names), 1, 3.2 * (1 + bool(names)), sharex=True)
    upper = axes[0, 0]
    for number, run in enumerate(runs):
        points = column(run.steps, "epoch", "loss")
        if points:
            label = f"{run.name}: training"
            upper.plot(*zip(*points, strict=True), label=label, **_style(number))
        tests = column(run.evaluations, "epoch", "test_loss")
        if tests:
            marker = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
            style = _style(number, linewidth=0.8, **marker)
            upper.plot(*zip(*tests, strict=True), label=f"{run.name}: test", **style)
    upper.set_ylabel("loss")
    upper.legend(fontsize=8)
    if names:
        lower = axes[1, 0]
        for (number, run), (which, name) in itertools.product(enumerate(runs), enumerate(names)):
            points = column(run.evaluations, "epoch", name)
            if points:
                style = _style(number, marker=_MARKERS[which], markersize=4)
                lower.plot(*zip(*points, strict=True), label=f"{run.name}: {name}", **style)
        lower.set_ylabel("metric of the test set")
        lower.legend(fontsize=8)
    axes[-1, 0].set_xlabel("epoch")
    return figure


def _schedule(runs: Sequence[RunRecords]) -> Any:
    if not any(len(run.steps) for run in runs):
        return "no step has been logged yet"
    from matplotlib.ticker import FuncFormatter

    figure, axes = _axes(2, 2, 6, sharex="col", sharey="row")
    for number, run in enumerate(runs):
        for place, (key, scale) in enumerate((("epoch", 1.0), ("seconds", 1 / 60))):
            points = column(run.steps, key, "lr", "global_batch")
            if not points:
                continue
            where, lrs, batches = zip(*points, strict=True)
            scaled = [value * scale for value in where]
            axes[0, place].plot(scaled, lrs, label=run.name, **_style(number))
            axes[1, place].step(scaled, batches, where="pre", **_style(number))
    axes[0, 0].set_ylabel("learning rate")
    axes[1, 0].set_ylabel("global batch (samples)")
    axes[1, 0].set_yscale("log", base=2)
    axes[1, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[1, 0].set_xlabel("epoch")
    axes[1, 1].set_xlabel("wall time (minutes)")
    axes[0, 0].legend(fontsize=8)
    return figure


def _ratios(run: RunRecords) -> list[tuple[float, dict[str, float]]]:
    """Epoch and trust ratio by layer, of those that have one."""
    found = []
    for line in run.layers:
        ratios = {
            name: values["trust_ratio"]
            for name, values in line["layers"].items()
            if isinstance(values, dict) and isinstance(values.get("trust_ratio"), float)
        }
        ratios = {name: ratio for name, ratio in ratios.items() if ratio > 0}
        if ratios:
            found.append((line["epoch"], ratios))
    return found


_NO_LAYERS = "no trust ratios by layer: set log.layers_every_steps, for LARS or LAMB"


def _trust_ratios(runs: Sequence[RunRecords]) -> Any:
    ranges = [column(run.steps, "epoch", "trust_ratio_min", "trust_ratio_max") for run in runs]
    if not any(ranges):
        return "no trust ratios: the optimizer has none"
    figure, axes = _axes(1, 1, 3.6)
    one = axes[0, 0]
    for number, (run, points) in enumerate(zip(runs, ranges, strict=True)):
        points = [point for point in points if point[1] > 0]
        if not points:
            continue
        epochs, low, high = zip(*points, strict=True)
        colour = _COLOURS[number % len(_COLOURS)]
        one.fill_between(
            epochs, low, high, alpha=0.18, color=colour, label=f"{run.name}: lowest to highest"
        )
        layers = _ratios(run)
        if layers:
            where = [epoch for epoch, _ in layers]
            for share, style in ((0.25, ":"), (0.5, "-"), (0.75, ":")):
                values = [_quantile(sorted(ratios.values()), share) for _, ratios in layers]
                label = f"{run.name}: median and quartiles" if share == 0.5 else None
                one.plot(where, values, style, color=colour, linewidth=1.4, label=label)
    one.set_yscale("log")
    one.set_xlabel("epoch")
    one.set_ylabel("trust ratio")
    one.legend(fontsize=8)
    return figure


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _layers(runs: Sequence[RunRecords]) -> Any:
    import math

    from matplotlib.colors import LogNorm

    layers = _ratios(runs[0])
    if len(layers) < 2:
        return _NO_LAYERS
    names = list(dict.fromkeys(itertools.chain.from_iterable(ratios for _, ratios in layers)))
    rows = [[ratios.get(name, math.nan) for _, ratios in layers] for name in names]
    height = min(14.0, 1.8 + 0.22 * min(len(names), _MOST_NAMES))
    figure, axes = _axes(1, 1, height)
    one = axes[0, 0]
    one.grid(visible=False)
    epochs = [epoch for epoch, _ in layers]
    mesh = one.pcolormesh(
        epochs, range(len(names)), rows, norm=LogNorm(), cmap="cividis", shading="nearest"
    )
    every = -(-len(names) // _MOST_NAMES)
    one.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    one.invert_yaxis()
    one.set_xlabel("epoch")
    one.set_ylabel("parameter")
    figure.colorbar(mesh, ax=one, label="trust ratio")
    return figure


def _noise(runs: Sequence[RunRecords]) -> Any:
    if not any(len(run.noise) for run in runs):
        return "no gradient noise: set log.noise_every_steps"
    figure, axes = _axes(1, 1, 3.6)
    one = axes[0, 0]
    for number, run in enumerate(runs):
        points = [point for point in column(run.noise, "epoch", "noise_scale") if point[1] > 0]
        marker = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 3}
        if points:
            style = _style(number, linewidth=0.8, **marker)
            label = f"{run.name}: noise scale (critical batch)"
            one.plot(*zip(*points, strict=True), label=label, **style)
        used = column(run.noise, "epoch", "global_batch")
        if used:
            style = _style(number, linewidth=2.2)
            one.step(*zip(*used, strict=True), where="pre", label=f"{run.name}: batch", **style)
    one.set_yscale("log", base=2)
    one.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    one.set_xlabel("epoch")
    one.set_ylabel("samples")
    one.legend(fontsize=8)
    return figure


def _distance(runs: Sequence[RunRecords]) -> Any:
    if not any(len(run.distances) for run in runs):
        return "no distances: set log.distances: true"
    figure, axes = _axes(1, 1, 4.2)
    one = axes[0, 0]
    for number, run in enumerate(runs):
        points = [
            (step + 1, distance)
            for step, distance in column(run.distances, "step", "weight_distance")
            if distance > 0
        ]
        if not points:
            continue
        colour = _COLOURS[number % len(_COLOURS)]
        marker = _MARKERS[number % len(_MARKERS)]
        one.plot(*zip(*points, strict=True), marker, markersize=4, color=colour, label=run.name)
        fitted = [point for point in points if point[0] > _SETTLED]
        if len(fitted) < 3:
            continue
        steps, distances = zip(*fitted, strict=True)
        for label, style, values in _fitted(steps, distances):
            one.plot(steps, values, style, color=colour, linewidth=1.2, label=label)
    one.set_xscale("log")
    one.set_xlabel("steps")
    one.set_ylabel("‖w − w₀‖")
    one.legend(fontsize=8)
    return figure


def _fitted(
    steps: Sequence[float], distances: Sequence[float]
) -> list[tuple[str, str, list[float]]]:
    """Label, line style and values of both fits."""
    import math

    by_log, by_power = logarithmic(steps, distances), power(steps, distances)
    logs = [by_log.intercept + by_log.slope * math.log(step) for step in steps]
    powers = [math.exp(by_power.intercept) * step**by_power.slope for step in steps]
    return [
        (f"{by_log.slope:.3g}·log t {by_log.intercept:+.3g}", "-", logs),
        (
            f"{math.exp(by_power.intercept):.3g}·t^p, p = {by_power.slope:.3f} ± "
            f"{by_power.slope_error:.3f}",
            "--",
            powers,
        ),
    ]


def _phases(runs: Sequence[RunRecords]) -> Any:
    if not any(run.phases for run in runs):
        return "no times of phases"
    names = list(dict.fromkeys(itertools.chain.from_iterable(run.phases for run in runs)))
    figure, axes = _axes(1, 1, 1.6 + 0.5 * len(runs))
    one = axes[0, 0]
    greys = [0.25 + 0.65 * number / max(1, len(names) - 1) for number in range(len(names))]
    hatches = ["", "//", "..", "\\\\", "xx", "--", "++", "oo"]
    for row, run in enumerate(runs):
        left = 0.0
        for number, name in enumerate(names):
            width = run.phases.get(name, 0.0)
            one.barh(
                row,
                width,
                left=left,
                color=str(greys[number]),
                edgecolor="black",
                linewidth=0.5,
                hatch=hatches[number % len(hatches)],
                label=name if row == 0 else None,
            )
            left += width
    one.set_yticks(range(len(runs)), [run.name for run in runs])
    one.set_xlabel("seconds of rank 0, all logged steps")
    one.legend(ncols=len(names), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return figure
