"""The analysis `lr_range`: the range of a tuned key, mostly the learning rate, within which trials
come close to the best one of their cell.

The trials are where the search put them. The range is the unbroken stretch of good trials around
the best one. Between its lowest and highest trial it is certain (the minimum width); the next bad
trials on either side bound it (the maximum width). Beyond the last trial of a side nothing is
known, and the range is unbounded there. Ranges are compared only where the best trials are about as
good: an arm that stays at chance at any rate has a wide range of equally bad ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdlarge.study.analysis.cells import CellResults, groups, label_of, value_of
from hvdlarge.study.analysis.finding import UNKNOWN, Finding, counted, listed, number
from hvdlarge.study.analysis.plots import Panel, Plot, Scale, Series
from hvdlarge.study.analysis.sections import LrRange
from hvdlarge.study.analysis.verdicts import group_places
from hvdlarge.study.results import Cell, RunResult, Setup

_MIN_TRIALS = 3
_MOST_WORSE = 2  # arms that are named
_MOST_CURVES = 8  # in a panel; more have one for each group
_MOST_NAMED = 4  # ranges; of more the verdict has the widest

Cells = Mapping[Cell, CellResults]


@dataclass(frozen=True)
class GoodRange:
    """The good range of a key in a cell.

    Attributes:
        label: of the cell.
        cell: of the study.
        best: value of the metric of the best trial.
        low: the lowest value of the key in the unbroken stretch of good trials around the best.
        high: the highest.
        below: the nearest value with a bad trial below `low`; None: unbounded.
        above: the nearest above `high`; None: unbounded.
        good: number of good trials in the stretch.
        isolated: good trials outside of it, with a bad one between.
        failed: trials without a result, also those stopped early as hopeless; they count as bad.
        trials: that have ended.
        log: whether the key is searched on a log scale.
    """

    label: str
    cell: Cell
    best: float
    low: float
    high: float
    below: float | None
    above: float | None
    good: int
    isolated: int
    failed: int
    trials: int
    log: bool

    @property
    def minimum_width(self) -> float:
        """Width between the good trials: in decades on a log scale, else in the key's unit."""
        return self._width(self.low, self.high)

    @property
    def maximum_width(self) -> float | None:
        """Width between the next bad trials; None if it is unbounded."""
        if self.below is None or self.above is None:
            return None
        return self._width(self.below, self.above)

    def _width(self, low: float, high: float) -> float:
        return math.log10(high / low) if self.log else high - low

    def width_text(self) -> str:
        """The minimum and the maximum width, with the unit."""
        unit = " decades" if self.log else ""
        if self.maximum_width is None:
            ends = [
                name for name, at in (("below", self.below), ("above", self.above)) if at is None
            ]
            return f"at least {self.minimum_width:.2f}{unit}, unbounded {' and '.join(ends)}"
        return f"{self.minimum_width:.2f} to {self.maximum_width:.2f}{unit}"


def lr_range(section: LrRange, setup: Setup, cells: Cells) -> Finding:
    """The good range of a key in each cell that is tuned over it.

    Args:
        section: of the study file, checked.
        setup: of the study.
        cells: its results.
    """
    tuned = {c: each for c, each in cells.items() if section.key in setup.ranges.get(c, {})}
    ranges = [found for each in tuned.values() if (found := _range(section, setup, each))]
    notes = [
        f"A trial is good if its {setup.metric} is within {section.within:g} of the best one of "
        "its cell. A range is the unbroken stretch of good trials around the best: its minimum "
        "width is that between good trials, its maximum width that between the next bad ones. All "
        "trials have the same seed: there is no interval over seeds.",
    ]
    if any(len(setup.ranges[cell]) > 1 for cell in tuned):
        notes.append(
            "Other keys are tuned as well: a value counts as good if any trial with it is good, "
            "and a bad trial may be bad because of another key."
        )
    missing = [each.label for each in tuned.values() if each.label not in {r.label for r in ranges}]
    if missing:
        notes.append(f"Fewer than {_MIN_TRIALS} trials or none finished: {listed(missing)}.")
    others = [each.label for cell, each in cells.items() if cell not in tuned]
    if others:
        notes.append(f"Not tuned over {section.key} themselves: {listed(others)}.")
    short = [each for each in tuned.values() if len(each.trials) < setup.trials]
    if short:
        names = listed([f"{e.label} ({len(e.trials)} of {setup.trials})" for e in short])
        notes.append(f"Trials that have not ended yet: {names}.")
    return Finding(
        "lr_range",
        f"Range of {section.key} within {section.within:g} of the best {setup.metric}",
        _verdict(section, setup, ranges),
        _table(section, ranges),
        _plot(section, setup, tuned, ranges),
        notes,
        {"ranges": [_facts(each) for each in ranges]},
    )


