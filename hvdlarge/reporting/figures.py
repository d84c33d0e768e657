"""Draws the figures of a report with matplotlib, without a display.

All figures can be read in greyscale: lines differ by style and marker as well as colour, areas by
hatches, and the brightness of the heat map's colours grows with the value.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hvdlarge.reporting.derived import fits_of, schedule_of
from hvdlarge.reporting.run_reader import RunRecords, printable
from hvdlarge.reporting.thinning import Array, LayerMeans

# Okabe and Ito's colours, which people with any colour vision tell apart
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX*"
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "+++", "ooo", "---")
# Of areas: light and dark by turns, so that neighbours differ in greyscale
_AREAS = ("#9ecae1", "#08519c", "#fdd0a2", "#b03a00", "#c7e9c0", "#1b6e37", "#dadaeb", "#54278f")
_DOTS_PER_INCH = 110
_AVERAGED = "ema_"
_MOST_RESULT_ROWS = 4
_MOST_LAYER_NAMES = 45
_MOST_MARKERS = 25  # on a line


@dataclass(frozen=True)
class Drawing:
    """A figure of a report.

    Attributes:
        kind: what it shows, as its file is named.
        title: of its section.
        caption: a sentence.
        run: the position of the run that it belongs to; None if it shows all.
        png: the picture.
    """

    kind: str
    title: str
    caption: str
    run: int | None
    png: bytes

    @property
    def file_name(self) -> str:
        """Of its picture: the kind, and the number of the run, from 1."""
        return f"{self.kind}.png" if self.run is None else f"{self.kind}-{self.run + 1}.png"


class Style(NamedTuple):
    """How a line looks: each also tells lines apart in greyscale, but for the colour."""

    colour: str
    dash: str
    marker: str


def style_of(number: int) -> Style:
    """The look of a line, by its number from 0."""
    return Style(
        _COLOURS[number % len(_COLOURS)],
        _DASHES[number % len(_DASHES)],
        _MARKERS[number % len(_MARKERS)],
    )


def draw_all(runs: Sequence[RunRecords]) -> list[Drawing]:
    """Every figure for which the runs have the data."""
    with warnings.catch_warnings():
        # Names of runs and layers may have characters that the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
            return [*_draw(runs)]


def _draw(runs: Sequence[RunRecords]) -> Iterator[Drawing]:
    if any(run.metrics.steps["loss"].count or run.metrics.results for run in runs):
        caption = (
            "Loss of the training steps (thin) and results of the evaluations (with markers; "
            "hollow ones are those of the averaged weights), learning rate and batch, over epochs "
            "and over the time of training."
        )
        yield Drawing("progress", "Loss, results and schedule", caption, None, _progress(runs))
    for number, run in enumerate(runs):
        log = run.metrics
        if log.quantiles or log.trust.count:
            kind = "trust_ratio" if "trust_ratio" in log.quantiles or log.trust.count else None
            caption = (
                "A cell is the geometric mean over its part of the run; hatched: no ratio. The "
                "quantiles are those over the layers, line by line."
                if kind in log.layers or not kind
                else "The smallest and the largest ratio of any layer, at the logged steps."
            )
            png = _ratios(run, kind or "update_ratio")
            title = "Trust ratios by layer" if kind else "Ratios of update and weight norms"
            yield Drawing("ratios", title, caption, number, png)
    if any(run.metrics.noise.count for run in runs):
        caption = (
            "The gradient noise scale (with markers), and the batch that was used (steps). With a "
            "batch well below the noise scale, twice the batch needs close to half the steps."
        )
        yield Drawing("noise", "Gradient noise scale", caption, None, _noise(runs))
    for number, run in enumerate(runs):
        if run.metrics.distance.last is not None:
            caption = (
                "The distance of all weights from their start, with two fits over the shaded part: "
                "ultra-slow diffusion grows as ln t, ordinary diffusion as the root of t."
            )
            yield Drawing("distance", "Distance of the weights", caption, number, _distance(run))
    for number, run in enumerate(runs):
        if run.metrics.phases.totals.get("updates"):
            caption = (
                "Seconds of rank 0 by phase of a step, with each phase's share of all of them, and "
                "the samples in a second."
            )
            yield Drawing("phases", "Time by phase", caption, number, _phases(run))


def safe_label(text: str) -> str:
    r"""A text of a run as matplotlib shows it: no formula, one line, visible in a legend.

    >>> safe_label("_a$b\n")
    ' _a\\$b�'
    """
    plain = printable(text)
    plain = plain if len(plain) <= 60 else f"…{plain[-59:]}"
    return (" " if plain.startswith("_") else "") + plain.replace("$", r"\$")


def new_figure(
    rows: int, columns: int, size: tuple[float, float], **more: Any
) -> tuple[Figure, Any]:
    """A figure of `size` in inches, with its axes as an array of shape (rows, columns)."""
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def png_of(figure: Figure) -> bytes:
    """The picture of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def legend_beside(axes: Any) -> None:
    """A legend beside the axes, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8, frameon=False)


def whole_numbers(axis: Any) -> None:
    """Writes the ticks of an axis as 8,192, not as a power."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _time_unit(runs: Sequence[RunRecords]) -> tuple[float, str]:
    longest = max(run.metrics.position[2] for run in runs)
    if longest < 300:
        return 1.0, "s"
    return (60.0, "min") if longest < 3 * 3600 else (3600.0, "h")


