"""Differences between cells, paired by seed: the comparison that several analyses share.

A repetition that ended without a value is never left out silently. The mean of its cell is over the
finished ones, which flatters the cell; so the cell can be declared neither better than another nor
within tolerance of it, and no cell can be declared worse than it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvdlarge.study.analysis.cells import CellResults, edge_sentence
from hvdlarge.study.analysis.finding import counted, interval_facts
from hvdlarge.study.analysis.intervals import Interval, holm, interval, p_value, seeds_needed
from hvdlarge.study.results import Setup


@dataclass(frozen=True)
class Difference:
    """What a cell gains over another.

    Attributes:
        arm: the cell.
        base: the other.
        gain: mean difference over the seeds that finished in both; positive is better, whichever
            way the metric points.
        gains: of each seed.
        p: p-value of no difference; None with too few seeds.
        p_within: p-value of a loss of exactly the tolerance.
        tolerance: in the unit of the metric; 0: not judged.
    """

    arm: CellResults
    base: CellResults
    gain: Interval
    gains: tuple[float, ...]
    p: float | None
    p_within: float | None
    tolerance: float

    @property
    def void(self) -> list[str]:
        """Why the comparison is void: best settings at the edge of their searched range."""
        texts = [text for each in (self.arm, self.base) if (text := edge_sentence(each))]
        return list(dict.fromkeys(texts))


@dataclass(frozen=True)
class Judgement:
    """A difference, judged together with others.

    Attributes:
        difference: that is judged.
        p: p-value of no difference, corrected for the others.
        p_within: p-value of a loss of exactly the tolerance, corrected.
        outcome: in words.
        better: whether the cell is better, beyond doubt at the confidence level.
        worse: whether it is worse.
        within: whether it is within tolerance; None if there is no tolerance.
        beyond: whether it is worse by more than the tolerance.
    """

    difference: Difference
    p: float | None
    p_within: float | None
    outcome: str
    better: bool = False
    worse: bool = False
    within: bool | None = None
    beyond: bool = False

    def facts(self) -> dict[str, Any]:
        """The numbers, as JSON has them."""
        difference = self.difference
        return {
            "arm": list(difference.arm.cell),
            "base": list(difference.base.cell),
            "gain": interval_facts(difference.gain),
            "p": self.p,
            "p_within": self.p_within,
            "outcome": self.outcome,
            "better": self.better,
            "worse": self.worse,
            "within": self.within,
            "beyond": self.beyond,
            "void": difference.void,
        }


def difference(
    setup: Setup,
    arm: CellResults,
    base: CellResults,
    confidence: float,
    tolerance: float = 0.0,
    precise: bool = False,
) -> Difference:
    """What a cell gains over another, by the seeds that finished in both.

    Args:
        setup: of the study.
        arm: the cell.
        base: the other.
        confidence: level, in (0, 1).
        tolerance: in the unit of the metric; 0: not judged.
        precise: whether small p-values are worth more draws, as among many comparisons.
    """
    sign = -1.0 if setup.lower_is_better else 1.0
    gains = tuple(
        sign * (value - base.values[seed])
        for seed, value in arm.values.items()
        if seed in base.values
    )
    enough = len(gains) >= seeds_needed(confidence)
    return Difference(
        arm,
        base,
        interval(gains, confidence),
        gains,
        p_value(gains, precise=precise) if enough else None,
        p_value(gains, -tolerance, precise) if enough and tolerance > 0 else None,
        tolerance,
    )


def judge(
    differences: Sequence[Difference],
    confidence: float,
    comparisons: int | None = None,
    corrected: bool = True,
) -> list[Judgement]:
    """Judges differences together: p-values are corrected by Holm's method, so that in all of them
    one false positive is at most as likely as 1 - confidence.

    Args:
        differences: to judge.
        confidence: level, in (0, 1).
        comparisons: that count, if they are more than the differences.
        corrected: False for comparisons of which each stands for itself.
    """
    no_difference = [each.p for each in differences]
    within = [each.p_within for each in differences]
    if corrected:
        no_difference, within = holm(no_difference, comparisons), holm(within, comparisons)
    return [
        _judge(each, p, p_within, confidence)
        for each, p, p_within in zip(differences, no_difference, within, strict=True)
    ]


def _judge(
    difference: Difference, p: float | None, p_within: float | None, confidence: float
) -> Judgement:
    needed = seeds_needed(confidence)
    outcome = _hindrance(difference, needed)
    gain, level = difference.gain.mean, 1 - confidence + 1e-12
    if outcome or gain is None or p is None:
        return Judgement(difference, p, p_within, outcome)
    flattered, base_flattered = difference.arm.failures > 0, difference.base.failures > 0
    better = p <= level and gain > 0 and not flattered
    worse = p <= level and gain < 0 and not base_flattered
    within, beyond = None, False
    if difference.tolerance > 0:
        excluded = p_within is not None and p_within <= level
        # The corrections of the two families may disagree, the facts cannot
        within = better or (excluded and gain > -difference.tolerance and not flattered)
        beyond = excluded and gain < -difference.tolerance and not base_flattered
        worse = worse or beyond
    words = ["better" if better else "worse" if worse else "no difference shown"]
    if difference.tolerance > 0:
        place = "within tolerance" if within else "beyond tolerance" if beyond else ""
        words.append(place or "tolerance undecided")
    for each in (difference.arm, difference.base):
        if each.failures:
            words.append(_failures(each))
    return Judgement(difference, p, p_within, ", ".join(words), better, worse, within, beyond)


def _hindrance(difference: Difference, needed: int) -> str:
    """Why a difference cannot be judged; empty if it can."""
    if difference.void:
        at_edge = [each.searched for each in (difference.arm, difference.base) if each.edges]
        return f"void: best settings of {' and '.join(dict.fromkeys(at_edge))} at an edge"
    for each in (difference.arm, difference.base):
        if not each.repetitions:
            return f"no repetition of {each.label} yet"
        if not each.values:
            return f"all {each.failures} repetitions of {each.label} failed"
    if len(difference.gains) < needed:
        have = counted(len(difference.gains), "seed")
        failed = [_failures(each) for each in (difference.arm, difference.base) if each.failures]
        return ", ".join([f"too few seeds: {have} in both, {needed} needed", *failed])
    return ""


def _failures(results: CellResults) -> str:
    return f"{results.failures} of {len(results.repetitions)} of {results.label} failed"
