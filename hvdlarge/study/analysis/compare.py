"""The analysis `compare`: the mean of each cell with its interval and best settings, and the
differences between arms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hvdlarge.study.analysis.cells import (
    CellResults,
    better,
    edge_sentence,
    groups,
    label_of,
)
from hvdlarge.study.analysis.differences import Judgement, difference, judge
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
)
from hvdlarge.study.analysis.intervals import Interval, interval, many_comparisons, seeds_needed
from hvdlarge.study.analysis.plots import Panel, Plot, Series
from hvdlarge.study.analysis.sections import Compare, is_level
from hvdlarge.study.analysis.verdicts import Compared, comparison_verdict, short_names
from hvdlarge.study.results import Cell, Setup

_MOST_IN_VERDICT = 4
_MOST_SETTINGS = 80  # characters

Cells = Mapping[Cell, CellResults]


def compare(section: Compare, setup: Setup, cells: Cells) -> Finding:
    """Compares the arms of a study, at each level of the other factors.

    Args:
        section: of the study file, checked.
        setup: of the study.
        cells: its results.
    """
    arms = _factors_of_arms(section, setup)
    found = [_group(section, setup, cells, group, arms) for group in groups(setup, arms).values()]
    comparisons = sum(each.comparisons for each in found)
    compared = _judged(section, setup, found, comparisons)
    judged = [each for group in compared for each in group.judged]
    means = {
        cell: interval([*each.values.values()], section.confidence) for cell, each in cells.items()
    }
    return Finding(
        "compare",
        _title(section, setup, arms),
        _verdict(section, setup, cells, means, compared),
        _table(cells, means, judged),
        _plot(section, setup, cells, means),
        _notes(section, setup, cells, judged, found),
        {
            "cells": {each.label: _cell_facts(each, means[cell]) for cell, each in cells.items()},
            "comparisons": [each.facts() for each in judged],
            "compared": comparisons,
        },
    )


class _Group(NamedTuple):
    """Arms that are compared with each other, before any comparison."""

    name: str
    reference: CellResults | None  # None: the baseline is not there, or nothing has ended
    others: list[CellResults]
    comparisons: int  # that count


def settings_text(results: CellResults) -> str:
    """The tuned keys of a cell with their values."""
    text = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in results.settings.items()
    )
    return text if len(text) <= _MOST_SETTINGS else f"{text[: _MOST_SETTINGS - 1]}…"


def repetitions_text(results: CellResults) -> str:
    """How many repetitions finished, and how many did not."""
    finished = f"{len(results.values)}"
    return f"{finished}, {results.failures} failed" if results.failures else finished


def _factors_of_arms(section: Compare, setup: Setup) -> list[str]:
    if section.by is not None:
        return [section.by] if isinstance(section.by, str) else list(section.by)
    if section.baseline is not None:
        return [factor for factor in setup.factors if factor in section.baseline]
    return [factor for factor in setup.factors if factor not in section.within]


def _group(
    section: Compare, setup: Setup, cells: Cells, group: Sequence[Cell], arms: Sequence[str]
) -> _Group:
    """A group's reference and its other arms, with the comparisons that count."""
    candidates = [cells[cell] for cell in group]
    if section.baseline is not None:
        baseline = section.baseline
        reference = next((c for c in candidates if _is_baseline(baseline, setup, c.cell)), None)
        count = len(candidates) - 1
    else:
        reference = _best(setup, candidates)
        count = len(candidates) * (len(candidates) - 1) // 2  # the best was chosen by its result
    others = [each for each in candidates if each is not reference]
    return _Group(
        group_name(setup, group, arms), reference, others, count if reference is not None else 0
    )


def _judged(
    section: Compare, setup: Setup, found: Sequence[_Group], comparisons: int
) -> list[Compared]:
    """The groups that have comparisons, all of them judged together."""
    precise = many_comparisons(comparisons, section.confidence)
    options = section.confidence, section.tolerance, precise
    compared = [(each, each.reference) for each in found if each.others and each.reference]
    pairs = [
        difference(setup, arm, reference, *options)
        for group, reference in compared
        for arm in group.others
    ]
    judged = iter(judge(pairs, section.confidence, comparisons))
    return [
        Compared(
            group.name if len(found) > 1 else "",
            reference,
            tuple(itertools.islice(judged, len(group.others))),
            short_names(setup, [reference.cell, *(arm.cell for arm in group.others)]),
        )
        for group, reference in compared
    ]


