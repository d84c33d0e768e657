"""The report of a study: as one HTML file that needs nothing else, and in words for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hvdlarge.reporting.describe import columns
from hvdlarge.reporting.html import document, escaped, picture, section, table
from hvdlarge.study.analysis.cells import CellResults, best_trial, by_cell, edge_sentence, value_of
from hvdlarge.study.analysis.compare import settings_text
from hvdlarge.study.analysis.finding import UNKNOWN, Finding, counted, ends_text, mean_text, number
from hvdlarge.study.analysis.intervals import interval, seeds_needed
from hvdlarge.study.analysis.plots import Picture
from hvdlarge.study.results import Cell, RunResult, Setup

_CONFIDENCE = 0.95  # of the intervals in the table of all cells


def study_page(
    setup: Setup,
    results: Iterable[RunResult],
    findings: Sequence[Finding],
    drawings: Sequence[Picture],
) -> str:
    """The report of a study as an HTML document.

    Args:
        setup: of the study.
        results: of its runs that have ended.
        findings: of its analyses.
        drawings: their figures; none where matplotlib is missing.
    """
    cells = by_cell(setup, results)
    title = escaped(f"Study: {setup.name}")
    pictures = {each.finding: each for each in drawings}
    verdicts = "\n".join(
        f"<li><strong>{escaped(each.title)}.</strong> {escaped(each.verdict)}</li>"
        for each in findings
    )
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{escaped(progress(setup, cells))}</p>",
        section("Verdicts", f"<ul>\n{verdicts}\n</ul>" if findings else ""),
    ]
    parts += [_finding(each, pictures.get(place)) for place, each in enumerate(findings)]
    parts.append(section("All cells", table(cells_table(setup, cells)) + _cells_note(setup)))
    return document(title, parts)


def in_words(setup: Setup, results: Iterable[RunResult], findings: Sequence[Finding]) -> list[str]:
    """The report of a study as lines of text.

    Args:
        setup: of the study.
        results: of its runs that have ended.
        findings: of its analyses.
    """
    cells = by_cell(setup, results)
    lines = [f"study {setup.name}: {progress(setup, cells)}", ""]
    lines += columns(cells_table(setup, cells))
    for each in findings:
        lines += ["", f"{each.kind}: {each.title}", f"  {each.verdict}"]
        lines += ["", *columns(each.table)] if each.table else []
        lines += [f"  note: {note}" for note in each.notes]
    return lines


def progress(setup: Setup, cells: Mapping[Cell, CellResults]) -> str:
    """How many of the study's runs have ended, and how, in a sentence."""
    tuned = sum(setup.tuned_at.get(cell) == cell for cell in setup.cells)
    trials = sum(len(each.trials) for each in cells.values())
    repetitions = sum(len(each.repetitions) for each in cells.values())
    parts = [counted(len(setup.cells), "cell")]
    if tuned:
        parts.append(f"{trials} of {tuned * setup.trials} trials")
    parts.append(f"{repetitions} of {len(setup.cells) * setup.repetitions} repetitions have ended")
    runs = [run for each in cells.values() for run in (*each.trials, *each.repetitions)]
    ends = [run.state for run in runs if value_of(run) is None]
    states = [f"{ends.count(state)} {state}" for state in ("diverged", "failed", "pruned")]
    unusual = [text for text in states if not text.startswith("0 ")]
    text = ", ".join([*parts, *unusual])
    return f"{text}. The metric is {setup.metric}; {_direction(setup)} is better."


def cells_table(setup: Setup, cells: Mapping[Cell, CellResults]) -> list[tuple[str, ...]]:
    """A row for each cell: its levels, trials, best settings, repetitions and their mean."""
    factors = tuple(setup.factors) or ("study",)
    rows: list[tuple[str, ...]] = [
        (*factors, "trials", "best trial", "settings", "repetitions", "mean")
        + ("95 % interval", "failed", "remark")
    ]
    for cell, each in cells.items():
        found = interval([*each.values.values()], _CONFIDENCE)
        row = (*(cell or (setup.name,)), _trials(setup, each), _best_trial(setup, each))
        row += (settings_text(each) or UNKNOWN,)
        row += (f"{len(each.repetitions)} of {setup.repetitions}", mean_text(found))
        row += (ends_text(found), f"{each.failures}" if each.failures else UNKNOWN)
        rows.append((*row, _remark(each)))
    return rows


def _direction(setup: Setup) -> str:
    return "lower" if setup.lower_is_better else "higher"


def _trials(setup: Setup, cell: CellResults) -> str:
    tuned_at = setup.tuned_at.get(cell.cell)
    if tuned_at is None:
        return UNKNOWN
    if tuned_at != cell.cell:
        return f"those of {', '.join(tuned_at)}"
    finished = sum(value_of(run) is not None for run in cell.trials)
    ended = f"{len(cell.trials)} of {setup.trials}"
    lost = len(cell.trials) - finished
    return f"{ended}, {lost} without a result" if lost else ended


def _best_trial(setup: Setup, cell: CellResults) -> str:
    best = best_trial(setup, cell.trials)
    return UNKNOWN if best is None else number(value_of(best))


def _remark(cell: CellResults) -> str:
    remarks = [edge_sentence(cell)] if cell.edges else []
    if cell.failures:
        remarks.append(
            f"mean of the {len(cell.values)} that finished" if cell.values else "none finished"
        )
    reasons = dict.fromkeys(run.reason for run in cell.repetitions if run.reason)
    remarks += [reason[:120] for reason in list(reasons)[:1]]
    return "; ".join(remarks) or UNKNOWN


def _cells_note(setup: Setup) -> str:
    tuned = any(cell is not None for cell in setup.tuned_at.values())
    settings = (
        "Repetitions have the best settings of the tuning and seeds that it never saw. "
        if tuned
        else ""
    )
    return (
        f'\n<p class="aside">{settings}Intervals of means need {seeds_needed(_CONFIDENCE)} '
        "finished repetitions.</p>"
    )


def _finding(finding: Finding, drawn: Picture | None) -> str:
    parts = [f"<p>{escaped(finding.verdict)}</p>"]
    if drawn is not None and finding.plot is not None:
        image = picture(drawn.png, escaped(f"{finding.title}: {finding.verdict}"))
        parts.append(f"<figure>{image}</figure>")
        parts.append(f'<p class="aside">{escaped(finding.plot.caption)}</p>')
    parts.append(table(finding.table))
    if finding.notes:
        notes = "\n".join(f"<li>{escaped(note)}</li>" for note in finding.notes)
        parts.append(f'<ul class="aside">\n{notes}\n</ul>')
    return section(escaped(finding.title), "\n".join(part for part in parts if part))
