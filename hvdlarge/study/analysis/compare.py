"""The analysis `compare`: the mean of each cell with its interval and best settings, and the
differences between arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvdlarge.study.analysis.cells import (
    CellResults,
    better,
    edge_sentence,
    groups,
    label_of,
)
from hvdlarge.study.analysis.differences import Difference, Judgement, difference, judge
from hvdlarge.study.analysis.finding import (
    UNKNOWN,
    Finding,
    between,
    counted,
    interval_facts,
    listed,
    mean_and_ends,
    number,
    percent,
    signed,
)
from hvdlarge.study.analysis.intervals import Interval, interval, seeds_needed
from hvdlarge.study.analysis.plots import Panel, Plot, Series
from hvdlarge.study.analysis.sections import Compare, is_level
from hvdlarge.study.results import Cell, Setup

_MANY_CELLS = 12  # whose p-values are corrected by large factors
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
    found = [
        _differences(section, setup, cells, group, arms) for group in groups(setup, arms).values()
    ]
    differences = [each for in_group, _ in found for each in in_group]
    comparisons = sum(count for _, count in found)
    judged = judge(differences, section.confidence, comparisons)
    means = {
        cell: interval([*each.values.values()], section.confidence) for cell, each in cells.items()
    }
    return Finding(
        "compare",
        f"Comparison of {listed(arms)}" if arms else "Results",
        _verdict(section, setup, cells, means, judged),
        _table(cells, means, judged),
        _plot(section, setup, cells, means),
        _notes(section, setup, cells, judged, comparisons),
        {
            "cells": {
                label: _cell_facts(each, means[cell])
                for cell, each in cells.items()
                for label in [each.label]
            },
            "comparisons": [each.facts() for each in judged],
            "compared": comparisons,
        },
    )


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


def _differences(
    section: Compare, setup: Setup, cells: Cells, group: Sequence[Cell], arms: Sequence[str]
) -> tuple[list[Difference], int]:
    """The differences of a group's arms from its reference, and the comparisons that count."""
    candidates = [cells[cell] for cell in group]
    if section.baseline is not None:
        reference = next(
            (each for each in candidates if _is_baseline(section.baseline, setup, each.cell)), None
        )
        count = len(candidates) - 1
    else:
        reference = _best(setup, candidates)
        count = len(candidates) * (len(candidates) - 1) // 2  # the best was chosen by its result
    if reference is None:
        return [], 0
    others = [each for each in candidates if each is not reference]
    found = [
        difference(
            setup,
            each,
            reference,
            section.confidence,
            section.tolerance,
            len(setup.cells) > _MANY_CELLS,
        )
        for each in others
    ]
    return found, count


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
    judged: Sequence[Judgement],
) -> str:
    if not any(each.repetitions for each in cells.values()):
        return "No repetition has ended yet: nothing to compare."
    if not any(each.values for each in cells.values()):
        ended = sum(len(each.repetitions) for each in cells.values())
        return f"All {ended} repetitions failed: nothing to compare."
    if not judged:
        parts = [
            f"{each.label}: {setup.metric} {mean_and_ends(means[cell])}"
            for cell, each in cells.items()
            if each.values
        ]
        alone = "" if len(cells) == 1 else "; no two arms to compare"
        return f"{listed(parts, _MOST_IN_VERDICT)}{alone}{_failed(cells)}."
    if len(judged) <= _MOST_IN_VERDICT:
        return "; ".join(map(comparison_text, judged)) + "."
    return _summary(judged)


def comparison_text(judged: Judgement) -> str:
    """A difference with its interval and outcome, in words."""
    found = judged.difference
    names = f"{found.arm.label} against {found.base.label}"
    if found.gain.mean is None:
        return f"{names}: {judged.outcome}"
    p = "" if judged.p is None or found.void else f", p = {judged.p:.2g}"
    return f"{names}: gain {mean_and_ends(found.gain, with_sign=True)}{p}, {judged.outcome}"


def _summary(judged: Sequence[Judgement]) -> str:
    """Many comparisons: counts, with the names and numbers of the clear ones."""
    parts = []
    kinds = (
        ("better", [each for each in judged if each.better]),
        ("worse", [each for each in judged if each.worse]),
        (
            "void (best settings at the edge of the search)",
            [e for e in judged if e.difference.void],
        ),
    )
    for word, members in kinds:
        if members:
            names = [
                f"{each.difference.arm.label} ({mean_and_ends(each.difference.gain, True)})"
                for each in members
            ]
            parts.append(f"{len(members)} {word}: {listed(names, _MOST_IN_VERDICT)}")
    within = [each.difference.arm.label for each in judged if each.within]
    if within:
        parts.append(f"{len(within)} within tolerance: {listed(within)}")
    open_ones = sum(not (e.better or e.worse or e.within or e.difference.void) for e in judged)
    if open_ones:
        parts.append(f"{open_ones} without a difference that could be shown")
    failed = [each.difference.arm for each in judged if each.difference.arm.failures]
    if failed:
        names = [f"{e.label} ({e.failures} of {len(e.repetitions)})" for e in failed]
        parts.append(f"failed repetitions: {listed(names)}")
    return f"Of {counted(len(judged), 'comparison')}, {'; '.join(parts)}."


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
        row += (number(found.mean), between(found.low, found.high))
        of_arm = by_arm.get(cell)
        if of_arm is None:
            note = "reference" if cell in references else UNKNOWN
            note += f"; {edge_sentence(each)}" if each.edges else ""
            rows.append((*row, UNKNOWN, UNKNOWN, UNKNOWN, note))
            continue
        gain = of_arm.difference.gain
        p = UNKNOWN if of_arm.p is None else f"{of_arm.p:.2g}"
        ends = between(gain.low, gain.high, with_sign=True)
        rows.append((*row, signed(gain.mean), ends, p, of_arm.outcome))
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
    section: Compare, setup: Setup, cells: Cells, judged: Sequence[Judgement], comparisons: int
) -> list[str]:
    notes = []
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
        fewest = min(len(each.difference.gains) for each in judged)
        needed = seeds_needed(section.confidence, comparisons)
        if 0 < fewest < needed:
            notes.append(
                f"With {counted(fewest, 'seed')}, no difference among "
                f"{counted(comparisons, 'comparison')} can be shown, however large: at least "
                f"{needed} seeds are needed."
            )
    if section.tolerance > 0:
        notes.append(
            f"Tolerance {section.tolerance:g}: an arm is within it if a larger loss is excluded."
        )
    notes += [
        f"{text}: a wider search may find better ones."
        for each in cells.values()
        if (text := edge_sentence(each))
    ]
    return notes + missing_notes(setup, cells)


def missing_notes(setup: Setup, cells: Cells) -> list[str]:
    """What of a study has not ended yet or failed, a sentence each."""
    notes = []
    short = [each for each in cells.values() if len(each.repetitions) < setup.repetitions]
    if short:
        names = listed([f"{e.label} ({len(e.repetitions)} of {setup.repetitions})" for e in short])
        notes.append(f"Repetitions that have not ended yet: {names}.")
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
