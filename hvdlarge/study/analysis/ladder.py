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
    counted,
    ends_text,
    interval_facts,
    listed,
    mean_and_ends,
    mean_text,
    percent,
)
from hvdlarge.study.analysis.intervals import Interval, interval, many_comparisons
from hvdlarge.study.analysis.plots import Panel, Plot, Series
from hvdlarge.study.analysis.sections import Ladder, is_level
from hvdlarge.study.analysis.verdicts import (
    causes_text,
    edges_text,
    failures_text,
    gain_text,
    void_cells,
)
from hvdlarge.study.results import Cell, Setup

Cells = Mapping[Cell, CellResults]
_Ladder = tuple[str, list[CellResults]]  # its name and its steps


def ladder(section: Ladder, setup: Setup, cells: Cells) -> Finding:
    """Compares each level of a factor with the one before it.

    Args:
        section: of the study file, checked.
        setup: of the study.
        cells: its results.
    """
    labels = _labels(section, setup)
    ladders = _ladders(section, setup, cells, labels)
    pairs = [pair for _, steps in ladders for pair in itertools.pairwise(steps)]
    judged = {each.difference.arm.cell: each for each in _judged(section, setup, pairs)}
    whole = _judged(section, setup, [(steps[0], steps[-1]) for _, steps in ladders])
    means = {
        cell.cell: interval([*cell.values.values()], section.confidence)
        for _, steps in ladders
        for cell in steps
    }
    label = {cell: level_of(setup, cell, section.factor).label for cell in setup.cells}
    names, left_out = _over(labels, pairs, label)
    on_it = {cell.cell: cell for _, steps in ladders for cell in steps}
    notes = [
        f"Each step is compared with the one before it, paired by seed; p-values are corrected for "
        f"{counted(len(pairs), 'comparison')} by Holm's method, those of whole ladders apart.",
        "What a technique adds depends on those that were added before it.",
        *left_out,
    ]
    return Finding(
        "ladder",
        f"What each {section.factor} adds to the one before",
        _verdict(section, setup, ladders, judged, whole, label, names),
        _table(ladders, means, judged, {**label, **names}),
        _plot(section, setup, ladders, means, label),
        notes + edge_notes(on_it.values()) + missing_notes(setup, on_it),
        {
            "steps": [each.facts() for each in judged.values()],
            "whole": [each.facts() for each in whole],
            "means": [
                {"cell": list(cell), "mean": interval_facts(each)} for cell, each in means.items()
            ],
        },
    )


def _labels(section: Ladder, setup: Setup) -> list[str]:
    """The levels that are the steps, in their order."""
    levels = setup.factors[section.factor]
    if section.steps is None:
        return [level.label for level in levels]
    return [each.label for name in section.steps for each in levels if is_level(name, each)]


def _ladders(section: Ladder, setup: Setup, cells: Cells, labels: Sequence[str]) -> list[_Ladder]:
    """The steps of each combination of the other factors' levels."""
    order = {label: place for place, label in enumerate(labels)}
    found = []
    for group in groups(setup, [section.factor]).values():
        name = group_name(setup, group, [section.factor])
        of_cell = {cell: level_of(setup, cell, section.factor).label for cell in group}
        on_it = [cell for cell in group if of_cell[cell] in order]
        steps = [cells[cell] for cell in sorted(on_it, key=lambda cell: order[of_cell[cell]])]
        if len(steps) > 1:
            found.append((name, steps))
    return found


def _over(
    labels: Sequence[str],
    pairs: Sequence[tuple[CellResults, CellResults]],
    label: Mapping[Cell, str],
) -> tuple[dict[Cell, str], list[str]]:
    """Names of the steps whose preceding step the study excludes, as `lars over plain`; and a
    sentence for each.
    """
    names, notes = {}, []
    for lower, upper in pairs:
        first, last = label[lower.cell], label[upper.cell]
        if left_out := labels[labels.index(first) + 1 : labels.index(last)]:
            names[upper.cell] = f"{last} over {first}"
            notes.append(
                f"{upper.label} is compared with {first}, as the study leaves out "
                f"{listed(left_out, len(left_out))} there: what it adds includes what these would."
            )
    return names, notes


def _judged(
    section: Ladder, setup: Setup, pairs: Sequence[tuple[CellResults, CellResults]]
) -> list[Judgement]:
    """What each second cell gains over the first, corrected for the number of all pairs."""
    precise = many_comparisons(len(pairs), section.confidence)
    found = [
        difference(setup, upper, lower, section.confidence, precise=precise)
        for lower, upper in pairs
    ]
    return judge(found, section.confidence, len(pairs))


