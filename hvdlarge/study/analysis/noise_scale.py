"""The analysis `noise_scale`: the measured gradient noise scale against the batch limit that was
found, and against the critical batch of the steps to a target.

Formula:  the noise scale of a repetition is the geometric mean of its measurements, each weighted
          by the updates since the one before. A ratio's interval goes from lower / upper to
          upper / lower end: it is wider than its confidence level asks for.
Source:   McCandlish et al., An Empirical Model of Large-Batch Training, arXiv:1812.06162: the noise
          scale predicts the critical batch, to within a factor that the model and task determine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdlarge.study.analysis.batch_limit import Limit, find_limits, limit_text
from hvdlarge.study.analysis.cells import CellResults
from hvdlarge.study.analysis.compare import missing_notes
from hvdlarge.study.analysis.finding import (
    UNKNOWN,
    Finding,
    interval_facts,
    listed,
    number,
    percent,
    rounded,
)
from hvdlarge.study.analysis.intervals import Interval, interval
from hvdlarge.study.analysis.plots import Guide, Panel, Plot, Series
from hvdlarge.study.analysis.sections import NoiseScale
from hvdlarge.study.analysis.target_steps import StepsToTarget, critical_text, measure_steps
from hvdlarge.study.results import Cell, Point, Setup

Cells = Mapping[Cell, CellResults]


@dataclass(frozen=True)
class ArmNoise:
    """The noise scale of one arm, beside its batch limit.

    Attributes:
        limit: of the arm.
        noise: of each batch, in samples (geometric mean over seeds).
        at: the batch whose noise scale is compared: the smallest with one; None if there is none.
        steps: to the target; None without one.
    """

    limit: Limit
    noise: tuple[Interval, ...]
    at: float | None
    steps: StepsToTarget | None

    @property
    def measured(self) -> Interval:
        """The noise scale that is compared."""
        if self.at is None:
            return Interval(None, None, None, 0)
        return self.noise[self.limit.batches.index(self.at)]

    @property
    def limit_ratio(self) -> Interval:
        """Batch limit over noise scale; without ends where either has none."""
        limit = self.limit
        if limit.void:
            return Interval(None, None, None, 0)
        ends = (limit.low, limit.high) if limit.known else (None, None)
        seeds = len(limit.cells[0].values)
        return _ratio(Interval(limit.estimate, *ends, seeds), self.measured)

    @property
    def critical_ratio(self) -> Interval:
        """Critical batch of the steps to the target over noise scale."""
        if self.steps is None:
            return Interval(None, None, None, 0)
        return _ratio(self.steps.critical.batch, self.measured)


def noise_scale(section: NoiseScale, setup: Setup, cells: Cells) -> Finding:
    """Compares the noise scale of each arm with its batch limit.

    Args:
        section: of the study file, checked.
        setup: of the study.
        cells: its results.
    """
    arms = [_arm(section, setup, limit) for limit in find_limits(section, setup, cells)]
    verdict = "; ".join(_text(each) for each in arms) or "no arm has two batches"
    notes = [
        "The noise scale grows during training: its mean over the whole run is compared, at the "
        "smallest batch that has one. It predicts the order of magnitude of the critical batch.",
        "The batch limit depends on the tolerance and on the number of epochs; the noise scale on "
        "neither.",
    ]
    unmeasured = [
        each.label for each in cells.values() if not any(r.noise for r in each.repetitions)
    ]
    if unmeasured:
        notes.append(f"Without a noise scale (log.noise_every_steps): {listed(unmeasured)}.")
    return Finding(
        "noise_scale",
        "Gradient noise scale and batch limit",
        f"Noise scale ({percent(section.confidence)}): {verdict}.",
        _table(arms),
        _plot(section, arms),
        notes + missing_notes(setup, cells),
        {"arms": [_facts(each) for each in arms]},
    )


def mean_noise(points: Sequence[Point]) -> float | None:
    """The noise scale of a run: a geometric mean over its updates; None without a positive one.

    Args:
        points: measurements in samples, in the order of the run. Those that are not positive, as
            estimates may be, are left out.
    """
    total = weights = 0.0
    before = 0
    for point in points:
        weight, before = max(point.step - before, 1), point.step
        if point.value > 0 and math.isfinite(point.value):
            total += weight * math.log(point.value)
            weights += weight
    return math.exp(total / weights) if weights else None


def _arm(section: NoiseScale, setup: Setup, limit: Limit) -> ArmNoise:
    noise = []
    for cell in limit.cells:
        found = [
            math.log(value)
            for run in cell.repetitions
            if run.number in cell.values and (value := mean_noise(run.noise)) is not None
        ]
        noise.append(interval(found, section.confidence).exponential())
    at = next(
        (b for b, found in zip(limit.batches, noise, strict=True) if found.mean is not None), None
    )
    steps = None
    if section.target is not None:
        steps = measure_steps(
            limit.name, limit.batches, limit.cells, setup, section.target, section.confidence
        )
    return ArmNoise(limit, tuple(noise), at, steps)


def _ratio(above: Interval, below: Interval) -> Interval:
    if above.mean is None or below.mean is None:
        return Interval(None, None, None, 0)
    seeds = min(above.seeds, below.seeds)
    ratio = above.mean / below.mean
    if above.low is None or above.high is None or below.low is None or below.high is None:
        return Interval(ratio, None, None, seeds)
    return Interval(ratio, above.low / below.high, above.high / below.low, seeds)


def _samples(found: Interval) -> str:
    if found.mean is None:
        return UNKNOWN
    if not found.known:
        return f"{rounded(found.mean)} (no interval)"
    return f"{rounded(found.mean)} [{rounded(found.low)}, {rounded(found.high)}]"


def _ratio_text(found: Interval) -> str:
    if found.mean is None:
        return UNKNOWN
    if found.low is None or found.high is None:
        return f"{found.mean:.2g} (no interval)"
    return f"{found.mean:.2g} [{found.low:.2g}, {found.high:.2g}]"


def _text(arm: ArmNoise) -> str:
    of_arm = f"{arm.limit.name}: " if arm.limit.name else ""
    if arm.at is None:
        return f"{of_arm}none was measured"
    text = f"{of_arm}{_samples(arm.measured)} samples at batch {number(arm.at)}"
    limit = arm.limit
    if limit.void:
        text += f", batch limit void: {listed(limit.void)}"
    else:
        text += f", batch limit {limit_text(limit) or 'not determined'}"
        if limit.estimate is not None:
            text += f", {_ratio_text(arm.limit_ratio)} times the noise scale"
    if arm.steps is not None and (critical := critical_text(arm.steps)):
        text += f", critical batch of the steps to the target {critical}"
        if arm.critical_ratio.mean is not None:
            text += f", {_ratio_text(arm.critical_ratio)} times the noise scale"
    return text


def _table(arms: Sequence[ArmNoise]) -> list[tuple[str, ...]]:
    with_steps = any(arm.steps is not None for arm in arms)
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        for batch, found in zip(arm.limit.batches, arm.noise, strict=True):
            row: tuple[str, ...] = (
                arm.limit.name or UNKNOWN,
                number(batch),
                _samples(found),
                f"{found.seeds}",
            )
            if batch != arm.at:
                row += ("", "")
                rows.append((*row, "", "") if with_steps else row)
                continue
            limit = arm.limit
            text = UNKNOWN if limit.estimate is None or limit.void else rounded(limit.estimate)
            row += ("void" if limit.void else text, _ratio_text(arm.limit_ratio))
            if with_steps:
                row += ((critical_text(arm.steps) if arm.steps else "") or UNKNOWN,)
                row += (_ratio_text(arm.critical_ratio),)
            rows.append(row)
    if not rows:
        return []
    heading: tuple[str, ...] = ("arm", "batch", "noise scale (samples)", "seeds")
    heading += ("batch limit", "limit / noise scale")
    heading += ("critical batch", "critical batch / noise scale") if with_steps else ()
    return [heading, *rows]


def _plot(section: NoiseScale, arms: Sequence[ArmNoise]) -> Plot | None:
    series, guides = [], []
    for place, arm in enumerate(arms):
        points = [
            (batch, found)
            for batch, found in zip(arm.limit.batches, arm.noise, strict=True)
            if found.mean is not None
        ]
        if not points:
            continue
        series.append(
            Series(
                arm.limit.name or "noise scale",
                tuple(batch for batch, _ in points),
                tuple(float(found.mean or 0.0) for _, found in points),
                tuple(found.low for _, found in points),
                tuple(found.high for _, found in points),
                look="both",
                style=place,
            )
        )
        of_arm = f" of {arm.limit.name}" if arm.limit.name else ""
        if arm.limit.estimate is not None and not arm.limit.void:
            guides.append(Guide(f"batch limit{of_arm}", "y", arm.limit.estimate))
        if arm.steps is not None and arm.steps.critical.batch.mean is not None:
            guides.append(Guide(f"critical batch{of_arm}", "y", arm.steps.critical.batch.mean))
    if not series:
        return None
    panel = Panel(
        "global batch (samples, log scale)",
        "samples (log scale)",
        tuple(series),
        x_scale="log2",
        y_scale="log2",
        guides=tuple(guides),
    )
    caption = (
        f"The gradient noise scale of each batch with {percent(section.confidence)} intervals, and "
        "the batch limits that were found as lines."
    )
    return Plot((panel,), caption)


def _facts(arm: ArmNoise) -> dict[str, Any]:
    return {
        "arm": arm.limit.name,
        "at": arm.at,
        "noise": [
            {"batch": batch, "noise": interval_facts(found)}
            for batch, found in zip(arm.limit.batches, arm.noise, strict=True)
        ],
        "measured": interval_facts(arm.measured),
        "limit": arm.limit.estimate,
        "limit_ratio": interval_facts(arm.limit_ratio),
        "critical_batch": None if arm.steps is None else interval_facts(arm.steps.critical.batch),
        "critical_ratio": interval_facts(arm.critical_ratio),
    }
