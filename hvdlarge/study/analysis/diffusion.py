"""The analysis `diffusion`: how the distance of the weights from their start grows with the number
of updates t at a constant rate: as a · ln t + b, ultra-slow, or as a · t^p.

Formula:  both are fitted to each repetition. For the comparison they are fitted to the points of
          the first two thirds of ln t only; of the last third the held-out error is the root of the
          mean squared residual. A cell's gap is the mean over seeds of ln(error of the logarithm /
          error of the power): below 0, the logarithm predicts the distance better.
Source:   Hoffer, Hubara, Soudry, Train longer, generalize better, arXiv:1705.08741: ln t; p = 1/2
          is ordinary diffusion. You et al., The Limit of the Batch Size, arXiv:2006.08517, contest
          ln t for huge batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hvdlarge.reporting.fits import MIN_POINTS, fit_log, fit_power
from hvdlarge.study.analysis.cells import CellResults
from hvdlarge.study.analysis.compare import not_ended_notes
from hvdlarge.study.analysis.finding import (
    UNKNOWN,
    Finding,
    counted,
    ends_text,
    interval_facts,
    listed,
    mean_and_ends,
    mean_text,
    percent,
    rounded,
)
from hvdlarge.study.analysis.intervals import Interval, holm, interval, p_value, seeds_needed
from hvdlarge.study.analysis.plots import Panel, Plot, Series
from hvdlarge.study.analysis.sections import Diffusion
from hvdlarge.study.analysis.verdicts import short_names
from hvdlarge.study.results import Cell, Point, Setup

_SAME_RATE = 1e-9
_HELD_OUT = 1 / 3  # of the span of ln t
_MIN_HELD_OUT = 3  # points
_MOST_DRAWN = 7  # cells: as many as there are colours
_MOST_NAMED = 2  # cells of one outcome
_LOG, _POWER = "a · ln t + b", "a · t^p"

Cells = Mapping[Cell, CellResults]


class Growth(NamedTuple):
    """The fits of a repetition.

    Attributes:
        slope: a of a · ln t + b: the distance that a factor e in t adds.
        power: p of a · t^p.
        gap: ln of the held-out error of the logarithm over that of the power.
        times: updates of the points, of shape (points,).
        distances: of shape (points,).
    """

    slope: float
    power: float
    gap: float
    times: Any
    distances: Any


@dataclass(frozen=True)
class CellGrowth:
    """The fits of a cell.

    Attributes:
        cell: its results.
        runs: the fits of its repetitions.
        slope: over seeds.
        power: over seeds.
        gap: over seeds; below 0, the logarithm is better.
        p: p-value of a gap of 0, corrected for the other cells.
        better: `log`, `power` or empty if undecided.
    """

    cell: CellResults
    runs: tuple[Growth, ...]
    slope: Interval
    power: Interval
    gap: Interval
    p: float | None
    better: str


def diffusion(section: Diffusion, setup: Setup, cells: Cells) -> Finding:
    """Fits the distance of the weights in each cell.

    Args:
        section: of the study file.
        setup: of the study.
        cells: its results.
    """
    left_out: dict[str, list[str]] = {}
    fitted: list[tuple[CellResults, list[Growth]]] = []
    for each in cells.values():
        runs, problems = _fit_cell(section, each)
        for problem in problems:
            left_out.setdefault(problem, []).append(each.label)
        if runs:
            fitted.append((each, runs))
    grown = _judged(section, fitted)
    notes = [
        f"{problem}: {listed(sorted(set(names)), 8)} ({counted(len(names), 'repetition')})."
        for problem, names in left_out.items()
    ]
    if grown:
        notes.insert(
            0,
            "The better description is the one with the smaller error on the last third of ln t, "
            "fitted to the first two thirds. Power 0.5 is ordinary diffusion. Distances of one run "
            "are not independent: intervals are over seeds.",
        )
    return Finding(
        "diffusion",
        "Distance of the weights from their start"
        + (f", up to update {section.until_update:,}" if section.until_update else ""),
        _verdict(section, setup, grown),
        _table(grown),
        _plot(grown),
        notes + not_ended_notes(setup, cells),
        {"cells": [_facts(each) for each in grown]},
    )


def constant_stretch(
    points: Sequence[Point],
    from_epoch: float,
    until_epoch: float | None,
    until_update: int | None = None,
) -> list[Point]:
    """The longest stretch of points with one learning rate, in updates.

    Args:
        points: in the order of the run.
        from_epoch: points before it are left out.
        until_epoch: points after it are left out; None: none is.
        until_update: points after it are left out; None: none is.

    Returns:
        All points if no learning rate is known.
    """
    inside = [
        point
        for point in points
        if point.step >= 1
        and point.epoch >= from_epoch
        and (until_epoch is None or point.epoch <= until_epoch)
        and (until_update is None or point.step <= until_update)
        and math.isfinite(point.value)
    ]
    if all(point.lr is None for point in inside):
        return inside
    longest: list[Point] = []
    current: list[Point] = []
    for point in inside:
        if current and not _same_rate(current[0].lr, point.lr):
            current = []
        current.append(point)
        if not longest or _length(current) > _length(longest):
            longest = list(current)
    return longest


def fit_growth(times: Any, distances: Any) -> Growth | None:
    """Both fits of a run, and their held-out errors; None if the points do not determine them.

    Args:
        times: updates, ascending and positive, of shape (points,).
        distances: of shape (points,).
    """
    times, distances = np.asarray(times, dtype=np.float64), np.asarray(distances, dtype=np.float64)
    logarithm, power = fit_log(times, distances), fit_power(times, distances)
    if logarithm is None or power is None:
        return None
    bound = times[-1] * (times[0] / times[-1]) ** _HELD_OUT
    first = max(int(np.count_nonzero(times <= bound)), MIN_POINTS)
    if len(times) - first < _MIN_HELD_OUT:
        return None
    early = fit_log(times[:first], distances[:first]), fit_power(times[:first], distances[:first])
    if early[0] is None or early[1] is None:
        return None
    tiny = 1e-12 * float(np.abs(distances).max()) + 1e-300
    errors = [
        float(np.sqrt(np.mean((fit.at(times[first:]) - distances[first:]) ** 2))) + tiny
        for fit in (early[0], early[1])
    ]
    return Growth(
        logarithm.parameters["a"].value,
        power.parameters["p"].value,
        math.log(errors[0] / errors[1]),
        times,
        distances,
    )


def _same_rate(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=_SAME_RATE)


def _length(points: Sequence[Point]) -> int:
    return points[-1].step - points[0].step


def _fit_cell(section: Diffusion, cell: CellResults) -> tuple[list[Growth], list[str]]:
    """The fits of a cell's repetitions, and why others have none."""
    found, problems = [], []
    for run in cell.repetitions:
        if run.number not in cell.values:
            problems.append("Failed repetitions are left out")
            continue
        if not run.distance:
            problems.append("Without distances (log.distances of the job)")
            continue
        points = constant_stretch(
            run.distance, section.from_epoch, section.until_epoch, section.until_update
        )
        if all(point.lr is None for point in points):
            problems.append("The learning rate is not known, so all points are fitted")
        if len(points) < section.min_points:
            problems.append(f"Fewer than {section.min_points} points at a constant rate")
            continue
        growth = fit_growth([p.step for p in points], [p.value for p in points])
        if growth is None:
            problems.append("The points do not determine the fits")
        else:
            found.append(growth)
    return found, problems