def _key_of(run: RunResult, key: str) -> float | None:
    value = run.settings.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _trials(key: str, cell: CellResults) -> list[tuple[float, float | None]]:
    """The values of the key and the results of trials; None: without a result.

    Trials that were stopped early as hopeless count as bad: they fell behind the others.
    """
    found = [(_key_of(run, key), value_of(run)) for run in cell.trials]
    return sorted(
        ((where, value) for where, value in found if where is not None), key=lambda each: each[0]
    )


def _range(section: LrRange, setup: Setup, cell: CellResults) -> GoodRange | None:
    searched = setup.ranges[cell.cell][section.key]
    log = searched.log and searched.low > 0
    trials = [each for each in _trials(section.key, cell) if not log or each[0] > 0]
    finished = [value for _, value in trials if value is not None]
    if len(trials) < _MIN_TRIALS or not finished:
        return None
    sign = -1.0 if setup.lower_is_better else 1.0
    best = sign * max(sign * value for value in finished)
    slack = 1e-9 * max(1.0, abs(best))
    good = [
        where
        for where, value in trials
        if value is not None and sign * (best - value) <= section.within + slack
    ]
    all_good = set(good)
    # A value with a bad trial too, as of another key, is good if any trial with it is
    places = sorted({where for where, _ in trials})
    start = end = places.index(next(where for where, value in trials if value == best))
    while start > 0 and places[start - 1] in all_good:
        start -= 1
    while end < len(places) - 1 and places[end + 1] in all_good:
        end += 1
    low, high = places[start], places[end]
    inside = sum(low <= where <= high for where in good)
    return GoodRange(
        cell.label,
        cell.cell,
        best,
        low,
        high,
        places[start - 1] if start > 0 else None,
        places[end + 1] if end < len(places) - 1 else None,
        inside,
        len(good) - inside,
        sum(value is None for _, value in trials),
        len(trials),
        log,
    )


def _grouped(
    section: LrRange, setup: Setup, ranges: Sequence[GoodRange]
) -> tuple[list[tuple[str, list[GoodRange]]], list[str], list[str]]:
    """The ranges that are compared with each other, under a name of what they have in common; the
    factors whose levels are apart, and the others.
    """
    separately = section.separately
    if separately is None:
        separately = [
            factor
            for factor, levels in setup.factors.items()
            if all(level.value is not None for level in levels)
        ]
    by = [factor for factor in setup.factors if factor not in separately]
    found = {each.cell: each for each in ranges}
    named = [
        (label_of(setup, group[0], by), inside)
        for group in groups(setup, by).values()
        if (inside := [found[cell] for cell in group if cell in found])
    ]
    return named, separately, by


def _verdict(section: LrRange, setup: Setup, ranges: Sequence[GoodRange]) -> str:
    if not ranges:
        return f"No cell has {_MIN_TRIALS} trials with a result: no range."
    groups_of_ranges, separately, by = _grouped(section, setup, ranges)
    single, all_named = len(groups_of_ranges) == 1, len(ranges) <= _MOST_NAMED
    texts = []
    places = group_places([name for name, _ in groups_of_ranges])
    for place, (_, inside) in zip(places, groups_of_ranges, strict=True):
        names = {e.cell: label_of(setup, e.cell, separately if by else ()) for e in inside}
        of_group = f"At {place}: " if by and not single else ""
        texts.append(of_group + _group_text(section, setup, inside, names, all_named))
    joined = (". " if by else "; ").join(texts)
    return f"Range of {section.key} (one seed){': ' if single or not by else '. '}{joined}."


