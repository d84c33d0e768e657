"""The analysis `batch_limit`: the largest batch whose tuned result is within a tolerance of the
tuned result of the smallest, at a fixed number of epochs.

Formula:  the batches are tested upwards from the baseline against a loss of exactly the tolerance;
          the limit that is shown is the last one before the first that cannot be shown to be
          within. In such a fixed sequence no correction for several comparisons is needed. Between
          two batches the gain of each seed is interpolated linearly in ln(batch); the estimated
          limit is where the mean gain falls to minus the tolerance, and its interval holds the
          batches at which a loss of exactly the tolerance is not rejected.
Source:   Maurer, Hothorn, Lehmacher, Multiple comparisons in drug clinical trials (1995): fixed
          sequences. Fieller, Some problems in interval estimation (1954): the interval of a root by
          inversion of a test.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hvdlarge.study.analysis.cells import CellResults, edge_sentence, groups, level_of
from hvdlarge.study.analysis.compare import (
    edge_notes,
    group_name,
    missing_notes,
    repetitions_text,
    settings_text,
)
from hvdlarge.study.analysis.differences import Judgement, difference, judge
from hvdlarge.study.analysis.finding import (
    UNKNOWN,
    Finding,
    ends_text,
    listed,
    mean_text,
    number,
    percent,
    rounded,
)
from hvdlarge.study.analysis.intervals import p_value, seeds_needed
from hvdlarge.study.analysis.plots import Guide, Panel, Plot, Series
from hvdlarge.study.analysis.sections import BatchLimit, NoiseScale
from hvdlarge.study.analysis.target_steps import (
    StepsToTarget,
    measure_steps,
    steps_panels,
    steps_text,
)
from hvdlarge.study.analysis.target_steps import table as steps_table
from hvdlarge.study.analysis.verdicts import edges_text, failed_of
from hvdlarge.study.results import Cell, Setup

_POINTS = 33  # between two batches, where the limit is looked for
_SAME_EPOCHS = 0.02
_MOST_GUIDES = 3  # vertical lines of limits
_BATCH_AXIS = "global batch (samples, log scale)"
_OF_STEPS = ("steps to the target", "per doubling from the batch before", "its region")

Cells = Mapping[Cell, CellResults]


@dataclass(frozen=True)
class Limit:
    """The batch limit of one arm.

    Attributes:
        name: of the arm; empty if there is one.
        batches: of its cells from the baseline on, ascending, in samples.
        cells: their results.
        judged: each batch after the first against it.
        shown: the largest batch that is shown to be within tolerance, in an unbroken sequence from
            the baseline; None if the sequence cannot begin.
        excluded: the smallest batch that is shown to be beyond tolerance, or has failures; None if
            there is none.
        estimate: where the mean gain falls to minus the tolerance; None if it does not, or the
            batches on either side cannot be compared.
        low: lower end of its interval; None if not known.
        high: upper end; None if it is not below `reach`, or not known.
        known: whether the interval is known: there are enough seeds where its ends are.
        reach: the largest batch up to which the limit was looked for: the last with results that is
            not after one with failures.
        void: why the limit is void; empty if it is not.
    """

    name: str
    batches: tuple[float, ...]
    cells: tuple[CellResults, ...]
    judged: tuple[Judgement, ...]
    shown: float | None
    excluded: float | None
    estimate: float | None
    low: float | None
    high: float | None
    known: bool
    reach: float
    void: tuple[str, ...]

    @property
    def all_within(self) -> bool:
        """Whether even the largest batch is shown to be within tolerance."""
        return self.shown is not None and self.shown == self.batches[-1]


def batch_limit(section: BatchLimit, setup: Setup, cells: Cells) -> Finding:
    """Finds the batch limit of each arm, and the steps to a target if there is one.

    Args:
        section: of the study file, checked.
        setup: of the study.
        cells: its results.
    """
    limits = find_limits(section, setup, cells)
    steps: list[StepsToTarget] = []
    if section.target is not None:
        steps = [
            measure_steps(
                each.name, each.batches, each.cells, setup, section.target, section.confidence
            )
            for each in _all_batches(section, setup, cells)
        ]
    panels = _panels(section, setup, limits) if limits else []
    if any(each.measured for each in steps) and section.target is not None:
        panels += steps_panels(steps, setup, section.target)
    verdict = _verdict(section, setup, limits)
    verdict += "".join(f"; {steps_text(each, setup)}" for each in steps)
    return Finding(
        "batch_limit",
        f"Largest batch that loses at most {section.tolerance:g} of {setup.metric}",
        f"{verdict}.",
        _table(limits, steps),
        Plot(tuple(panels), _caption(section, any(panel.names for panel in panels), bool(steps)))
        if panels
        else None,
        _notes(section, setup, cells, limits),
        {
            "limits": [_facts(each) for each in limits],
            "steps": [each.facts() for each in steps],
        },
    )


def find_limits(section: BatchLimit | NoiseScale, setup: Setup, cells: Cells) -> list[Limit]:
    """The batch limit of each combination of the other factors' levels.

    Args:
        section: names the factor of batches, the tolerance and the baseline.
        setup: of the study.
        cells: its results.
    """
    limits = []
    for arm in _all_batches(section, setup, cells):
        start = 0
        if section.baseline is not None:
            if section.baseline not in arm.batches:
                continue
            start = arm.batches.index(section.baseline)
        if len(arm.batches) - start >= 2:
            limits.append(_limit(arm.name, arm.batches[start:], arm.cells[start:], section, setup))
    return limits


@dataclass(frozen=True)
class _Arm:
    name: str
    batches: tuple[float, ...]
    cells: tuple[CellResults, ...]


def _all_batches(section: BatchLimit | NoiseScale, setup: Setup, cells: Cells) -> list[_Arm]:
    arms = []
    for group in groups(setup, [section.batch]).values():
        sizes = {cell: level_of(setup, cell, section.batch).value or 0.0 for cell in group}
        ordered = sorted(group, key=sizes.__getitem__)
        name = group_name(setup, group, [section.batch])
        arms.append(
            _Arm(
                name,
                tuple(sizes[cell] for cell in ordered),
                tuple(cells[cell] for cell in ordered),
            )
        )
    return arms


def _limit(
    name: str,
    batches: Sequence[float],
    cells: Sequence[CellResults],
    section: BatchLimit | NoiseScale,
    setup: Setup,
) -> Limit:
    base = cells[0]
    # At tolerance 0 a loss of 0 is tested: the gain must be shown not to be negative
    tolerance = max(section.tolerance, 1e-300)
    found = [difference(setup, each, base, section.confidence, tolerance) for each in cells[1:]]
    judged = judge(found, section.confidence, corrected=False)
    shown = batches[0] if len(base.values) >= seeds_needed(section.confidence) else None
    excluded: float | None = None
    unbroken = shown is not None
    for batch, each in zip(batches[1:], judged, strict=True):
        unbroken = unbroken and bool(each.within)
        shown = batch if unbroken else shown
        if excluded is None and (each.beyond or each.difference.arm.failures):
            excluded = batch
    crossing = _crossing(batches, judged, tolerance, 1 - section.confidence)
    last = excluded if excluded is not None else batches[-1]
    void = (
        text
        for batch, each in zip(batches, cells, strict=True)
        if batch <= last and (text := edge_sentence(each))
    )
    return Limit(
        name,
        tuple(batches),
        tuple(cells),
        tuple(judged),
        shown,
        excluded,
        *crossing,
        tuple(dict.fromkeys(void)),
    )


class _Crossing(NamedTuple):
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    known: bool = False
    reach: float = 0.0


def _crossing(
    batches: Sequence[float], judged: Sequence[Judgement], tolerance: float, level: float
) -> _Crossing:
    """Where the mean gain first falls to minus the tolerance, with the ends of its interval.

    Batches without results are skipped; the first with failures ends the search. An end is known
    only if there are enough seeds at all batches before it.
    """
    estimate = low = high = None
    gap = False  # in the p-values, so far
    gains_of = _known_gains(batches, judged)
    for (first, before), (second, after) in itertools.pairwise(gains_of):
        seeds = [seed for seed in before if seed in after]
        ends = np.array([[before[seed] for seed in seeds], [after[seed] for seed in seeds]])
        for share in np.linspace(0, 1, _POINTS)[1:]:
            gains = (1 - share) * ends[0] + share * ends[1]
            batch = float(first * (second / first) ** share)
            above = bool(len(gains)) and float(gains.mean()) > -tolerance
            if (above and low is not None) or high is not None:
                continue  # nothing that could be found is left
            p = p_value([*gains], -tolerance, precise=False)
            gap = gap or p is None
            if gap or p is None:
                continue
            if low is None and not (above and p <= level):
                low = batch
            if high is None and not above and p <= level:
                high = batch
        if estimate is None and len(seeds) and ends[1].mean() < -tolerance:
            start, end = ends[0].mean(), ends[1].mean()
            share = min(1.0, max(0.0, (start + tolerance) / (start - end)))
            estimate = float(first * (second / first) ** share)
    if estimate is not None:  # it lies between the points at which p-values are taken
        low = min(low, estimate) if low is not None else None
        high = max(high, estimate) if high is not None else None
    known = low is not None and (high is not None or not gap)
    return _Crossing(estimate, low, high, known, gains_of[-1][0] if gains_of else batches[0])


def _known_gains(
    batches: Sequence[float], judged: Sequence[Judgement]
) -> list[tuple[float, dict[int, float]]]:
    """The gains of each seed at the batches that have any, up to the first with failures."""
    base = judged[0].difference.base
    if base.failures or not base.values:
        return []
    known = [(batches[0], dict.fromkeys(base.values, 0.0))]
    for batch, each in zip(batches[1:], judged, strict=True):
        if each.difference.arm.failures:
            break
        seeds = [seed for seed in each.difference.arm.values if seed in base.values]
        if seeds:
            known.append((batch, dict(zip(seeds, each.difference.gains, strict=True))))
    return known


def limit_text(limit: Limit) -> str:
    """The estimated limit with its interval, or what it is above; empty if nothing is known."""
    if limit.estimate is not None:
        if not limit.known:
            return f"{rounded(limit.estimate)} (no interval)"
        high = f"> {number(limit.reach)}" if limit.high is None else rounded(limit.high)
        return f"{rounded(limit.estimate)} [{rounded(limit.low)}, {high}]"
    if limit.all_within:
        return f"above {number(limit.batches[-1])}"
    above = max(limit.shown or 0.0, limit.low or 0.0)
    return f"above {rounded(above)}" if above > limit.batches[0] else ""


def _verdict(section: BatchLimit | NoiseScale, setup: Setup, limits: Sequence[Limit]) -> str:
    """The limits of all arms in words; void ones once, at the end."""
    if not limits:
        return "no arm has two batches"
    sound = [each for each in limits if not each.void]
    base = number(limits[0].batches[0])
    same = len({each.batches[0] for each in limits}) == 1
    of_batch = f"batch {base}" if same else "the smallest batch"
    head = f"Limit within {section.tolerance:g} of {of_batch} ({percent(section.confidence)})"
    if len(limits) == 1 and sound:
        return f"{head}: {_single_text(sound[0], section)}"
    texts = []
    beyond = [each for each in sound if each.all_within and not each.cells[0].failures]
    for largest in dict.fromkeys(each.batches[-1] for each in beyond):
        names = [each.name for each in beyond if each.batches[-1] == largest]
        texts.append(f"above {number(largest)} for {listed(names, len(names))}")
    hindered: dict[str, list[str]] = {}
    for each in sound:
        hindrance = _hindrance(each, section)
        if hindrance:
            hindered.setdefault(hindrance, []).append(each.name)
        elif each not in beyond:
            texts.append(_arm_text(each))
    texts += [f"{listed(names, len(names))}: {why}" for why, names in hindered.items()]
    if void := [each for each in limits if each.void]:
        cells = [cell for each in void for cell in _void_cells(each)]
        texts.append(f"void: {edges_text(setup, cells)}")
        failed = [cell for each in void for cell in each.cells if cell.failures]
        if failed:
            names = [f"{cell.label} ({failed_of(cell)})" for cell in failed]
            texts.append(f"failed: {listed(names, len(names))}")
    return f"{head}: {'; '.join(texts)}"


def _void_cells(limit: Limit) -> list[CellResults]:
    return [cell for cell in limit.cells if edge_sentence(cell) in limit.void]


def _hindrance(limit: Limit, section: BatchLimit | NoiseScale) -> str:
    """Why an arm has no limit, if it is because of its baseline; else empty."""
    reference, base = limit.cells[0], number(limit.batches[0])
    ended = len(reference.repetitions)
    if not ended:
        return f"no repetition of batch {base}, the baseline, yet"
    if not reference.values:
        return f"all {ended} repetitions of batch {base}, the baseline, failed"
    failed = ""
    if reference.failures:
        failed = (
            f"{reference.failures} of {ended} repetitions of batch {base}, the baseline, failed"
        )
    if limit.all_within:
        return f"above {number(limit.batches[-1])}, but {failed}" if failed else ""
    if failed:
        return failed
    if limit.shown is None:
        needed = seeds_needed(section.confidence)
        guess = f"{limit_text(limit)}, " if limit.estimate is not None else ""
        return f"{guess}undecided, as batch {base} has {len(reference.values)} of {needed} seeds"
    return ""


def _arm_text(limit: Limit) -> str:
    """The limit of one arm of several, with its name before it."""
    failed = _failed_text(limit)
    none = f"not shown to be above {number(limit.batches[0])}" if failed else "undecided"
    text = limit_text(limit) or none
    return f"{limit.name} {text}{f', {failed}' if failed else ''}"


def _failed_text(limit: Limit) -> str:
    """The failed repetitions of batches after the baseline."""
    return ", ".join(
        f"{cell.failures} of {len(cell.repetitions)} failed at {number(batch)}"
        for batch, cell in zip(limit.batches[1:], limit.cells[1:], strict=True)
        if cell.failures
    )


def _single_text(limit: Limit, section: BatchLimit | NoiseScale) -> str:
    """The limit of the only arm, with the batches that are shown to be within and beyond."""
    if hindrance := _hindrance(limit, section):
        return hindrance
    if limit.all_within:
        return f"all batches are within it, up to {number(limit.batches[-1])}"
    if limit.shown == limit.batches[0]:
        text = "no larger batch is shown to be within it"
    else:
        text = f"batches up to {number(limit.shown)} are shown to be within it"
    if limit.excluded is None:
        text += f", none up to {number(limit.batches[-1])} is shown not to be"
    else:
        text += f", {number(limit.excluded)} is not"
    failed = _failed_text(limit)
    estimate = f"{limit_text(limit)}; " if limit.estimate is not None else ""
    return f"{estimate}{text}{f' ({failed})' if failed else ''}"


def _table(limits: Sequence[Limit], steps: Sequence[StepsToTarget]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    steps_of = {each.name: each for each in steps}
    for limit in limits:
        extra = steps_table(steps_of[limit.name]) if limit.name in steps_of else {}
        for place, (batch, cell) in enumerate(zip(limit.batches, limit.cells, strict=True)):
            row: tuple[str, ...] = (
                limit.name or UNKNOWN,
                number(batch),
                settings_text(cell) or UNKNOWN,
            )
            row += (repetitions_text(cell), number(cell.mean))
            if place == 0:
                row += (UNKNOWN, UNKNOWN, "baseline")
            else:
                judged = limit.judged[place - 1]
                gain = judged.difference.gain
                row += (mean_text(gain, True), ends_text(gain, True), judged.outcome)
            rows.append((*row, *extra.get(batch, ())))
    if not rows:
        return []
    heading: tuple[str, ...] = ("arm", "batch", "best settings", "repetitions", "mean")
    heading += ("gain", "interval of the gain", "outcome")
    heading += _OF_STEPS if steps else ()
    return [heading, *(row + (UNKNOWN,) * (len(heading) - len(row)) for row in rows)]


def _panels(section: BatchLimit, setup: Setup, limits: Sequence[Limit]) -> list[Panel]:
    """The gains with the estimated limits; those of many arms in a panel of their own."""
    series, guides = [], [Guide("tolerance", "y", -section.tolerance)]
    for number_, limit in enumerate(limits):
        points: list[tuple[float, float, float | None, float | None]] = []
        if limit.cells[0].values:
            points.append((limit.batches[0], 0.0, None, None))
        for batch, each in zip(limit.batches[1:], limit.judged, strict=True):
            gain = each.difference.gain
            if gain.mean is not None:
                points.append((batch, gain.mean, gain.low, gain.high))
        series.append(
            Series(
                limit.name or "gain",
                tuple(point[0] for point in points),
                tuple(point[1] for point in points),
                tuple(point[2] for point in points),
                tuple(point[3] for point in points),
                look="both",
                style=number_,
            )
        )
    estimated = [
        (look, limit, limit.estimate)
        for look, limit in enumerate(limits)
        if limit.estimate is not None and not limit.void
    ]
    if len(estimated) <= _MOST_GUIDES:
        for _, limit, estimate in estimated:
            of_arm = f" of {limit.name}" if limit.name else ""
            guides.append(Guide(f"estimated limit{of_arm}", "x", estimate))
    gains = Panel(
        _BATCH_AXIS,
        f"gain in {setup.metric}\nover the baseline",
        tuple(series),
        x_scale="log2",
        guides=tuple(guides),
    )
    return [gains] if len(estimated) <= _MOST_GUIDES else [gains, _limits_panel(estimated)]


def _limits_panel(estimated: Sequence[tuple[int, Limit, float]]) -> Panel:
    """The limit of each arm, in samples, with its interval; drawn as the arm's gains are."""
    series = tuple(
        Series("", (estimate,), (float(row),), (limit.low,), (limit.high,), style=look)
        for row, (look, limit, estimate) in enumerate(estimated)
    )
    names = tuple(limit.name for _, limit, _ in estimated)
    return Panel(f"estimated limit: {_BATCH_AXIS}", "", series, x_scale="log2", names=names)


