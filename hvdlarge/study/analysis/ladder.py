"""The analysis `ladder`: techniques added one after another at one batch, and what each adds to the
one before.

Source:   You et al., The Limit of the Batch Size, arXiv:2006.08517, which adds techniques step by
          step at a huge batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from hvdlarge.study.analysis.cells import CellResults, groups, level_of
from hvdlarge.study.analysis.compare import (
    group_name,
    missing_notes,
    repetitions_text,
    settings_text,
)
from hvdlarge.study.analysis.differences import Judgement, difference, judge
from hvdlarge.study.analysis.finding import (
    UNKNOWN,
    Finding,
    between,
    counted,
    interval_facts,
    mean_and_ends,
    number,
    percent,
    signed,
)
from hvdlarge.study.analysis.intervals import Interval, interval
from hvdlarge.study.analysis.plots import Panel, Plot, Series
from hvdlarge.study.analysis.sections import Ladder, is_level
from hvdlarge.study.results import Cell, Setup

Cells = Mapping[Cell, CellResults]
_MOST_WHOLE = 2  # ladders; of more the verdict has the clear steps only
_Ladder = tuple[str, list[CellResults]]  # its name and its rungs


def ladder(section: Ladder, setup: Setup, cells: Cells) -> Finding:
    """Compares each level of a factor with the one before it.

    Args:
        section: of the study file, checked.
        setup: of the study.
        cells: its results.
    """
    ladders = _ladders(section, setup, cells)
    pairs = [
        difference(setup, upper, lower, section.confidence)
        for _, rungs in ladders
        for lower, upper in itertools.pairwise(rungs)
    ]
    judged = {each.difference.arm.cell: each for each in judge(pairs, section.confidence)}
    whole = judge(
        [difference(setup, rungs[-1], rungs[0], section.confidence) for _, rungs in ladders],
        section.confidence,
    )
    means = {
        cell.cell: interval([*cell.values.values()], section.confidence)
        for _, rungs in ladders
        for cell in rungs
    }
    rung = {cell: level_of(setup, cell, section.factor).label for cell in setup.cells}
    notes = [
        f"Each rung is compared with the one before it, paired by seed; p-values are corrected for "
        f"{counted(len(pairs), 'comparison')} by Holm's method, those of whole ladders apart.",
        "What a technique adds depends on those that were added before it.",
    ]
    return Finding(
        "ladder",
        f"Ladder of {section.factor}",
        _verdict(ladders, judged, whole, rung),
        _table(ladders, means, judged, rung),
        _plot(section, setup, ladders, means, rung),
        notes + missing_notes(setup, {c.cell: c for _, rungs in ladders for c in rungs}),
        {
            "rungs": [each.facts() for each in judged.values()],
            "whole": [each.facts() for each in whole],
            "means": [
                {"cell": list(cell), "mean": interval_facts(each)} for cell, each in means.items()
            ],
        },
    )


def _ladders(section: Ladder, setup: Setup, cells: Cells) -> list[_Ladder]:
    """The rungs of each combination of the other factors' levels, from the baseline on."""
    levels = setup.factors[section.factor]
    start = 0
    if section.baseline is not None:
        start = next(
            (place for place, each in enumerate(levels) if is_level(section.baseline, each)), 0
        )
    order = {level.label: place for place, level in enumerate(levels)}
    found = []
    for group in groups(setup, [section.factor]).values():
        name = group_name(setup, group, [section.factor])
        places = {cell: order[level_of(setup, cell, section.factor).label] for cell in group}
        rungs = [
            cells[cell] for cell in sorted(group, key=places.__getitem__) if places[cell] >= start
        ]
        if len(rungs) > 1:
            found.append((name, rungs))
    return found