def _group_text(
    section: LrRange,
    setup: Setup,
    ranges: Sequence[GoodRange],
    names: Mapping[Cell, str],
    all_named: bool,
) -> str:
    """The ranges of one group in words, with the widest of those that are about as good."""
    sign = -1.0 if setup.lower_is_better else 1.0
    best = max(sign * each.best for each in ranges)
    slack = 1e-9 * max(1.0, abs(best))
    equal = [each for each in ranges if best - sign * each.best <= section.within + slack]
    widest = max(equal, key=lambda each: each.minimum_width)
    parts = [_range_text(each, names) for each in ranges] if all_named else []
    others = [each for each in equal if each is not widest]
    surely = [
        each
        for each in others
        if each.maximum_width is not None and each.maximum_width < widest.minimum_width
    ]
    name = names[widest.cell] if all_named else _range_text(widest, names)
    if len({each.log for each in ranges}) > 1:
        parts.append("not compared, as not all are on a log scale")
    elif others and len(surely) == len(others):
        parts.append(f"{name} widest" + ("" if len(others) == 1 else f" of {len(equal)}"))
    elif surely:
        parts.append(f"{name} wider than {listed([names[each.cell] for each in surely], 3)}")
    elif others:
        parts.append(f"widest undecided: {listed([names[each.cell] for each in equal], 3)}")
    elif not all_named:
        parts.append(name)
    worse = [f"{names[e.cell]} ({number(e.best)})" for e in ranges if e not in equal]
    if worse:
        few = listed(worse) if len(worse) <= _MOST_WORSE else f"{len(worse)} arms"
        parts.append(f"not compared, worse at best: {few}")
    return "; ".join(parts)


def _range_text(found: GoodRange, names: Mapping[Cell, str]) -> str:
    ends = f"{number(found.low)} to {number(found.high)}"
    return f"{names[found.cell]} {ends} ({found.width_text()}, best {number(found.best)})"


def _table(section: LrRange, ranges: Sequence[GoodRange]) -> list[tuple[str, ...]]:
    if not ranges:
        return []
    rows: list[tuple[str, ...]] = [
        ("cell", "best trial", f"lowest good {section.key}", "highest good", "next bad below")
        + ("next bad above", "width", "good trials", "isolated good trials", "without a result")
    ]
    for each in ranges:
        rows.append(
            (each.label, number(each.best), number(each.low), number(each.high))
            + ("unbounded" if each.below is None else number(each.below),)
            + ("unbounded" if each.above is None else number(each.above),)
            + (each.width_text(), f"{each.good} of {each.trials}")
            + (f"{each.isolated}" if each.isolated else UNKNOWN,)
            + (f"{each.failed}" if each.failed else UNKNOWN,)
        )
    return rows


def _plot(section: LrRange, setup: Setup, tuned: Cells, ranges: Sequence[GoodRange]) -> Plot | None:
    if not ranges:
        return None
    scale: Scale = "log" if all(each.log for each in ranges) else "linear"
    unit = f"{section.key}{' (log scale)' if scale == 'log' else ''}"
    panels: list[Panel] = []
    rows: list[Series] = []
    names: list[str] = []
    together, separately, by = _grouped(section, setup, ranges)
    apart = len(ranges) > _MOST_CURVES and len(together) > 1 and bool(by)
    for title, group in together if apart else [("", ranges)]:
        curves = []
        for look, found in enumerate(group):
            label = label_of(setup, found.cell, separately if apart else ())
            curves.append(_curve(section, setup, tuned, found)._replace(label=label, style=look))
            centre = (found.low * found.high) ** 0.5 if found.log else (found.low + found.high) / 2
            row = float(len(rows))
            rows.append(Series("", (centre,), (row,), (found.low,), (found.high,), style=look))
            names.append(found.label)
        panels.append(Panel(unit, setup.metric, tuple(curves), x_scale=scale, title=title))
    panels.append(Panel(unit, "", tuple(rows), x_scale=scale, names=tuple(names)))
    caption = (
        "The finished trials of each cell, and the stretch of good ones around its best "
        f"({counted(sum(each.failed for each in ranges), 'trial')} without a result not drawn)."
    )
    return Plot(tuple(panels), caption)


def _curve(section: LrRange, setup: Setup, tuned: Cells, found: GoodRange) -> Series:
    points = [
        (where, value)
        for where, value in _trials(section.key, tuned[found.cell])
        if value is not None and (not found.log or where > 0)
    ]
    return Series(
        found.label,
        tuple(where for where, _ in points),
        tuple(value for _, value in points),
        look="both" if len(setup.ranges[found.cell]) == 1 else "points",
    )


def _facts(found: GoodRange) -> dict[str, Any]:
    facts: dict[str, Any] = {
        name: getattr(found, name)
        for name in ("best", "low", "high", "below", "above", "good", "isolated", "failed")
    }
    return facts | {
        "cell": list(found.cell),
        "trials": found.trials,
        "log": found.log,
        "minimum_width": found.minimum_width,
        "maximum_width": found.maximum_width,
    }
