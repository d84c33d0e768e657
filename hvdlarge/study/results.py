"""What the analyses of a study read: its setup, and the results of its runs.

A run is a trial of the tuning of a cell; or one of its finalists, its best trials with further
seeds, of which the best settings are chosen; or a repetition of these with a seed that the tuning
never saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

TRIAL, FINALIST, REPETITION = "trial", "finalist", "repetition"

Cell = tuple[str, ...]  # the label of the level of each factor, in the order of the factors


class Point(NamedTuple):
    """A value that a run logged.

    Attributes:
        step: number of updates that had been made, at least 1.
        epoch: passes over the training set.
        value: what was measured.
        lr: the learning rate of the last step that logged one; None if none had.
    """

    step: int
    epoch: float
    value: float
    lr: float | None


class Range(NamedTuple):
    """A searched range of numbers of a tuned key, with both ends."""

    low: float
    high: float
    log: bool


class Level(NamedTuple):
    """A level of a factor.

    Attributes:
        label: as tables show it.
        value: the number, if the factor is a key of the job and the level a number; else None.
    """

    label: str
    value: float | None


@dataclass(frozen=True)
class RunResult:
    """How a run of a study ended. Fields of numbers that the run did not reach are None.

    Attributes:
        cell: its cell.
        kind: `trial`, `finalist` (a good trial again, with another seed) or `repetition`.
        number: within the cell and kind, from 0. Repetitions of the same number have the same seed
            in all cells: they are paired.
        seed: of the job.
        settings: the tuned keys of the job, with their values.
        state: `finished`; `diverged` (loss or weights not finite, or a metric that is not);
            `failed` (any other end with an error); `pruned` (stopped by the tuning as hopeless).
        reason: why it did not finish; empty if it did.
        value: of the study's metric at the end; None unless finished.
        score: of the metric of the tuning at the end, if that is another one (`Setup.tuned_by`).
        batch: global batch at the start, in samples.
        steps: number of updates.
        epochs: passes over the training set.
        seconds: of training.
        curve: the metric at each evaluation.
        distance: Euclidean distance of all weights from their start, if measured.
        noise: gradient noise scale in samples, smoothed, if measured.
    """

    cell: Cell
    kind: Literal["trial", "finalist", "repetition"]
    number: int
    seed: int
    settings: Mapping[str, Any]
    state: Literal["finished", "diverged", "failed", "pruned"]
    reason: str = ""
    value: float | None = None
    score: float | None = None
    batch: int | None = None
    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    curve: tuple[Point, ...] = ()
    distance: tuple[Point, ...] = ()
    noise: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Setup:
    """What the analyses must know of a study file.

    Attributes:
        name: of the study.
        metric: a result of the evaluations, as `accuracy`.
        lower_is_better: whether smaller values of it are better.
        factors: the levels of each factor, in the order of the file. Empty: one cell, `()`.
        cells: all cells, in order.
        ranges: of each cell that is tuned: its keys that are searched over numbers. Cells that use
            the settings tuned at another one have none.
        tuned_at: of each cell, the cell whose tuning its settings come from: mostly itself; None if
            nothing is tuned.
        trials: of the tuning of each cell.
        repetitions: of each cell.
        tuned_by: the result by which trials are compared, if it is not the metric; else empty.
        score_lower_is_better: whether smaller values of that are better.
    """

    name: str
    metric: str
    lower_is_better: bool
    factors: Mapping[str, tuple[Level, ...]]
    cells: tuple[Cell, ...]
    ranges: Mapping[Cell, Mapping[str, Range]]
    tuned_at: Mapping[Cell, Cell | None]
    trials: int
    repetitions: int
    tuned_by: str = ""
    score_lower_is_better: bool = False

    def loss(self, run: RunResult) -> float:
        """By which trials are compared: the smaller the better, infinite for one without result."""
        score = run.score if self.tuned_by else run.value
        lower = self.score_lower_is_better if self.tuned_by else self.lower_is_better
        if run.state != "finished" or score is None or not math.isfinite(score):
            return math.inf
        return score if lower else -score