def _verdict(
    section: Ladder,
    setup: Setup,
    ladders: Sequence[_Ladder],
    judged: Mapping[Cell, Judgement],
    whole: Sequence[Judgement],
    label: Mapping[Cell, str],
    over: Mapping[Cell, str],
) -> str:
    if not ladders:
        return "No ladder: no two levels are left to compare."
    texts = [
        (f"At {name}: " if name else "") + _ladder_text(section, steps, judged, total, label, over)
        for (name, steps), total in zip(ladders, whole, strict=True)
    ]
    everything = [*judged.values(), *whole]
    void = edges_text(setup, void_cells(everything))
    texts += [f"Void: {void}"] if void else []
    failed = failures_text(everything, label if len(ladders) == 1 else {})
    texts += [f"Failed: {failed}"] if failed else []
    return ". ".join(texts) + "."


def _ladder_text(
    section: Ladder,
    steps: Sequence[CellResults],
    judged: Mapping[Cell, Judgement],
    total: Judgement,
    label: Mapping[Cell, str],
    over: Mapping[Cell, str],
) -> str:
    """What the steps of one ladder add: clear ones with numbers, the others counted."""
    names = {**label, **over}
    added = [judged[cell.cell] for cell in steps[1:]]
    adds, loses = [e for e in added if e.better], [e for e in added if e.worse]
    if adds:
        text = f"{len(adds)} of {counted(len(added), 'step')} "
        text += f"{'adds' if len(adds) == 1 else 'add'} something ({percent(section.confidence)}): "
        text += ", ".join(gain_text(each, names) for each in adds)
    else:
        text = "no step is shown to add anything"
    if loses:
        text += f"; {', '.join(gain_text(each, names) for each in loses)} worse"
    void = sum(bool(each.difference.void) for each in added)
    if void:
        text += f"; {counted(void, 'step')} void"
    missing = [each for each in added if not each.difference.void and each.p is None]
    if missing:
        text += f"; not comparable: {causes_text(missing, label)}"
    if len(steps) > 2 and not total.difference.void and total.p is not None:
        text += f"; all together {mean_and_ends(total.difference.gain, with_sign=True)}"
        text += "" if total.better or total.worse else ", no difference shown"
    return text


def _table(
    ladders: Sequence[_Ladder],
    means: Mapping[Cell, Interval],
    judged: Mapping[Cell, Judgement],
    names: Mapping[Cell, str],
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("ladder", "step", "best settings", "repetitions", "mean", "interval")
        + ("adds", "interval of what it adds", "p", "outcome")
    ]
    for name, steps in ladders:
        for place, cell in enumerate(steps):
            mean = means[cell.cell]
            row: tuple[str, ...] = (
                name or UNKNOWN,
                names[cell.cell],
                settings_text(cell) or UNKNOWN,
            )
            row += (repetitions_text(cell), mean_text(mean), ends_text(mean))
            if place == 0:
                rows.append((*row, UNKNOWN, UNKNOWN, UNKNOWN, "start"))
                continue
            of_step = judged[cell.cell]
            gain, p = of_step.difference.gain, of_step.p
            rows.append(
                (*row, mean_text(gain, True), ends_text(gain, True))
                + (UNKNOWN if p is None else f"{p:.2g}", of_step.outcome)
            )
    return rows if len(rows) > 1 else []


def _plot(
    section: Ladder,
    setup: Setup,
    ladders: Sequence[_Ladder],
    means: Mapping[Cell, Interval],
    label: Mapping[Cell, str],
) -> Plot | None:
    on_it = {label[cell.cell] for _, steps in ladders for cell in steps}
    names = [each for each in _labels(section, setup) if each in on_it]
    beside = min(0.12, 0.7 / len(ladders)) if ladders else 0.0  # of ladders, within a row
    start = beside * (len(ladders) - 1) / 2
    series = []
    for place, (name, steps) in enumerate(ladders):
        shown = [(cell, means[cell.cell]) for cell in steps if means[cell.cell].mean is not None]
        if not shown:
            continue
        series.append(
            Series(
                name or f"mean, {percent(section.confidence)} interval",
                tuple(float(found.mean or 0.0) for _, found in shown),
                tuple(names.index(label[cell.cell]) + beside * place - start for cell, _ in shown),
                tuple(found.low for _, found in shown),
                tuple(found.high for _, found in shown),
                look="both",
                style=place,
            )
        )
    if not series:
        return None
    direction = "lower" if setup.lower_is_better else "higher"
    unit = f"{setup.metric} ({direction} is better)"
    caption = (
        "The mean of each step with its interval over the seeds; each step has the techniques of "
        "those above it too, if the study file adds them."
    )
    return Plot((Panel(unit, section.factor, tuple(series), names=tuple(names)),), caption)