def _title(section: Compare, setup: Setup, arms: Sequence[str]) -> str:
    if not arms:
        return "Results"
    reference = "the best mean"
    if section.baseline is not None:
        reference = _baseline_name(section.baseline, setup)
    rest = [factor for factor in setup.factors if factor not in arms]
    at_each = f", at each {listed(rest)}" if rest else ""
    return f"{listed(arms)} against {reference}{at_each}"


def _baseline_name(baseline: Mapping[str, str | int | float], setup: Setup) -> str:
    without = [factor for factor in setup.factors if factor not in baseline]
    cell = next((cell for cell in setup.cells if _is_baseline(baseline, setup, cell)), None)
    if cell is None:
        return ", ".join(f"{level}" for level in baseline.values())
    return label_of(setup, cell, without)


def _is_baseline(baseline: Mapping[str, str | int | float], setup: Setup, cell: Cell) -> bool:
    return all(
        any(is_level(baseline[factor], level) and level.label == label for level in levels)
        for (factor, levels), label in zip(setup.factors.items(), cell, strict=True)
        if factor in baseline
    )


def _best(setup: Setup, candidates: Sequence[CellResults]) -> CellResults | None:
    """The best mean among cells without failures, else among all; the first of equal ones."""
    clean = [each for each in candidates if each.values and not each.failures]
    best: CellResults | None = None
    for each in clean or [each for each in candidates if each.values]:
        if best is None or better(setup, each.mean or 0.0, best.mean or 0.0):
            best = each
    return best


def _verdict(
    section: Compare,
    setup: Setup,
    cells: Cells,
    means: Mapping[Cell, Interval],
    compared: Sequence[Compared],
) -> str:
    if not any(each.repetitions for each in cells.values()):
        return "No repetition has ended yet: nothing to compare."
    if not any(each.values for each in cells.values()):
        ended = sum(len(each.repetitions) for each in cells.values())
        return f"All {ended} repetitions failed: nothing to compare."
    confidence = percent(section.confidence)
    if not compared:
        parts = [
            f"{each.label} {mean_and_ends(means[cell])}"
            for cell, each in cells.items()
            if each.values
        ]
        alone = "" if len(cells) == 1 else "; no two arms to compare"
        means_text = listed(parts, _MOST_IN_VERDICT)
        return f"Mean {setup.metric} ({confidence}): {means_text}{alone}{_failed(cells)}."
    reference = ""
    if section.baseline is not None:
        reference = _baseline_name(section.baseline, setup)
    return comparison_verdict(setup, compared, reference, confidence)


def _failed(cells: Cells) -> str:
    failed = [
        f"{each.failures} of {len(each.repetitions)} repetitions of {each.label} failed"
        for each in cells.values()
        if each.failures
    ]
    return f"; {listed(failed)}" if failed else ""


def _table(
    cells: Cells, means: Mapping[Cell, Interval], judged: Sequence[Judgement]
) -> list[tuple[str, ...]]:
    by_arm = {each.difference.arm.cell: each for each in judged}
    references = {each.difference.base.cell for each in judged}
    rows: list[tuple[str, ...]] = [
        ("cell", "best settings", "repetitions", "mean", "interval")
        + ("gain", "interval of the gain", "p", "outcome")
    ]
    for cell, each in cells.items():
        found = means[cell]
        row: tuple[str, ...] = (each.label, settings_text(each) or UNKNOWN, repetitions_text(each))
        row += (mean_text(found), ends_text(found))
        of_arm = by_arm.get(cell)
        if of_arm is None:
            note = "reference" if cell in references else UNKNOWN
            note += "; best settings at an edge" if each.edges else ""
            rows.append((*row, UNKNOWN, UNKNOWN, UNKNOWN, note))
            continue
        gain = of_arm.difference.gain
        p = UNKNOWN if of_arm.p is None else f"{of_arm.p:.2g}"
        ends = ends_text(gain, with_sign=True)
        rows.append((*row, mean_text(gain, with_sign=True), ends, p, of_arm.outcome))
    return rows


def _plot(
    section: Compare, setup: Setup, cells: Cells, means: Mapping[Cell, Interval]
) -> Plot | None:
    if not any(each.values for each in cells.values()):
        return None
    shown = [(row, cell) for row, cell in enumerate(cells) if means[cell].mean is not None]
    single = [(value, float(row)) for row, cell in shown for value in cells[cell].values.values()]
    series = (
        Series(
            "a repetition",
            tuple(value for value, _ in single),
            tuple(row for _, row in single),
            hollow=True,
            style=4,
        ),
        Series(
            f"mean, {percent(section.confidence)} interval",
            tuple(float(means[cell].mean or 0.0) for _, cell in shown),
            tuple(float(row) for row, _ in shown),
            tuple(means[cell].low for _, cell in shown),
            tuple(means[cell].high for _, cell in shown),
            style=0,
        ),
    )
    direction = "lower" if setup.lower_is_better else "higher"
    panel = Panel(
        f"{setup.metric} ({direction} is better)",
        "",
        series,
        names=tuple(each.label for each in cells.values()),
    )
    caption = (
        "The metric at the end of each repetition, and the mean of each cell with its interval "
        "over the seeds. Differences are paired by seed: they can be clear where intervals of "
        "means overlap."
    )
    return Plot((panel,), caption)


