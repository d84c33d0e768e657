"""Draws the figures of a study's findings with matplotlib, without a display.

They can be read in greyscale: lines differ by style and marker as well as by colour.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.ticker import NullLocator

from hvdlarge.reporting.figures import (
    legend_beside,
    new_figure,
    png_of,
    safe_label,
    style_of,
    whole_numbers,
)
from hvdlarge.reporting.run_reader import printable
from hvdlarge.study.analysis.finding import Finding
from hvdlarge.study.analysis.plots import Panel, Picture, Plot, Series

_WIDTH, _ROW, _HEIGHT = 9.5, 0.3, 3.4  # inches: of a figure, of a named row, of a panel
_FEW, _LOW = 3, 2.5  # panels; inches of one where there are more
_LABEL_WIDTH, _MOST_LINES = 34, 5  # characters of a line, lines of a label
_SHADES = (("0.96", ""), ("0.9", "//"), ("0.84", ".."))  # colour and hatch of areas
_REFERENCES = {-1: ("0.35", ":"), -2: ("0.55", "-.")}  # colour and dash of reference curves


def draw(findings: Sequence[Finding]) -> list[Picture]:
    """The figures of the findings that have one."""
    with warnings.catch_warnings():
        # Names of cells may have characters that the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
            return [
                Picture(place, f"{place + 1}-{finding.kind}.png", _draw(finding.plot))
                for place, finding in enumerate(findings)
                if finding.plot is not None
            ]


def _draw(plot: Plot) -> bytes:
    least = _HEIGHT if len(plot.panels) <= _FEW else _LOW
    heights = [_height(panel, least) for panel in plot.panels]
    figure, grid = new_figure(
        len(heights), 1, (_WIDTH, sum(heights)), gridspec_kw={"height_ratios": heights}
    )
    for axes, panel in zip(grid[:, 0], plot.panels, strict=True):
        _draw_panel(axes, panel)
    return png_of(figure)


def _height(panel: Panel, least: float) -> float:
    if panel.names:
        lines = sum(_wrapped(name).count("\n") + 1 for name in panel.names)
        rows = len(panel.names) * max(1.0, 0.4 * sum(bool(series.label) for series in panel.series))
        return min(1.1 + _ROW * max(rows, 0.62 * lines), 60.0)
    entries = sum(_wrapped(each.label).count("\n") + 1 for each in panel.series if each.label)
    return min(max(least, 0.9 + 0.17 * (entries + 2 * len(panel.guides))), 60.0)


def _wrapped(text: str) -> str:
    lines = textwrap.wrap(printable(text), _LABEL_WIDTH, max_lines=_MOST_LINES, placeholder=" …")
    return "\n".join(map(safe_label, lines))


def _draw_panel(axes: Any, panel: Panel) -> None:
    for place, series in enumerate(panel.series):
        _draw_series(axes, series, place, bool(panel.names))
    for place, guide in enumerate(panel.guides):
        dash = ("--", "-.", (0, (1, 2)), (0, (5, 1)))[place % 4]
        look = {"color": f"{0.2 + 0.12 * (place % 4):.2f}", "linestyle": dash, "linewidth": 1.2}
        line = axes.axvline if guide.axis == "x" else axes.axhline
        line(guide.at, label=_wrapped(f"{guide.label}: {guide.at:.4g}") or None, **look)
    named: set[str] = set()
    for area in panel.areas:
        colour, hatch = _SHADES[area.shade % len(_SHADES)]
        label = None if area.label in named else _wrapped(area.label)
        named.add(area.label)
        look = {"facecolor": colour, "hatch": hatch, "edgecolor": "0.8", "linewidth": 0}
        axes.axvspan(area.low, area.high, zorder=0, label=label, **look)
    for axis, scale in (("x", panel.x_scale), ("y", panel.y_scale)):
        _set_scale(axes, axis, scale)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.title:
        axes.set_title(safe_label(panel.title), loc="left", fontsize=9)
    if panel.names:
        axes.set_yticks(range(len(panel.names)))
        axes.set_yticklabels([_wrapped(name) for name in panel.names], fontsize=8)
        axes.set_ylim(len(panel.names) - 0.5, -0.5)
    elif panel.x_scale == "log2":
        _tick_batches(axes, panel)
    legend_beside(axes)


def _set_scale(axes: Any, axis: str, scale: str) -> None:
    if scale == "linear":
        return
    set_scale = axes.set_xscale if axis == "x" else axes.set_yscale
    if scale == "log":
        set_scale("log")
        return
    set_scale("log", base=2)
    whole_numbers(axes.xaxis if axis == "x" else axes.yaxis)


def _tick_batches(axes: Any, panel: Panel) -> None:
    """A tick at each batch that was run, while they fit."""
    batches = sorted({x for series in panel.series for x in series.x})
    if 2 <= len(batches) <= 12:
        axes.set_xticks(batches)
        axes.xaxis.set_minor_locator(NullLocator())


def _draw_series(axes: Any, series: Series, place: int, by_row: bool) -> None:
    if not series.x:
        return
    number = place if series.style is None else series.style
    label = _wrapped(series.label) if series.label else None
    if number < 0:
        colour, dash = _REFERENCES[number]
        axes.plot(series.x, series.y, color=colour, linestyle=dash, linewidth=1.2, label=label)
        return
    style = style_of(number)
    look: dict[str, Any] = {"color": style.colour, "linestyle": style.dash, "label": label}
    look |= {"marker": style.marker, "markersize": 4.5, "linewidth": 1.4}
    if series.look == "points":
        look["linestyle"] = "none"
    if series.look == "line":
        look["marker"] = None
    if series.hollow:
        look |= {"markerfacecolor": "white", "color": "0.45", "markersize": 3.5, "zorder": 1.5}
    axes.plot(series.x, series.y, **look)
    _draw_intervals(axes, series, style.colour, by_row)


def _draw_intervals(axes: Any, series: Series, colour: str, by_row: bool) -> None:
    if not series.low:
        return
    for x, y, low, high in zip(series.x, series.y, series.low, series.high, strict=True):
        if low is None or high is None:
            continue
        middle = x if by_row else y
        ends = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
        errors = {"xerr": ends} if by_row else {"yerr": ends}
        axes.errorbar(x, y, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, **errors)