def _caption(section: BatchLimit, with_limits: bool, with_steps: bool) -> str:
    text = (
        f"Gains over the baseline, paired by seed, with {percent(section.confidence)} intervals; "
        "positive is better. A batch is within tolerance if its interval lies above the line."
    )
    if with_limits:
        text += " Then the estimated limits with their intervals."
    if with_steps:
        text += " Below, the steps to the target; dotted: half the steps for twice the batch."
    return text


def _notes(section: BatchLimit, setup: Setup, cells: Cells, limits: Sequence[Limit]) -> list[str]:
    notes = [
        "Batches are tested upwards from the baseline until one cannot be shown to be within "
        "tolerance; in this order no correction for several comparisons of an arm is needed. "
        "There is none for several arms: each limit has its own confidence."
    ]
    for limit in limits:
        of_arm = f"{limit.name}: " if limit.name else ""
        again = [
            number(batch)
            for batch, each in zip(limit.batches[1:], limit.judged, strict=True)
            if each.within and limit.shown is not None and batch > limit.shown
        ]
        if again:
            notes.append(
                f"{of_arm}above {number(limit.shown)}, {listed(again)} would be within tolerance, "
                "but a batch between is not shown to be."
            )
        epochs = {
            round(run.epochs, 6)
            for cell in limit.cells
            for run in cell.repetitions
            if run.state == "finished" and run.epochs
        }
        if epochs and max(epochs) > (1 + _SAME_EPOCHS) * min(epochs):
            notes.append(
                f"{of_arm}the runs do not have the same number of epochs, but "
                f"{min(epochs):.4g} to {max(epochs):.4g}: this is no limit at fixed epochs."
            )
    names = {each.name for each in limits}
    left_out = [
        each.name or setup.name
        for each in _all_batches(section, setup, cells)
        if each.name not in names
    ]
    if left_out:
        named = listed(left_out, len(left_out))
        notes.append(f"Without the baseline or a batch above it: {named}.")
    notes += edge_notes(cells.values())
    if section.target is not None:
        notes.append(
            "Settings are those tuned for the result at the end, not for the fewest steps to the "
            "target, as Shallue et al. tuned them."
        )
    return notes + missing_notes(setup, cells)


def _facts(limit: Limit) -> dict[str, Any]:
    return {
        "arm": limit.name,
        "batches": list(limit.batches),
        "shown": limit.shown,
        "excluded": limit.excluded,
        "all_within": limit.all_within,
        "estimate": limit.estimate,
        "low": limit.low,
        "high": limit.high,
        "known": limit.known,
        "void": list(limit.void),
        "comparisons": [each.facts() for each in limit.judged],
    }