def _judged(
    section: Diffusion, fitted: Sequence[tuple[CellResults, Sequence[Growth]]]
) -> list[CellGrowth]:
    gaps = [[run.gap for run in runs] for _, runs in fitted]
    enough = seeds_needed(section.confidence)
    p_values = holm([p_value(each) if len(each) >= enough else None for each in gaps])
    grown = []
    for (cell, runs), p in zip(fitted, p_values, strict=True):
        slope, power, gap = (
            interval([float(getattr(run, name)) for run in runs], section.confidence)
            for name in ("slope", "power", "gap")
        )
        clear = p is not None and p <= 1 - section.confidence + 1e-12 and gap.mean != 0
        better = ("log" if (gap.mean or 0.0) < 0 else "power") if clear else ""
        grown.append(CellGrowth(cell, tuple(runs), slope, power, gap, p, better))
    return grown


def _verdict(section: Diffusion, setup: Setup, grown: Sequence[CellGrowth]) -> str:
    if not grown:
        return "No repetition has enough distances at a constant rate: no fit."
    names = short_names(setup, [each.cell.cell for each in grown])
    enough = seeds_needed(section.confidence)
    kinds = {
        f"{_LOG} is better": [each for each in grown if each.better == "log"],
        f"{_POWER} is better": [each for each in grown if each.better == "power"],
        "undecided": [e for e in grown if not e.better and len(e.runs) >= enough],
        "too few seeds to decide": [e for e in grown if not e.better and len(e.runs) < enough],
    }
    parts = [
        _kind_text(words, members, names, len(grown)) for words, members in kinds.items() if members
    ]
    return f"{'; '.join(parts)} (intervals {percent(section.confidence)})."


