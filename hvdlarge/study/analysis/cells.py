"""The results of a study by cell: trials, best settings, repetitions, and what of them failed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hvdlarge.study.results import (
    FINALIST,
    REPETITION,
    TRIAL,
    Cell,
    Level,
    Range,
    RunResult,
    Setup,
)

_EDGE = 0.02  # of the searched range, from either end


class Edge(NamedTuple):
    """A best setting that lies at an end of its searched range: better ones may lie beyond.

    Attributes:
        key: of the job.
        value: the best.
        end: `lower` or `upper`.
        at: that end.
    """

    key: str
    value: float
    end: str
    at: float


@dataclass(frozen=True)
class CellResults:
    """The results of a cell.

    Attributes:
        cell: of the study.
        label: as tables name it.
        trials: of the tuning of this cell, that have ended.
        repetitions: that have ended.
        tuned_at: the cell whose tuning the settings come from; mostly itself.
        searched: its label.
        settings: the tuned keys of the repetitions, or of the best trial while there are none.
        edges: of these settings.
        values: the metric of each finished repetition, by its number.
        failures: repetitions that ended without a value.
    """

    cell: Cell
    label: str
    trials: tuple[RunResult, ...]
    repetitions: tuple[RunResult, ...]
    tuned_at: Cell
    searched: str
    settings: Mapping[str, Any]
    edges: tuple[Edge, ...]
    values: Mapping[int, float]
    failures: int

    @property
    def mean(self) -> float | None:
        """Of the finished repetitions."""
        return sum(self.values.values()) / len(self.values) if self.values else None


def by_cell(setup: Setup, results: Iterable[RunResult]) -> dict[Cell, CellResults]:
    """The results of each cell of a study, in its order; those of other cells are left out."""
    runs: dict[Cell, dict[str, list[RunResult]]] = {
        cell: {TRIAL: [], FINALIST: [], REPETITION: []} for cell in setup.cells
    }
    for result in results:
        if result.cell in runs:
            runs[result.cell][result.kind].append(result)
    for kinds in runs.values():
        for each in kinds.values():
            each.sort(key=lambda run: run.number)
    return {cell: _of_cell(setup, cell, runs) for cell in setup.cells}


def value_of(run: RunResult) -> float | None:
    """The metric at the end of a run; None unless it finished with a finite one."""
    if run.state != "finished" or run.value is None or not math.isfinite(run.value):
        return None
    return float(run.value)


def label_of(setup: Setup, cell: Cell, without: Sequence[str] = ()) -> str:
    """The name of a cell: its levels, where numbers have their factor before them.

    Args:
        setup: of the study.
        cell: to name.
        without: factors to leave out.
    """
    parts = []
    for (factor, levels), label in zip(setup.factors.items(), cell, strict=True):
        if factor not in without:
            numeric = any(level.label == label and level.value is not None for level in levels)
            parts.append(f"{factor} {label}" if numeric else label)
    return ", ".join(parts) or setup.name


def level_of(setup: Setup, cell: Cell, factor: str) -> Level:
    """The level of a factor in a cell."""
    label = cell[list(setup.factors).index(factor)]
    return next(level for level in setup.factors[factor] if level.label == label)


def groups(setup: Setup, by: Sequence[str]) -> dict[Cell, list[Cell]]:
    """The cells that differ only in the factors `by`, together; in the order of the study.

    Returns:
        Lists of cells by the labels of the other factors' levels.
    """
    rest = [place for place, factor in enumerate(setup.factors) if factor not in by]
    found: dict[Cell, list[Cell]] = {}
    for cell in setup.cells:
        found.setdefault(tuple(cell[place] for place in rest), []).append(cell)
    return found


def better(setup: Setup, first: float, second: float) -> bool:
    """Whether the first value of the metric is better than the second."""
    return first < second if setup.lower_is_better else first > second


def edge_of(key: str, value: Any, searched: Range) -> Edge | None:
    """Whether a value lies within 2 % of the range from an end, on the range's own scale.

    A lower end of 0 is no edge: the keys of a job that may be 0 cannot be below it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    low, high, value = float(searched.low), float(searched.high), float(value)
    if not low < high or not math.isfinite(value):
        return None
    if searched.log and low > 0:
        place = math.log(max(value, low) / low) / math.log(high / low)
    else:
        place = (value - low) / (high - low)
    if place >= 1 - _EDGE:
        return Edge(key, value, "upper", high)
    if place <= _EDGE and low != 0:
        return Edge(key, value, "lower", low)
    return None


def _of_cell(
    setup: Setup, cell: Cell, runs: Mapping[Cell, Mapping[str, Sequence[RunResult]]]
) -> CellResults:
    repetitions = runs[cell][REPETITION]
    values = {run.number: value for run in repetitions if (value := value_of(run)) is not None}
    tuned_at = setup.tuned_at.get(cell)
    source = runs[tuned_at][TRIAL] if tuned_at is not None and tuned_at in runs else []
    shown = repetitions[0] if repetitions else best_trial(setup, source)
    settings = shown.settings if shown is not None else {}
    ranges = setup.ranges.get(tuned_at, {}) if tuned_at is not None else {}
    edges = (edge_of(key, settings[key], each) for key, each in ranges.items() if key in settings)
    return CellResults(
        cell,
        label_of(setup, cell),
        tuple(runs[cell][TRIAL]),
        tuple(repetitions),
        tuned_at if tuned_at is not None else cell,
        label_of(setup, tuned_at if tuned_at is not None else cell),
        settings,
        tuple(edge for edge in edges if edge is not None),
        values,
        len(repetitions) - len(values),
    )


def best_trial(setup: Setup, trials: Sequence[RunResult]) -> RunResult | None:
    """The trial by which the settings of repetitions are chosen; None if no trial finished."""
    best = min(trials, key=lambda run: (setup.loss(run), run.number), default=None)
    return None if best is None or math.isinf(setup.loss(best)) else best


def edge_sentence(results: CellResults) -> str:
    """What is wrong with the search of a cell; empty if nothing is."""
    if not results.edges:
        return ""
    return f"{results.searched} has {' and '.join(map(_edge_text, results.edges))}"


def _edge_text(edge: Edge) -> str:
    value, at = f"{edge.value:.4g}", f"{edge.at:.4g}"
    if value == at:
        return f"{edge.key} {value}, the {edge.end} end of its range"
    return f"{edge.key} {value}, near the {edge.end} end of its range, {at}"
