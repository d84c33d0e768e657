"""The steps to a value of the metric against the batch, with the regions of Shallue et al.

Formulas: steps to the target: where the straight line between the two evaluations around it reaches
          it. The fall per doubling between neighbouring batches is the mean over seeds of
          (S(B1) / S(B2))^(1 / log2(B2 / B1)), as a geometric mean: 2 is perfect scaling, 1 is no
          gain. Regions: perfect scaling from 2^0.8 = 1.74 on, maximum below 2^0.2 = 1.15, else
          diminishing returns. S = S_min · (1 + B_crit / B), fitted to the logarithms for each seed,
          has the slope B_crit / (B + B_crit): 0.8 at B_crit / 4, 0.2 at 4 · B_crit.
Source:   Shallue et al., Measuring the Effects of Data Parallelism on Neural Network Training,
          arXiv:1811.03600, section 4.1: the three regions; the two bounds are ours. McCandlish et
          al., An Empirical Model of Large-Batch Training, arXiv:1812.06162, equation 2.11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
PERFECT, MAXIMUM = 0.8, 0.2  # slopes of -log2(steps) against log2(batch)
_BEYOND = 64.0  # times the measured batches: a critical batch beyond it is not determined
_MOST_PANELS = 4  # arms with axes of their own
_MIN_BATCHES = 3  # for a fit of two parameters


@dataclass(frozen=True)
class StepsToTarget:
    """The steps to a target of one arm.

    Attributes:
        name: of the arm; empty if there is one.
        batches: of its cells, ascending, in samples.
        steps: mean over the seeds that reached it (geometric), of each batch, in updates.
        reached: the batches at which at least one repetition reached it.
        missed: repetitions of each batch that did not reach it, failed ones among them.
        falls: how much each batch divides the steps of the one before, per doubling; the first is
            without seeds.
        regions: of each batch: that of the step towards it; empty if unknown.
        critical: the critical batch of the fit, in samples (geometric mean).
        bound: `low` or `high` if the fits of all seeds lie at a bound: nothing bends.
    """

    name: str
    batches: tuple[float, ...]
    steps: tuple[Interval, ...]
    reached: tuple[float, ...]
    missed: tuple[int, ...]
    falls: tuple[Interval, ...]
    regions: tuple[str, ...]
    critical: Interval
    bound: str

    def facts(self) -> dict[str, Any]:
        """The numbers, as JSON has them."""
        return {
            "arm": self.name,
            "batches": list(self.batches),
            "steps": [interval_facts(each) for each in self.steps],
            "missed": list(self.missed),
            "falls_per_doubling": [interval_facts(each) for each in self.falls],
            "regions": list(self.regions),
            "critical_batch": interval_facts(self.critical),
            "bound": self.bound,
        }


def steps_to(run: RunResult, target: float, lower_is_better: bool) -> float | None:
    """The updates after which a run first reached a target, between its evaluations.

    Args:
        run: with the metric at its evaluations, as its curve.
        target: value of the metric.
        lower_is_better: whether at most that value is meant.

    Returns:
        None if it did not reach it. If the first evaluation has, its step: an upper bound.
    """
    sign = -1.0 if lower_is_better else 1.0
    before: tuple[float, float] | None = None
    for point in run.curve:
        if not math.isfinite(point.value):
            before = None
            continue
        missing = sign * (target - point.value)
        if missing <= 0:
            if before is None:
                return float(point.step)
            share = before[1] / (before[1] - missing)
            return before[0] + share * (point.step - before[0])
        before = (float(point.step), missing)
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
    missed = []
    for cell in cells:
        found = {
            run.number: math.log(steps)
            for run in cell.repetitions
            if run.number in cell.values
            and (steps := steps_to(run, target, setup.lower_is_better)) is not None
        }
        logs.append(found)
        missed.append(len(cell.repetitions) - len(found))
    falls, regions = [Interval(None, None, None, 0)], [""]
    for place in range(1, len(batches)):
        doublings = math.log2(batches[place] / batches[place - 1])
        before, after = logs[place - 1], logs[place]
        slopes = [(before[seed] - after[seed]) / doublings for seed in after if seed in before]
        falls.append(interval(slopes, confidence).exponential())
        slope = float(np.mean(slopes)) / math.log(2) if slopes else None
        regions.append("" if slope is None else _region(slope))
    critical, bound = _critical(batches, logs, confidence)
    return StepsToTarget(
        name,
        tuple(batches),
        tuple(interval([*each.values()], confidence).exponential() for each in logs),
        tuple(batch for batch, each in zip(batches, logs, strict=True) if each),
        tuple(missed),
        tuple(falls),
        tuple(regions),
        critical,
        bound,
    )


def fit_critical_batch(batches: Sequence[float], steps: Sequence[float]) -> float:
    """The critical batch of S = S_min · (1 + B_crit / B), by least squares in ln S.

    Args:
        batches: B, at least three, in samples.
        steps: S, in updates.

    Returns:
        B_crit in samples, between the smallest batch / 64 and the largest · 64.
    """
    sizes, logs = np.asarray(batches, dtype=np.float64), np.log(steps)

    low, high = math.log(sizes.min() / _BEYOND), math.log(sizes.max() * _BEYOND)
    while high - low > 1e-9:
        grid = np.linspace(low, high, 41)
        residuals = logs - np.log1p(np.exp(grid)[:, None] / sizes)
        best = int(np.argmin(np.var(residuals, axis=1)))  # ln S_min is the mean residual
        low, high = float(grid[max(0, best - 1)]), float(grid[min(40, best + 1)])
    return math.exp((low + high) / 2)


def _critical(
    batches: Sequence[float], logs: Sequence[dict[int, float]], confidence: float
) -> tuple[Interval, str]:
    """The critical batch over the seeds that reached the target at three batches or more."""
    found = []
    for seed in sorted({seed for each in logs for seed in each}):
        known = [
            (batch, math.exp(each[seed]))
            for batch, each in zip(batches, logs, strict=True)
            if seed in each
        ]
        if len(known) >= _MIN_BATCHES:
            sizes, steps = zip(*known, strict=True)
            found.append(math.log(fit_critical_batch(sizes, steps)))
    result = interval(found, confidence).exponential()
    if result.mean is None:
        return result, ""
    if result.mean > batches[-1] * _BEYOND / 2:
        return result, "high"
    return result, "low" if result.mean < batches[0] / _BEYOND * 2 else ""


def _region(slope: float) -> str:
    if slope >= PERFECT:
        return "perfect scaling"
    return "maximum" if slope < MAXIMUM else "diminishing returns"


def steps_text(steps: StepsToTarget, setup: Setup) -> str:
    """The steps to the target of an arm in words."""
    of_arm = f"{steps.name}: " if steps.name else ""
    if not steps.reached:
        return f"{of_arm}no repetition reached the target of {setup.metric}"
    parts = []
    for region in REGIONS:
        inside = [
            b for b, found in zip(steps.batches, steps.regions, strict=True) if found == region
        ]
        if region == "perfect scaling" and inside:
            parts.append(f"perfect scaling up to {number(_last_unbroken(steps))}")
        elif inside:
            parts.append(f"{region} at {_span(inside)}")
    text = f"{of_arm}steps to the target: {', '.join(parts) or 'one batch only'}"
    if steps.critical.mean is not None:
        text += f", critical batch {critical_text(steps)}"
    missed = [
        f"{number(batch)} ({count})"
        for batch, count in zip(steps.batches, steps.missed, strict=True)
        if count
    ]
    return text + (f"; repetitions that did not reach it at {', '.join(missed)}" if missed else "")


def critical_text(steps: StepsToTarget) -> str:
    """The critical batch with its interval, or the bound beyond which it lies."""
    found = steps.critical
    if steps.bound == "high":
        return f"far above {number(steps.batches[-1])}"
    if steps.bound == "low":
        return f"far below {number(steps.batches[0])}"
    if not found.known:
        return f"{rounded(found.mean)} (no interval: {counted(found.seeds, 'seed')})"
    return f"{rounded(found.mean)} [{rounded(found.low)}, {rounded(found.high)}]"


def _last_unbroken(steps: StepsToTarget) -> float:
    """The last batch towards which the scaling is perfect, from the smallest on."""
    last = next(
        b for b, r in zip(steps.batches, steps.regions, strict=True) if r == "perfect scaling"
    )
    started = False
    for batch, region in zip(steps.batches, steps.regions, strict=True):
        if region == "perfect scaling":
            last, started = batch, True
        elif started:
            break
    return last


def _span(batches: Sequence[float]) -> str:
    first, last = number(batches[0]), number(batches[-1])
    return first if first == last else f"{first} to {last}"


def table(steps: StepsToTarget) -> dict[float, tuple[str, ...]]:
    """Cells of a table for each batch: steps with interval, fall per doubling, region."""
    rows: dict[float, tuple[str, ...]] = {}
    for place, batch in enumerate(steps.batches):
        found, fall = steps.steps[place], steps.falls[place]
        text = rounded(found.mean)
        if found.known:
            text += f" [{rounded(found.low)}, {rounded(found.high)}]"
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
    known = [each for each in steps if each.reached]
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
        if arm.critical.mean is not None and not arm.bound:
            guides.append(Guide(f"critical batch{of_arm}", "x", arm.critical.mean))
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
    """The stretches between batches, by region; neighbours of one region are one stretch."""
    areas: list[Area] = []
    for place in range(1, len(steps.batches)):
        low, high, region = steps.batches[place - 1], steps.batches[place], steps.regions[place]
        if not region:
            continue
        if areas and areas[-1].label == region and areas[-1].high == low:
            areas[-1] = areas[-1]._replace(high=high)
        else:
            areas.append(Area(region, low, high, REGIONS.index(region)))
    return tuple(areas)