def _kind_text(
    words: str, members: Sequence[CellGrowth], names: Mapping[Cell, str], total: int
) -> str:
    """The cells of one outcome, from the smallest parameter to the largest."""
    parameter = "slope" if members[0].better == "log" else "power"

    def numbers(grown: CellGrowth) -> str:
        return mean_and_ends(grown.slope if parameter == "slope" else grown.power)

    ordered = sorted(
        members, key=lambda each: (each.slope if parameter == "slope" else each.power).mean or 0.0
    )
    if total == 1:
        ratio = _ratio_text(members[0])
        return f"{words}{f' ({ratio})' if ratio else ''}, {parameter} {numbers(members[0])}"
    if len(members) <= _MOST_NAMED:
        named = [f"{names[each.cell.cell]} ({parameter} {numbers(each)})" for each in ordered]
        return f"{words} in {listed(named)}"
    count = "all " if len(members) == total else ""
    first, last = (f"{numbers(e)} ({names[e.cell.cell]})" for e in (ordered[0], ordered[-1]))
    return f"{words} in {count}{len(members)} cells, {parameter} from {first} to {last}"


def _ratio_text(grown: CellGrowth) -> str:
    """How much larger the held-out error of the worse description is; empty if they are equal."""
    ratio = math.exp(abs(grown.gap.mean or 0.0))
    which = _LOG if (grown.gap.mean or 0.0) > 0 else _POWER
    return f"error of {which} {rounded(ratio)} times as large" if ratio >= 1.005 else ""


def _error_ratio(gap: Interval) -> str:
    if gap.mean is None:
        return UNKNOWN
    text = f"{math.exp(gap.mean):.3g}"
    if gap.low is None or gap.high is None:
        return text
    return f"{text} [{math.exp(gap.low):.3g}, {math.exp(gap.high):.3g}]"


def _table(grown: Sequence[CellGrowth]) -> list[tuple[str, ...]]:
    if not grown:
        return []
    rows: list[tuple[str, ...]] = [
        (
            "cell",
            "seeds",
            "updates",
            "a of a · ln t + b",
            "interval",
            "power p of a · t^p",
            "interval",
        )
        + ("held-out error, log / power", "p-value", "better description")
    ]
    words = {"log": _LOG, "power": _POWER, "": "undecided"}
    for each in grown:
        first = min(run.times[0] for run in each.runs)
        last = max(run.times[-1] for run in each.runs)
        rows.append(
            (each.cell.label, f"{len(each.runs)}", f"{first:.0f} to {last:.0f}")
            + (mean_text(each.slope), ends_text(each.slope))
            + (mean_text(each.power), ends_text(each.power))
            + (_error_ratio(each.gap), UNKNOWN if each.p is None else f"{each.p:.2g}")
            + (words[each.better],)
        )
    return rows


def _plot(grown: Sequence[CellGrowth]) -> Plot | None:
    if not grown:
        return None
    series = []
    for place, each in enumerate(grown[:_MOST_DRAWN]):
        run = each.runs[0]
        x = tuple(float(t) for t in run.times)
        series.append(
            Series(each.cell.label, x, tuple(float(d) for d in run.distances), style=place)
        )
        for fit, style in (
            (fit_log(run.times, run.distances), 0),
            (fit_power(run.times, run.distances), 1),
        ):
            if fit is not None:
                label = (_LOG, _POWER)[style] if place == 0 else ""
                curve = tuple(float(value) for value in fit.at(run.times))
                series.append(Series(label, x, curve, look="line", style=-1 - style))
    rows = Series(
        "power over seeds",
        tuple(float(each.power.mean or 0.0) for each in grown),
        tuple(float(place) for place in range(len(grown))),
        tuple(each.power.low for each in grown),
        tuple(each.power.high for each in grown),
    )
    names = tuple(each.cell.label for each in grown)
    panels = (
        Panel(
            "weight updates t (log scale)",
            "distance of the weights from\ntheir start (2-norm, no unit)",
            tuple(series),
            x_scale="log",
        ),
        Panel("power p of a · t^p (no unit)", "", (rows,), names=names),
    )
    caption = (
        f"The first repetition of each cell (at most {_MOST_DRAWN}) with both fits over the "
        "stretch of constant rate; below, the power with its interval over seeds."
    )
    return Plot(panels, caption)


def _facts(grown: CellGrowth) -> dict[str, Any]:
    return {
        "cell": list(grown.cell.cell),
        "slope": interval_facts(grown.slope),
        "power": interval_facts(grown.power),
        "log_error_ratio": interval_facts(grown.gap),
        "p": grown.p,
        "better": grown.better,
    }