def _mark_every(rows: Array) -> int:
    return max(1, len(rows) // _MOST_MARKERS)


def _progress(runs: Sequence[RunRecords]) -> bytes:
    groups = _result_groups(runs)
    rows = 3 + len(groups)
    figure, grid = new_figure(rows, 2, (11.5, 2.05 * rows + 0.4), sharex="col", sharey="row")
    divisor, unit = _time_unit(runs)
    for column, (position, scale, title) in enumerate(
        ((1, 1.0, "epoch (passes over the training set)"), (2, divisor, f"training time ({unit})"))
    ):
        axes = grid[:, column]
        for number, run in enumerate(runs):
            _draw_run(axes, run, number, len(runs) > 1, groups, (position, scale))
        for row, names in enumerate(groups, start=1):
            _draw_targets(axes[row], axes[0] if len(runs) > 1 else axes[row], runs, names)
        axes[-1].set_xlabel(title)
        axes[-1].set_xlim(left=0)
    labels = ["loss\n(mean of a sample)", *(_result_label(runs, names) for names in groups)]
    for row, label in enumerate([*labels, "learning rate\n(no unit)", "global batch\n(samples)"]):
        grid[row, 0].set_ylabel(label)
    grid[0, 0].set_yscale("log")
    grid[-1, 0].set_yscale("log", base=2)
    whole_numbers(grid[-1, 0].yaxis)
    figure.align_ylabels(grid[:, 0])
    for row in range(rows):
        legend_beside(grid[row, 1])
    return png_of(figure)


def _draw_run(
    axes: Any,
    run: RunRecords,
    number: int,
    several: bool,
    groups: Sequence[Sequence[str]],
    by: tuple[int, float],
) -> None:
    """Draw a run into a column of axes.

    Args:
        axes: of loss, one of each group of results, lr and batch.
        run: to draw.
        number: of the run, from 0: its style.
        several: whether there are other runs.
        groups: names of results that share axes.
        by: the column of the rows that is the abscissa, and what to divide it by.
    """
    style, (position, scale) = style_of(number), by
    look = {"color": style.colour, "linestyle": style.dash}

    def draw(where: Any, rows: Array, label: str, **more: Any) -> None:
        if len(rows):
            shown = None if several else label
            where.plot(rows[:, position] / scale, rows[:, 3], label=shown, **look | more)

    if several:  # one legend for all axes
        axes[0].plot([], [], label=safe_label(run.label), marker=style.marker, **look)
    loss = run.metrics.steps["loss"].rows()
    draw(axes[0], loss[loss[:, 3] > 0], "training", linewidth=0.8, alpha=0.8)
    for row, name, label in _results_to_draw(groups):
        if name in run.metrics.results:
            rows = run.metrics.results[name].rows()
            more = {"marker": style.marker, "markersize": 4, "markevery": _mark_every(rows)}
            if name.startswith(_AVERAGED):
                more["markerfacecolor"] = "white"
            if row == 0 and not several:
                more["color"] = _COLOURS[1]
            draw(axes[row], rows, label, **more)
    for where, name in ((axes[-2], "lr"), (axes[-1], "global_batch")):
        # Runs often share a schedule: the lines below show between the dashes
        width = max(1.2, 2.8 - 0.5 * number) if several else 1.5
        step = "default" if name == "lr" else "steps-post"
        draw(where, schedule_of(run, name), "", linewidth=width, drawstyle=step)
    if not several:
        _mark_resumes(axes, [place[position] / scale for place in run.metrics.resumed])


def _results_to_draw(groups: Sequence[Sequence[str]]) -> Iterator[tuple[int, str, str]]:
    """The row, the name and the label of every result."""
    yield 0, "test_loss", "test"
    yield 0, f"{_AVERAGED}test_loss", "test (average)"
    for row, names in enumerate(groups, start=1):
        for name in names:
            plain = "weights" if len(names) > 1 else "test"
            yield row, name, "average of weights" if name.startswith(_AVERAGED) else plain


def _mark_resumes(axes: Any, places: Sequence[float]) -> None:
    for row, where in enumerate(axes):
        for number, place in enumerate(places):
            label = "resumed" if row == number == 0 else None
            where.axvline(place, color="0.5", linestyle=":", label=label)


def _result_groups(runs: Sequence[RunRecords]) -> list[list[str]]:
    """Names of results that share axes: a metric, and that of the averaged weights."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        for name in run.metrics.results:
            own = name.removeprefix(_AVERAGED)
            if own != "test_loss" and name not in groups.setdefault(own, []):
                groups[own].append(name)
    return list(groups.values())[:_MOST_RESULT_ROWS]


def _result_label(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    rows = [
        run.metrics.results[name].rows()
        for run in runs
        for name in names
        if name in run.metrics.results
    ]
    values = np.concatenate([each[:, 3] for each in rows])
    unit = "\n(fraction)" if values.min() >= 0 and values.max() <= 1 else "\n(unit of the metric)"
    return f"test {safe_label(names[0].removeprefix(_AVERAGED))}{unit}"


def _draw_targets(
    axes: Any, with_legend: Any, runs: Sequence[RunRecords], names: Sequence[str]
) -> None:
    targets = {target: run for run in runs for target in run.targets if target.name in names}
    look = {"color": "0.3", "linestyle": (0, (1, 3))}
    for target, run in targets.items():
        axes.axhline(target.value, **look)
        with_legend.plot([], [], label=safe_label(f"target: {target.text(run.job)}"), **look)


def _ratios(run: RunRecords, kind: str) -> bytes:
    layers = run.metrics.layers.get(kind)
    label = "trust ratio" if kind == "trust_ratio" else "ratio of update and weight norm"
    if layers is None:
        figure, grid = new_figure(1, 1, (7.5, 3.0))
    else:
        named = min(len(layers.names), _MOST_LAYER_NAMES)
        height = 1.6 + 0.17 * named
        ratios = {"height_ratios": [height, 2.2]}
        figure, grid = new_figure(2, 1, (7.5, height + 2.6), sharex=True, gridspec_kw=ratios)
        _heat_map(figure, grid[0, 0], layers, label)
    lower = grid[-1, 0]
    _draw_quantiles(lower, run, kind)
    lower.set_xlim(left=0)
    lower.set_xlabel("epoch (passes over the training set)")
    lower.set_ylabel(f"{label}\n(log scale, no unit)")
    legend_beside(lower)
    return png_of(figure)


def _heat_map(figure: Figure, axes: Any, layers: LayerMeans, label: str) -> None:
    cells = layers.matrix()
    ends = [row[1] for row in layers.ends()]
    begin = layers.first[1] if layers.first is not None else 0.0
    # The first column has no width of its own if it is one line
    edges = np.maximum.accumulate([min(begin, ends[0]), *ends])
    if edges[0] == edges[1]:
        edges[0] = max(0.0, edges[1] - (edges[2] - edges[1] if len(edges) > 2 else 1.0))
    known = cells[np.isfinite(cells)]
    axes.patch.set(hatch="////", edgecolor="0.75")
    axes.grid(False)
    if len(known):
        low, high = known.min(), known.max()
        norm = LogNorm(low, high if high > low else low * 1.01)
        mesh = axes.pcolormesh(edges, np.arange(len(cells) + 1), cells, norm=norm, cmap="viridis")
        figure.colorbar(mesh, ax=axes, label=f"{label} (no unit)", location="top", aspect=40)
    names = list(layers.names)
    every = -(-len(names) // _MOST_LAYER_NAMES)
    axes.set_yticks(np.arange(0, len(names), every) + 0.5)
    axes.set_yticklabels([safe_label(name) for name in names[::every]], fontsize=7)
    axes.set_ylim(len(names), 0)
    axes.set_ylabel("parameter" if every == 1 else f"parameter (one of {every} named)")


def _positive(rows: Array, first: int) -> Array:
    """The rows with NaN for values from column `first` on that have no logarithm."""
    rows = rows.copy()
    rows[:, first:][rows[:, first:] <= 0] = np.nan
    return rows


def _draw_quantiles(axes: Any, run: RunRecords, kind: str) -> None:
    axes.set_yscale("log", nonpositive="mask")
    if kind not in run.metrics.quantiles:
        rows = _positive(run.metrics.trust.rows(), 3)
        axes.fill_between(
            rows[:, 1], rows[:, 3], rows[:, 4], color="0.8", label="smallest to\nlargest"
        )
        for column, dash in ((3, "-"), (4, "--")):
            axes.plot(rows[:, 1], rows[:, column], color="0.2", linestyle=dash, linewidth=0.8)
        return
    rows = _positive(run.metrics.quantiles[kind].rows(), 3)
    epochs = rows[:, 1]
    axes.fill_between(epochs, rows[:, 3], rows[:, 7], color="0.85", label="smallest to\nlargest")
    axes.fill_between(epochs, rows[:, 4], rows[:, 6], color="0.6", label="middle half")
    axes.plot(epochs, rows[:, 5], color="black", label="median")


def _noise(runs: Sequence[RunRecords]) -> bytes:
    figure, grid = new_figure(1, 1, (9.5, 3.6))
    axes = grid[0, 0]
    for number, run in enumerate(runs):
        style = style_of(number)
        if run.metrics.noise.count == 0:
            continue
        label: str | None = "noise scale" if len(runs) == 1 else safe_label(run.label)
        rows = run.metrics.noise.rows()
        rows = rows[rows[:, 3] > 0]
        look = {"color": style.colour, "linestyle": style.dash}
        more = {"marker": style.marker, "markersize": 4, "markevery": _mark_every(rows)}
        axes.plot(rows[:, 1], rows[:, 3], label=label, **look, **more)
        batch = schedule_of(run, "global_batch")
        if len(batch):
            look["color"] = style.colour if len(runs) > 1 else "black"
            label = "batch" if len(runs) == 1 else None
            axes.plot(batch[:, 1], batch[:, 3], label=label, ds="steps-post", lw=2.2, **look)
    axes.set_yscale("log", base=2)
    whole_numbers(axes.yaxis)
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch (passes over the training set)")
    axes.set_ylabel("samples (log scale)")
    legend_beside(axes)
    return png_of(figure)


def _distance(run: RunRecords) -> bytes:
    figure, grid = new_figure(1, 1, (7.5, 3.8))
    axes = grid[0, 0]
    rows = run.metrics.distance.rows()
    axes.plot(rows[:, 0], rows[:, 3], "o", color="0.55", markersize=3, label="measured")
    fits = fits_of(run)
    if fits is not None:
        times = np.geomspace(fits.first, fits.last, 200)
        for fit, dash, colour in ((fits.log, "-", _COLOURS[0]), (fits.power, "--", _COLOURS[1])):
            if fit is not None:
                values = "\n".join(
                    f"  {letter} = {each.value:.4g} ± {each.error:.2g}"
                    for letter, each in fit.parameters.items()
                )
                label = f"{fit.form}\n{values}\n  R² = {fit.r_squared:.4f}"
                axes.plot(times, fit.at(times), color=colour, linestyle=dash, lw=1.8, label=label)
        part = "fitted: constant lr" if fits.constant_lr else "fitted: after 10\nupdates"
        axes.axvspan(fits.first, fits.last, color="0.93", zorder=0, label=part)
    axes.set_xscale("log")
    axes.set_xlabel("weight updates t (log scale)")
    axes.set_ylabel("distance of the weights from\ntheir start (2-norm, no unit)")
    legend_beside(axes)
    return png_of(figure)


def _phases(run: RunRecords) -> bytes:
    figure, grid = new_figure(
        2, 1, (7.5, 4.8), sharex=True, gridspec_kw={"height_ratios": [3, 1.4]}
    )
    upper, lower = grid[:, 0]
    phases = run.metrics.phases
    intervals = [each for each in phases.intervals() if each.sums.get("updates")]
    names = [name for name in phases.totals if name not in ("updates", "samples")]
    epochs = np.array([0.0, *(interval.end[1] for interval in intervals)])
    busy = sum(phases.totals[name] for name in names)
    base = np.zeros(len(epochs))
    for number, name in enumerate(names):
        values = [1e3 * each.sums.get(name, 0.0) / each.sums["updates"] for each in intervals]
        top = base + np.array([values[0], *values])
        share = phases.totals[name] / busy if busy else 0.0
        upper.fill_between(
            epochs,
            base,
            top,
            step="pre",
            facecolor=_AREAS[number % len(_AREAS)],
            hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor="0.3" if number % 2 == 0 else "0.8",
            linewidth=0.4,
            label=f"{safe_label(name)}, {share:.1%}",
        )
        base = top
    upper.set_ylabel("time of an update (ms)")
    upper.set_ylim(bottom=0)
    whole_numbers(upper.yaxis)
    upper.yaxis.set_major_locator(MaxNLocator(6))
    speeds = _speeds(run, intervals)
    lower.plot(*speeds, color="black", drawstyle="steps-pre")
    lower.set_ylim(bottom=0)
    lower.set_ylabel("samples\nper second")
    whole_numbers(lower.yaxis)
    lower.set_xlabel("epoch (passes over the training set)")
    lower.set_xlim(left=0)
    figure.align_ylabels([upper, lower])
    legend_beside(upper)
    return png_of(figure)


def _speeds(run: RunRecords, intervals: Sequence[Any]) -> tuple[Any, Any]:
    """Epochs, and samples in a second: as logged, or by the seconds of the phases."""
    logged = run.metrics.steps["samples_per_second"].rows()
    if len(logged):
        return logged[:, 1], logged[:, 3]
    rates = [each.sums.get("samples", 0.0) / max(_busy(each.sums), 1e-9) for each in intervals]
    return [each.end[1] for each in intervals], rates


def _busy(sums: Mapping[str, float]) -> float:
    return sum(value for name, value in sums.items() if name not in ("updates", "samples"))
