"""A report as lines for a terminal. Needs no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvdlarge.reporting import report_tables as tables
from hvdlarge.reporting.describe import columns
from hvdlarge.reporting.run_reader import RunRecords, printable


def in_words(runs: Sequence[RunRecords], figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """The report of runs.

    Args:
        runs: at least one.
        figures: of each, as `derive` gives them.
    """
    lines = columns(_printable(tables.overview(figures)))
    for each in figures:
        lines += _section(f"stages of {each['name']}", tables.stages(each))
    lines += _section("share of the time of steps, on rank 0", tables.phases(figures))
    lines += _section("fits of the distance of the weights", tables.fits(figures))
    if len(runs) > 1:
        lines += _section("settings that differ", tables.differing_settings(runs))
    for each in figures:
        of_run = f"{each['name']}: " if len(figures) > 1 else ""
        notes = [*each["notes"], *each["missing"]]
        lines += [f"note     {printable(of_run + note)}" for note in notes]
    return lines


def _section(title: str, table: tables.Table) -> list[str]:
    return ["", printable(title), *columns(_printable(table))] if table else []


def _printable(table: tables.Table) -> tables.Table:
    return [tuple(map(printable, row)) for row in table]