def _notes(
    section: Compare,
    setup: Setup,
    cells: Cells,
    judged: Sequence[Judgement],
    found: Sequence[_Group],
) -> list[str]:
    notes = []
    comparisons = sum(each.comparisons for each in found)
    if judged:
        notes.append(
            f"A gain is the difference of {setup.metric}, paired by seed, positive where the arm "
            f"is better. Each interval is at {percent(section.confidence)}; p-values are corrected "
            f"for {counted(comparisons, 'comparison')} by Holm's method."
        )
        if section.baseline is None:
            notes.append(
                "The reference is the arm with the best mean. It was chosen by its results, so all "
                "pairs of arms count as comparisons."
            )
        notes += _seeds_notes(section, judged, comparisons)
    gone = [each.name for each in found if each.reference is None]
    if gone and section.baseline is not None:
        notes.append(f"Not compared, as the baseline is not there: {listed(gone, len(gone))}.")
    if section.tolerance > 0:
        notes.append(
            f"Tolerance {section.tolerance:g}: an arm is within it if its loss is shown to be "
            "smaller, beyond it if larger. These p-values are a family of their own in the "
            "correction."
        )
    return notes + edge_notes(cells.values()) + missing_notes(setup, cells)


def _seeds_notes(section: Compare, judged: Sequence[Judgement], comparisons: int) -> list[str]:
    """Which differences have too few seeds for any p-value that would count."""
    needed = seeds_needed(section.confidence, comparisons)
    seeds = {each.difference.arm.label: len(each.difference.gains) for each in judged}
    short = [f"{name} ({count})" for name, count in seeds.items() if 0 < count < needed]
    most = max(seeds.values())
    if not short:
        return []
    if most < needed:
        return [
            f"With {counted(most, 'seed')}, no difference among "
            f"{counted(comparisons, 'comparison')} can be shown, however large: at least "
            f"{needed} seeds are needed."
        ]
    return [
        f"With fewer than {needed} seeds no difference among "
        f"{counted(comparisons, 'comparison')} can be shown, however large: {listed(short)}."
    ]


def edge_notes(cells: Iterable[CellResults]) -> list[str]:
    """The best settings at the edge of their search, a sentence each."""
    texts = dict.fromkeys(text for each in cells if (text := edge_sentence(each)))
    return [f"{text}: a wider search may find better ones." for text in texts]


def not_ended_notes(setup: Setup, cells: Cells) -> list[str]:
    """The repetitions of a study that have not ended yet, in a sentence."""
    short = [each for each in cells.values() if len(each.repetitions) < setup.repetitions]
    if not short:
        return []
    names = listed([f"{e.label} ({len(e.repetitions)} of {setup.repetitions})" for e in short])
    return [f"Repetitions that have not ended yet: {names}."]


def missing_notes(setup: Setup, cells: Cells) -> list[str]:
    """What of a study has not ended yet or failed, a sentence each."""
    notes = not_ended_notes(setup, cells)
    failed = [each for each in cells.values() if each.failures]
    for each in failed:
        states = [run.state for run in each.repetitions if run.number not in each.values]
        words = listed([f"{states.count(s)} {s}" for s in dict.fromkeys(states)])
        notes.append(
            f"{each.label}: {words} of {len(each.repetitions)} repetitions. The mean is over those "
            "that finished; the cell counts neither as better nor as within tolerance."
        )
    return notes


def _cell_facts(results: CellResults, mean: Interval) -> dict[str, object]:
    return {
        "cell": list(results.cell),
        "settings": dict(results.settings),
        "mean": interval_facts(mean),
        "failures": results.failures,
        "edges": [edge._asdict() for edge in results.edges],
    }


def group_name(setup: Setup, group: Sequence[Cell], by: Sequence[str]) -> str:
    """What the cells of a group have in common; empty if the factors `by` are all there are."""
    rest = [factor for factor in setup.factors if factor not in by]
    return label_of(setup, group[0], without=by) if rest else ""
