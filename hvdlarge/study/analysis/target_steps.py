"""The steps to a value of the metric against the batch, with the regions of Shallue et al.

Formulas: steps to the target: where the straight line between the two evaluations around it reaches
          it; of a run whose first evaluation has reached it they are not known. The fall per
          doubling between neighbouring batches is the mean over seeds of
          (S(B1) / S(B2))^(1 / log2(B2 / B1)), as a geometric mean: 2 is perfect scaling, 1 is no
          gain. Regions: perfect scaling from 2^0.8 = 1.74 on, maximum below 2^0.2 = 1.15, else
          diminishing returns; undecided unless the whole interval of the fall lies in one.
          S = S_min · (1 + B_crit / B), fitted to the logarithms for each seed, has the slope
          B_crit / (B + B_crit): 0.8 at B_crit / 4, 0.2 at 4 · B_crit.
Source:   Shallue et al., Measuring the Effects of Data Parallelism on Neural Network Training,
          arXiv:1811.03600, section 4.1: the three regions; the two bounds are ours. McCandlish et
          al., An Empirical Model of Large-Batch Training, arXiv:1812.06162, equation 2.11.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hvdlarge.study.analysis.cells import CellResults
from hvdlarge.study.analysis.finding import (
    UNKNOWN,
    counted,
    interval_facts,
    number,
    rounded,
)
from hvdlarge.study.analysis.intervals import Interval, interval
from hvdlarge.study.analysis.plots import Area, Guide, Panel, Series
from hvdlarge.study.results import RunResult, Setup

REGIONS = ("perfect scaling", "diminishing returns", "maximum")
UNDECIDED = "undecided"
PERFECT, MAXIMUM = 0.8, 0.2  # slopes of -log2(steps) against log2(batch)
EARLY = 0.0  # updates to a target that the first evaluation has reached
_BEYOND = 64.0  # times the measured batches: where a fit looks for the critical batch
_MOST_PANELS = 4  # arms with axes of their own
_MIN_BATCHES = 3  # for a fit of two parameters


class Critical(NamedTuple):
    """The critical batch over the seeds that reached the target at three batches or more.

    Attributes:
        batch: in samples (geometric mean); no number if the fit of any seed is at a bound.
        below: the smallest batch of each seed whose fit is at the lower bound.
        above: the largest batch of each seed whose fit is at the upper bound.
    """

    batch: Interval
    below: tuple[float, ...]
    above: tuple[float, ...]


@dataclass(frozen=True)
class StepsToTarget:
    """The steps to a target of one arm.

    Attributes:
        name: of the arm; empty if there is one.
        batches: of its cells, ascending, in samples.
        steps: mean over the seeds that reached it between two evaluations (geometric), of each
            batch, in updates.
        missed: repetitions of each batch that did not reach it, failed ones among them.
        early: repetitions of each batch that reached it before their first evaluation.
        falls: how much each batch divides the steps of the one before, per doubling; the first is
            without seeds.
        regions: of each batch: that of the doubling towards it; empty if there is none.
        critical: the critical batch of the fit.
    """

    name: str
    batches: tuple[float, ...]
    steps: tuple[Interval, ...]
    missed: tuple[int, ...]
    early: tuple[int, ...]
    falls: tuple[Interval, ...]
    regions: tuple[str, ...]
    critical: Critical

    @property
    def measured(self) -> bool:
        """Whether the steps of any repetition are known."""
        return any(each.seeds for each in self.steps)

    def facts(self) -> dict[str, Any]:
        """The numbers, as JSON has them."""
        return {
            "arm": self.name,
            "batches": list(self.batches),
            "steps": [interval_facts(each) for each in self.steps],
            "missed": list(self.missed),
            "early": list(self.early),
            "falls_per_doubling": [interval_facts(each) for each in self.falls],
            "regions": list(self.regions),
            "critical_batch": interval_facts(self.critical.batch),
            "far_below": list(self.critical.below),
            "far_above": list(self.critical.above),
        }


def steps_to(run: RunResult, target: float, lower_is_better: bool) -> float | None:
    """The updates after which a run first reached a target, between its evaluations.

    Args:
        run: with the metric at its evaluations, as its curve.
        target: value of the metric.
        lower_is_better: whether at most that value is meant.

    Returns:
        None if it did not reach it, `EARLY` if the first evaluation has. After an evaluation that
        is not finite, the step of the next one: an upper bound.
    """
    sign = -1.0 if lower_is_better else 1.0
    before: tuple[float, float] | None = None
    short = False  # of the target, at an evaluation so far
    for point in run.curve:
        if not math.isfinite(point.value):
            before = None
            continue
        missing = sign * (target - point.value)
        if missing <= 0:
            if before is None:
                return float(point.step) if short else EARLY
            share = before[1] / (before[1] - missing)
            return before[0] + share * (point.step - before[0])
        before, short = (float(point.step), missing), True
    return None


def measure_steps(
    name: str,
    batches: Sequence[float],
    cells: Sequence[CellResults],
    setup: Setup,
    target: float,
    confidence: float,
) -> StepsToTarget:
    """The steps to a target over the batches of an arm.

    Args:
        name: of the arm.
        batches: ascending, in samples.
        cells: their results.
        setup: of the study.
        target: value of the metric.
        confidence: level of the intervals.
    """
    logs: list[dict[int, float]] = []
    missed, early = [], []
    for cell in cells:
        found = {
            run.number: steps
            for run in cell.repetitions
            if run.number in cell.values
            and (steps := steps_to(run, target, setup.lower_is_better)) is not None
        }
        logs.append({seed: math.log(steps) for seed, steps in found.items() if steps != EARLY})
        missed.append(len(cell.repetitions) - len(found))
        early.append(len(found) - len(logs[-1]))
    falls, regions = [Interval(None, None, None, 0)], [""]
    for place in range(1, len(batches)):
        doublings = math.log2(batches[place] / batches[place - 1])
        before, after = logs[place - 1], logs[place]
        slopes = [(before[seed] - after[seed]) / doublings for seed in after if seed in before]
        falls.append(interval(slopes, confidence).exponential())
        regions.append(_region(falls[-1]))
    return StepsToTarget(
        name,
        tuple(batches),
        tuple(interval([*each.values()], confidence).exponential() for each in logs),
        tuple(missed),
        tuple(early),
        tuple(falls),
        tuple(regions),
        _critical(batches, logs, confidence),
    )


def fit_critical_batch(batches: Sequence[float], steps: Sequence[float]) -> tuple[float, str]:
    """The critical batch of S = S_min · (1 + B_crit / B), by least squares in ln S.

    Args:
        batches: B, at least three, in samples.
        steps: S, in updates.

    Returns:
        B_crit in samples, between the smallest batch / 64 and the largest · 64, and the bound at
        which it lies: `low`, `high`, or empty for none.
    """
    sizes, logs = np.asarray(batches, dtype=np.float64), np.log(steps)
    first, last = math.log(sizes.min() / _BEYOND), math.log(sizes.max() * _BEYOND)
    low, high = first, last
    while high - low > 1e-9:
        grid = np.linspace(low, high, 41)
        residuals = logs - np.log1p(np.exp(grid)[:, None] / sizes)
        best = int(np.argmin(np.var(residuals, axis=1)))  # ln S_min is the mean residual
        low, high = float(grid[max(0, best - 1)]), float(grid[min(40, best + 1)])
    bound = "low" if low - first < 1e-6 else "high" if last - high < 1e-6 else ""
    return math.exp((low + high) / 2), bound


def _critical(
    batches: Sequence[float], logs: Sequence[dict[int, float]], confidence: float
) -> Critical:
    """The critical batch over the seeds with the steps of three batches or more."""
    found: list[float] = []
    below: list[float] = []
    above: list[float] = []
    for seed in sorted({seed for each in logs for seed in each}):
        known = [
            (batch, math.exp(each[seed]))
            for batch, each in zip(batches, logs, strict=True)
            if seed in each
        ]
        if len(known) < _MIN_BATCHES:
            continue
        sizes, steps = zip(*known, strict=True)
        batch, bound = fit_critical_batch(sizes, steps)
        found.append(math.log(batch))
        if bound:
            (below if bound == "low" else above).append(sizes[0 if bound == "low" else -1])
    result = interval(found, confidence).exponential()
    if below or above:
        result = Interval(None, None, None, len(found))
    return Critical(result, tuple(below), tuple(above))


def _region(fall: Interval) -> str:
    """The region that holds the whole interval of a fall; empty if there is no fall."""
    if fall.mean is None:
        return ""
    if fall.low is None or fall.high is None:
        return UNDECIDED
    low, high = math.log2(fall.low), math.log2(fall.high)
    if low >= PERFECT:
        return "perfect scaling"
    if high < MAXIMUM:
        return "maximum"
    return "diminishing returns" if low >= MAXIMUM and high < PERFECT else UNDECIDED


def steps_text(steps: StepsToTarget, setup: Setup) -> str:
    """The steps to the target of an arm in words."""
    of_arm = f"{steps.name}: " if steps.name else ""
    if not (steps.measured or any(steps.early)):
        return f"{of_arm}no repetition reached the target of {setup.metric}"
    parts = [
        f"{region} from {number(first)} to {number(last)}"
        for region, first, last in _stretches(steps)
    ]
    none = "no two neighbouring batches with the steps of the same seed"
    text = f"{of_arm}steps to the target: {', '.join(parts) or none}"
    if critical := critical_text(steps):
        text += f", critical batch {critical}"
    for words, counts in (
        ("reached before the first evaluation", steps.early),
        ("repetitions that did not reach it", steps.missed),
    ):
        at = [
            f"{number(batch)} ({count})"
            for batch, count in zip(steps.batches, counts, strict=True)
            if count
        ]
        text += f"; {words} at {', '.join(at)}" if at else ""
    return text


def critical_text(steps: StepsToTarget) -> str:
    """The critical batch with its interval, or the side on which it lies; empty if unknown."""
    found, below, above = steps.critical
    sides = []
    for side, batches in (
        (f"far below {number(max(below, default=0.0))}", below),
        (f"far above {number(min(above, default=0.0))}", above),
    ):
        of_seeds = (
            "" if len(batches) == found.seeds else f" in {len(batches)} of {found.seeds} seeds"
        )
        sides += [f"{side}{of_seeds}"] if batches else []
    if sides or found.mean is None:
        return " and ".join(sides)
    if not found.known:
        return f"{rounded(found.mean)} (no interval: {counted(found.seeds, 'seed')})"
    return f"{rounded(found.mean)} [{rounded(found.low)}, {rounded(found.high)}]"


def _stretches(steps: StepsToTarget) -> list[tuple[str, float, float]]:
    """The region, first and last batch of each unbroken stretch of one region, in order."""
    found: list[tuple[str, float, float]] = []
    for (first, last), region in zip(
        itertools.pairwise(steps.batches), steps.regions[1:], strict=True
    ):
        if found and found[-1][0] == region and found[-1][2] == first:
            found[-1] = (region, found[-1][1], last)
        elif region:
            found.append((region, first, last))
    return found


def table(steps: StepsToTarget) -> dict[float, tuple[str, ...]]:
    """Cells of a table for each batch: steps with interval, then fall per doubling and region from
    the batch before.
    """
    rows: dict[float, tuple[str, ...]] = {}
    for place, batch in enumerate(steps.batches):
        found, fall = steps.steps[place], steps.falls[place]
        text = rounded(found.mean)
        if found.known:
            text += f" [{rounded(found.low)}, {rounded(found.high)}]"
        if steps.early[place]:
            text += f", {steps.early[place]} reached it before the first evaluation"
        if steps.missed[place]:
            text += f", {steps.missed[place]} did not reach it"
        ratio = UNKNOWN if fall.mean is None else f"÷ {fall.mean:.3g}"
        if fall.low is not None and fall.high is not None:
            ratio += f" [{fall.low:.3g}, {fall.high:.3g}]"
        rows[batch] = (text, ratio, steps.regions[place] or UNKNOWN)
    return rows


def steps_panels(steps: Sequence[StepsToTarget], setup: Setup, target: float) -> list[Panel]:
    """The axes of steps against batch, with perfect scaling dotted: one for each arm, with its
    regions, or one for all if there are many.

    Args:
        steps: of the arms.
        setup: of the study.
        target: value of the metric.
    """
    known = [each for each in steps if each.measured]
    if len(known) > _MOST_PANELS:
        return [_panel(known, setup, target)]
    return [_panel([each], setup, target) for each in known]


def _panel(arms: Sequence[StepsToTarget], setup: Setup, target: float) -> Panel:
    series, guides = [], []
    for place, arm in enumerate(arms):
        points = [
            (batch, found)
            for batch, found in zip(arm.batches, arm.steps, strict=True)
            if found.mean is not None
        ]
        x = tuple(batch for batch, _ in points)
        series.append(
            Series(
                arm.name or "measured",
                x,
                tuple(float(found.mean or 0.0) for _, found in points),
                tuple(found.low for _, found in points),
                tuple(found.high for _, found in points),
                look="both",
                style=place,
            )
        )
        first = float(points[0][1].mean or 0.0)
        label = "perfect scaling" if place == 0 else ""
        series.append(Series(label, x, tuple(first * x[0] / b for b in x), look="line", style=-1))
        of_arm = f" of {arm.name}" if arm.name and len(arms) > 1 else ""
        if arm.critical.batch.mean is not None:
            guides.append(Guide(f"critical batch{of_arm}", "x", arm.critical.batch.mean))
    sign = "≤" if setup.lower_is_better else "≥"
    return Panel(
        "global batch (samples, log scale)",
        f"updates to\n{setup.metric} {sign} {target:g}\n(log scale)",
        tuple(series),
        x_scale="log2",
        y_scale="log2",
        guides=tuple(guides),
        areas=_areas(arms[0]) if len(arms) == 1 else (),
    )


def _areas(steps: StepsToTarget) -> tuple[Area, ...]:
    """The stretches of batches whose region is known."""
    return tuple(
        Area(region, first, last, REGIONS.index(region))
        for region, first, last in _stretches(steps)
        if region != UNDECIDED
    )
