"""Runs the analyses of a study on its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from hvdlarge.study.analysis.batch_limit import batch_limit
from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.compare import compare
from hvdlarge.study.analysis.diffusion import diffusion
from hvdlarge.study.analysis.finding import Finding
from hvdlarge.study.analysis.ladder import ladder
from hvdlarge.study.analysis.lr_range import lr_range
from hvdlarge.study.analysis.noise_scale import noise_scale
from hvdlarge.study.analysis.sections import (
    AnalysisSection,
    BatchLimit,
    Compare,
    Diffusion,
    Ladder,
    LrRange,
)
from hvdlarge.study.results import RunResult, Setup


def analyse(
    sections: Sequence[AnalysisSection], setup: Setup, results: Iterable[RunResult]
) -> list[Finding]:
    """The findings of a study, one for each section; of an unfinished study, what is known so far.

    Args:
        sections: the `analysis` list, in which `sections.check` finds nothing.
        setup: of the study.
        results: of the runs that have ended, in any order.
    """
    cells = by_cell(setup, results)
    findings = []
    for section in sections:
        if isinstance(section, Compare):
            findings.append(compare(section, setup, cells))
        elif isinstance(section, BatchLimit):
            findings.append(batch_limit(section, setup, cells))
        elif isinstance(section, Ladder):
            findings.append(ladder(section, setup, cells))
        elif isinstance(section, LrRange):
            findings.append(lr_range(section, setup, cells))
        elif isinstance(section, Diffusion):
            findings.append(diffusion(section, setup, cells))
        else:
            findings.append(noise_scale(section, setup, cells))
    return _distinct(findings)


def _distinct(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, with a number in each title that another before it has."""
    seen: dict[str, int] = {}
    result = []
    for each in findings:
        seen[each.title] = count = seen.get(each.title, 0) + 1
        title = each.title if count == 1 else f"{each.title} ({count})"
        result.append(dataclasses.replace(each, title=title))
    return result