def _verdict(
    ladders: Sequence[_Ladder],
    judged: Mapping[Cell, Judgement],
    whole: Sequence[Judgement],
    rung: Mapping[Cell, str],
) -> str:
    if not ladders:
        return "No ladder: no two levels are left to compare."
    texts = []
    short = len(ladders) > _MOST_WHOLE
    for (name, rungs), total in zip(ladders, whole, strict=True):
        shown = [c for c in rungs[1:] if not short or _is_clear(judged[c.cell])]
        steps = [f"{rung[c.cell]} {_step_text(judged[c.cell])}" for c in shown]
        steps = steps or ["no rung adds anything that could be shown"]
        text = f"{name}: " if name else ""
        text += f"from {rung[rungs[0].cell]}, {'; '.join(steps)}"
        gain = total.difference.gain
        if len(rungs) > 2 and gain.mean is not None:
            text += f"; all together {mean_and_ends(gain, True)} ({total.outcome})"
        texts.append(text)
    return (
        ". ".join(
            text[0].upper() + text[1:] if not n else text
            for text, (n, _) in zip(texts, ladders, strict=True)
        )
        + "."
    )


def _is_clear(judged: Judgement) -> bool:
    return judged.better or judged.worse or judged.outcome.startswith(("void", "all", "no rep"))


def _step_text(judged: Judgement) -> str:
    gain = judged.difference.gain
    if gain.mean is None:
        return f"({judged.outcome})"
    return f"adds {mean_and_ends(gain, True)} ({judged.outcome})"


def _table(
    ladders: Sequence[_Ladder],
    means: Mapping[Cell, Interval],
    judged: Mapping[Cell, Judgement],
    rung: Mapping[Cell, str],
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("ladder", "rung", "best settings", "repetitions", "mean", "interval")
        + ("adds", "interval of what it adds", "p", "outcome")
    ]
    for name, rungs in ladders:
        for place, cell in enumerate(rungs):
            mean = means[cell.cell]
            row: tuple[str, ...] = (
                name or UNKNOWN,
                rung[cell.cell],
                settings_text(cell) or UNKNOWN,
            )
            row += (repetitions_text(cell), number(mean.mean), between(mean.low, mean.high))
            if place == 0:
                rows.append((*row, UNKNOWN, UNKNOWN, UNKNOWN, "start"))
                continue
            of_rung = judged[cell.cell]
            gain, p = of_rung.difference.gain, of_rung.p
            rows.append(
                (*row, signed(gain.mean), between(gain.low, gain.high, True))
                + (UNKNOWN if p is None else f"{p:.2g}", of_rung.outcome)
            )
    return rows if len(rows) > 1 else []


def _plot(
    section: Ladder,
    setup: Setup,
    ladders: Sequence[_Ladder],
    means: Mapping[Cell, Interval],
    rung: Mapping[Cell, str],
) -> Plot | None:
    names = list(dict.fromkeys(rung[cell.cell] for _, rungs in ladders for cell in rungs))
    beside = min(0.12, 0.7 / len(ladders)) if ladders else 0.0  # of ladders, within a row
    start = beside * (len(ladders) - 1) / 2
    series = []
    for place, (name, rungs) in enumerate(ladders):
        shown = [(cell, means[cell.cell]) for cell in rungs if means[cell.cell].mean is not None]
        if not shown:
            continue
        series.append(
            Series(
                name or f"mean, {percent(section.confidence)} interval",
                tuple(float(found.mean or 0.0) for _, found in shown),
                tuple(names.index(rung[cell.cell]) + beside * place - start for cell, _ in shown),
                tuple(found.low for _, found in shown),
                tuple(found.high for _, found in shown),
                look="both",
                style=place,
            )
        )
    if not series:
        return None
    direction = "lower" if setup.lower_is_better else "higher"
    label = f"{setup.metric} ({direction} is better)"
    caption = (
        "The mean of each rung with its interval over the seeds; each rung has the techniques of "
        "those above it too, if the study file adds them."
    )
    return Plot((Panel(label, section.factor, tuple(series), names=tuple(names)),), caption)
