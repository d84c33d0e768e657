"""What the figure of an analysis shows, as plain data: drawn by `drawing.py` and read by tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Scale = Literal["linear", "log", "log2"]


class Series(NamedTuple):
    """Points of a figure, in the legend if there are several.

    Attributes:
        label: in the legend; empty: not there.
        x: abscissas.
        y: ordinates, of the same number.
        low: lower ends of the intervals, None where there is none: of x if the panel has names of
            rows, else of y. Empty: no intervals.
        high: upper ends.
        look: points, a line, or both.
        hollow: whether the markers are empty.
        style: number of colour, dash and marker; None: its place among the series.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    look: Literal["points", "line", "both"] = "points"
    hollow: bool = False
    style: int | None = None


class Guide(NamedTuple):
    """A straight line across a panel, at a value of `axis`."""

    label: str
    axis: Literal["x", "y"]
    at: float


class Area(NamedTuple):
    """A shaded stretch of the x axis: the darker, the larger `shade`, from 0 to 2."""

    label: str
    low: float
    high: float
    shade: int = 0


@dataclass(frozen=True)
class Panel:
    """A pair of axes.

    Attributes:
        x_label: with the unit.
        y_label: with the unit.
        series: to draw.
        x_scale: of the axis.
        y_scale: of the axis.
        names: of the rows, which are at y = 0, 1, … from the top; empty: y is a number.
        guides: lines.
        areas: shaded stretches.
        title: above the panel.
    """

    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    names: tuple[str, ...] = ()
    guides: tuple[Guide, ...] = ()
    areas: tuple[Area, ...] = ()
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure: panels below each other, and a sentence about them."""

    panels: tuple[Panel, ...]
    caption: str


class Picture(NamedTuple):
    """A drawn figure.

    Attributes:
        finding: the position of the finding that it belongs to.
        file_name: of the picture.
        png: the picture.
    """

    finding: int
    file_name: str
    png: bytes
