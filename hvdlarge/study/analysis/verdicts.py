"""Verdicts of comparisons in words: those with a clear difference are named with their gain and its
interval, the others are counted; what is void, failed or missing is said once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hvdlarge.study.analysis.cells import CellResults, edge_sentence, label_of
from hvdlarge.study.analysis.differences import Judgement
from hvdlarge.study.analysis.finding import listed, mean_and_ends
from hvdlarge.study.results import Cell, Setup

_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")
_MOST_SINGLE, _MOST_GROUPED = 4, 2  # comparisons that are all named with their numbers
_MOST_CLEAR = 3  # clear ones of a single group that are; of several groups one
_MOST_UNFINISHED = 2


@dataclass(frozen=True)
class Compared:
    """The arms of a group, compared with its reference.

    Attributes:
        name: of the group; empty if there is one.
        reference: the cell that the others are compared with.
        judged: the comparisons.
        names: short, of all cells of the group.
    """

    name: str
    reference: CellResults
    judged: tuple[Judgement, ...]
    names: Mapping[Cell, str]


def short_names(setup: Setup, cells: Sequence[Cell]) -> dict[Cell, str]:
    """Names of cells without the levels that all of them share, numbers last.

    Args:
        setup: of the study.
        cells: to name.
    """
    shared = _shared(setup, cells)
    if len(shared) == len(setup.factors):
        shared = []
    numeric = [
        factor
        for factor, levels in setup.factors.items()
        if all(level.value is not None for level in levels)
    ]
    named = [factor for factor in setup.factors if factor not in numeric]
    parts = {}
    for cell in cells:
        both = [
            label_of(setup, cell, [*shared, *hidden])
            for hidden in (numeric, named)
            if set(shared) | set(hidden) != set(setup.factors)
        ]
        parts[cell] = " at ".join(both) or setup.name
    return parts


def _shared(setup: Setup, cells: Sequence[Cell]) -> list[str]:
    """The factors with one level in all of some cells."""
    factors = enumerate(setup.factors)
    return [factor for place, factor in factors if len({cell[place] for cell in cells}) == 1]


def comparison_verdict(
    setup: Setup, groups: Sequence[Compared], reference: str, confidence: str
) -> str:
    """The verdict of all groups: a clause for each, then what is void and what failed.

    Args:
        setup: of the study.
        groups: at least one, with at least one comparison.
        reference: its name; empty if each group has its own.
        confidence: of the intervals, in words.
    """
    judged = [each for group in groups for each in group.judged]
    if len(groups) == 1 and not groups[0].name:
        group = groups[0]
        name = reference or f"{group.names[group.reference.cell]}, the best mean"
        text = f"Against {name} (gain, {confidence}): {clause(setup, group, single=True)}"
        failed = failures_text(judged, group.names)
        return f"{text}; failed: {failed}." if failed else f"{text}."
    parts = [f"Against {reference or 'the best mean'} (gain, {confidence})"]
    for place, group in zip(group_places([each.name for each in groups]), groups, strict=True):
        of_group = "" if reference else f" against {group.names[group.reference.cell]}"
        parts.append(f"At {place}{of_group}: {clause(setup, group, single=False)}")
    void = edges_text(setup, void_cells(judged))
    parts += [f"Void: {void}"] if void else []
    involved = [each.difference.arm.cell for each in judged]
    involved += [group.reference.cell for group in groups]
    failed = failures_text(judged, short_names(setup, involved))
    parts += [f"Failed: {failed}"] if failed else []
    return ". ".join(parts) + "."


def clause(setup: Setup, group: Compared, single: bool) -> str:
    """The comparisons of a group in words.

    Args:
        setup: of the study.
        group: with at least one comparison.
        single: whether it is the only one, and has room for its names and edges.
    """
    void = [each for each in group.judged if each.difference.void]
    missing = [each for each in group.judged if not each.difference.void and each.p is None]
    kinds: dict[str, list[Judgement]] = {}
    for each in group.judged:
        if not each.difference.void and each.p is not None:
            kinds.setdefault(outcome_words(each), []).append(each)
    total = len(group.judged)
    all_named = total <= (_MOST_SINGLE if single else _MOST_GROUPED)
    if not (single or all_named):
        kinds = _merged(kinds)
    parts = []
    if all_named:
        parts += [
            f"{gain_text(each, group.names)}, {word}"
            for word, members in kinds.items()
            for each in members
        ]
    else:
        most = _MOST_CLEAR if single else 1
        order = sorted(kinds, key=_rank)
        parts += [_kind_text(word, kinds[word], group.names, total, most) for word in order]
    if void:
        text = f"{_counted(len(void), total)}void"
        parts.append(f"{text}: {edges_text(setup, void_cells(void))}" if single else text)
    if missing:
        parts.append(
            f"{_counted(len(missing), total)}not comparable: {causes_text(missing, group.names)}"
        )
    return "; ".join(parts)


def outcome_words(judged: Judgement) -> str:
    """What a comparison shows; a tolerance only where the arm is not better."""
    if judged.better:
        return "better"
    tolerance = judged.difference.tolerance
    of_tolerance = ""
    if tolerance > 0:
        place = "within" if judged.within else "beyond" if judged.beyond else ""
        of_tolerance = f"{place} {tolerance:g}" if place else "tolerance undecided"
    if judged.worse:
        return f"worse, {of_tolerance}" if of_tolerance else "worse"
    if of_tolerance == "tolerance undecided":
        return "undecided"
    return of_tolerance or "no difference shown"


def gain_text(judged: Judgement, names: Mapping[Cell, str]) -> str:
    """The name of an arm and its gain, with the interval."""
    found = judged.difference
    return f"{names[found.arm.cell]} {mean_and_ends(found.gain, with_sign=True)}"


def void_cells(judged: Iterable[Judgement]) -> list[CellResults]:
    """The cells with edges that make comparisons void."""
    return [cell for each in judged for cell in (each.difference.base, each.difference.arm)]


def edges_text(setup: Setup, cells: Iterable[CellResults]) -> str:
    """The best settings at the edge of their search, each once; empty if there are none.

    Args:
        setup: of the study.
        cells: of which several may have the settings of one search.
    """
    at_edge = {cell.tuned_at: cell for cell in cells if cell.edges}
    if len(at_edge) < 2:
        return "".join(map(edge_sentence, at_edge.values()))
    names = short_names(setup, [*at_edge])
    shared = _shared(setup, [*at_edge])
    rest = [factor for factor in setup.factors if factor not in shared]
    where = f" at {label_of(setup, next(iter(at_edge)), rest)}" if shared else ""
    found: dict[tuple[str, str], list[str]] = {}
    for tuned_at, cell in at_edge.items():
        for edge in cell.edges:
            found.setdefault((edge.key, edge.end), []).append(
                f"{names[tuned_at]} ({edge.value:.4g})"
            )
    return "; ".join(
        f"{key} at the {end} end of its range{where}: {listed(values)}"
        for (key, end), values in found.items()
    )


def group_places(names: Sequence[str]) -> list[str]:
    """Names of groups; of those that differ in a number only, later ones are the number.

    Args:
        names: as `batch.base 64`.
    """
    parts = [name.rpartition(" ") for name in names]
    factors = {factor for factor, _, _ in parts}
    numbers = all(_NUMBER.fullmatch(last) for _, _, last in parts)
    if len(factors) > 1 or not numbers or any("," in factor for factor in factors):
        return list(names)
    return [*names[:1], *(last for _, _, last in parts[1:])]


def failures_text(judged: Iterable[Judgement], names: Mapping[Cell, str]) -> str:
    """The cells with failed repetitions, each once, but for those that left nothing to compare.

    Args:
        judged: the comparisons.
        names: of their cells; of those that are missing, the label is taken.
    """
    found: dict[Cell, CellResults] = {}
    named: set[Cell] = set()
    for each in judged:
        for cell in (each.difference.base, each.difference.arm):
            if cell.failures:
                found[cell.cell] = cell
        if not each.difference.void and each.p is None:
            named.add(_cause(each)[0].cell)
    return listed(
        [
            f"{names.get(each.cell, each.label)} ({failed_of(each)})"
            for each in found.values()
            if each.cell not in named or each.values
        ],
        len(found),
    )


def failed_of(cell: CellResults) -> str:
    """How many repetitions of a cell failed."""
    return f"{cell.failures} of {len(cell.repetitions)}"


def _rank(word: str) -> int:
    kinds = ("better", "worse", "within", "beyond")
    return next((place for place, kind in enumerate(kinds) if word.startswith(kind)), len(kinds))


def _merged(kinds: Mapping[str, list[Judgement]]) -> dict[str, list[Judgement]]:
    """Outcomes of which all that are worse are one, with the number of those beyond tolerance."""
    worse = [each for members in kinds.values() for each in members if each.worse]
    merged = {word: members for word, members in kinds.items() if not members[0].worse}
    beyond = sum(each.beyond for each in worse)
    if worse:
        tolerance = f"{worse[0].difference.tolerance:g}"
        merged[f"worse ({beyond} beyond {tolerance})" if beyond else "worse"] = worse
    return merged


def _counted(count: int, total: int) -> str:
    if total == 1:
        return ""
    return f"all {count} " if count == total else f"{count} "


def _kind_text(
    word: str, members: Sequence[Judgement], names: Mapping[Cell, str], total: int, most: int
) -> str:
    """The comparisons of one outcome: clear ones with numbers, from the smallest to the largest."""
    count = _counted(len(members), total)
    if not (members[0].better or members[0].worse):
        return f"{count}{word}"
    ordered = sorted(members, key=lambda each: abs(each.difference.gain.mean or 0.0))
    if len(members) <= most:
        return f"{count}{word}: {', '.join(gain_text(each, names) for each in ordered)}"
    highest = gain_text(ordered[-1], names)
    if most == 1 and len(members) == total:
        return f"{count}{word}, most {highest}"
    if most == 1:
        others = ", ".join(names[each.difference.arm.cell] for each in ordered[:-1])
        return f"{count}{word}: {others}, most {highest}"
    between = [names[each.difference.arm.cell] for each in ordered[1:-1]]
    others = f" (between: {', '.join(between)})" if between and len(members) < total else ""
    return f"{count}{word}, from {gain_text(ordered[0], names)} to {highest}{others}"


def _cause(judged: Judgement) -> tuple[CellResults, str]:
    """The cell that leaves nothing to compare, and why."""
    found = judged.difference
    for cell in (found.base, found.arm):
        if not cell.repetitions:
            return cell, "no repetition yet"
        if not cell.values:
            return cell, f"{failed_of(cell)} failed"
    fewer = min((found.arm, found.base), key=lambda cell: len(cell.values))
    return fewer, f"too few seeds, {len(found.gains)}"


def causes_text(missing: Sequence[Judgement], names: Mapping[Cell, str]) -> str:
    """Why arms cannot be compared: failures by name, what has not ended yet by name or number.

    Args:
        missing: comparisons without a p-value.
        names: of their cells.
    """
    causes: dict[Cell, tuple[CellResults, str]] = {}
    for each in missing:
        cell, why = _cause(each)
        causes[cell.cell] = cell, why
    failed = [f"{names[c]} ({why})" for c, (cell, why) in causes.items() if cell.failures]
    others: dict[str, list[str]] = {}
    for c, (cell, why) in causes.items():
        if not cell.failures:
            others.setdefault(why, []).append(names[c])
    texts = [
        f"{listed(of)} ({why})"
        if len(of) <= _MOST_UNFINISHED
        else why
        if len(of) == len(missing)
        else f"{len(of)} others ({why})"
        for why, of in others.items()
    ]
    return ", ".join([*failed, *texts])
