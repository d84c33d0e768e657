"""Writes the results of a study into its page in docs/studies, or compares a repetition with them.

    python studies/publish.py runs/adabatch            tables, verdicts, figures and trials
    python studies/publish.py runs/adabatch --check    does this study reproduce the published one?

All trials go to docs/studies/NAME.jsonl, a line each, and the figures beside it. The page keeps
what lies outside its two marks. Nothing is written unless the page has both, and all repetitions of
the study have ended (exit code 2).

`--check` compares the repetitions of each cell with the published ones of the same seed. A cell is
not reproduced if the mean of these differences is shown to differ from 0 (at 5 %, corrected for the
number of cells by Holm's method), or if the repetition of a published seed is missing or failed.
Exit code 1 if there is such a cell: a faithful repetition has one by chance in about 5 % of cases.
A study may repeat some of the cells: the others are listed as not repeated; exit code 1 if all are.
Beside it is printed whether each new mean lies in the published interval (95 %, over the seeds); as
both means have an error, about one cell in seven lies outside by chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from hvdlarge.exits import JobError, RunExit
from hvdlarge.study.analysis.cells import by_cell, value_of
from hvdlarge.study.analysis.drawing import draw
from hvdlarge.study.analysis.finding import Finding, counted, listed, mean_and_ends, number
from hvdlarge.study.analysis.intervals import Interval, holm, interval, p_value
from hvdlarge.study.folder import read_results, read_setup, record_json, result_of
from hvdlarge.study.page import cells_table
from hvdlarge.study.report import study_findings
from hvdlarge.study.results import FINALIST, REPETITION, TRIAL, Cell, Point, RunResult

PAGES = Path(__file__).parents[1] / "docs" / "studies"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_LEVEL = 0.05  # of a false alarm in any cell
_SLACK = 1e-9  # of results that are equal but for rounding
_MOST_POINTS = 40  # of a series, in the file of trials


def main() -> int:
    """Publish or compare; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a study")
    parser.add_argument("--check", action="store_true", help="compare with the published results")
    options = parser.parse_args()
    try:
        if options.check:
            return check(options.folder)
        publish(options.folder)
    except RunExit as problem:
        print(problem, file=sys.stderr)
        return problem.code
    return 0


def publish(folder: Path) -> None:
    """Write page, figures and trials of a study.

    Raises:
        JobError: if it has not ended or its page lacks the marks; nothing is written.
    """
    setup, results, findings = study_findings(folder)
    name = setup.name
    cells = by_cell(setup, results)
    short = [
        f"{each.label} ({len(each.repetitions)} of {setup.repetitions})"
        for each in cells.values()
        if len(each.repetitions) < setup.repetitions
    ]
    if short:
        raise JobError(f"{folder}: repetitions have not ended yet: {listed(short)}; go on with it")
    page = PAGES / f"{name}.md"
    before, after = _around_marks(page)
    lines = [record_json(_thinned(each)) for each in sorted(results, key=_order)]
    (PAGES / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for old in PAGES.glob(f"{name}-*.png"):
        old.unlink()
    figures: dict[int, str] = {}
    drawn: set[bytes] = set()  # comparisons with several baselines have one figure
    for picture in draw(findings):
        if picture.png not in drawn:
            figures[picture.finding] = f"{name}-{picture.file_name}"
            (PAGES / figures[picture.finding]).write_bytes(_small(picture.png))
            drawn.add(picture.png)
    parts = [_table(cells_table(setup, cells))]
    for place, finding in enumerate(findings):
        parts += _section(finding, figures.get(place))
    page.write_text("\n\n".join([f"{before}{BEGIN}", *parts, f"{END}{after}"]), encoding="utf-8")
    print(f"{page}: {len(results):,} runs, {len(findings)} analyses")


def _around_marks(page: Path) -> tuple[str, str]:
    """What a page has before and after its marks.

    Raises:
        JobError: if it is not there or lacks a mark.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"{page}: no such page; write it first, with {BEGIN} and {END}") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise JobError(f"{page}: it must have {BEGIN} and, after it, {END}")
    return before, after


def check(folder: Path) -> int:
    """Compare the repetitions of a repeated study with the published ones of the same seeds.

    Args:
        folder: of the repeated study, which may have some of the published cells.

    Returns:
        1 if a cell is not reproduced, or none is repeated; of faithful repetitions in about 5 % of
        cases. Else 0.
    """
    setup, _ = read_setup(folder)
    trials = PAGES / f"{setup.name}.jsonl"
    if not trials.exists():
        print(f"{trials}: not there; nothing of {setup.name} is published")
        return 1
    lines = trials.read_text(encoding="utf-8").splitlines()
    runs = [result_of(json.loads(line)) for line in lines]
    published, repeated = _values(runs), _values(read_results(folder))
    pairs = {
        cell: [
            value - published[cell][seed]
            for seed, value in repeated[cell].items()
            if seed in published[cell]
        ]
        for cell in setup.cells
        if published[cell]
    }
    p_values = dict(zip(pairs, holm([p_value(each) for each in pairs.values()]), strict=True))
    different = inside = 0
    for cell, differences in pairs.items():
        old, new = published[cell], repeated[cell]
        found = interval([*old.values()], 0.95)
        problem = _difference(differences, len(old), p_values[cell])
        place, within = _place(found, [*new.values()])
        different, inside = different + bool(problem), inside + within
        print(f"{', '.join(cell) or setup.name}: {place}{f': {problem}' if problem else ''}")
    known = dict.fromkeys(run.cell for run in runs)
    for cell in setup.cells:
        if cell not in pairs:
            why = "no published repetition finished" if cell in known else "new, not published"
            print(f"{', '.join(cell) or setup.name}: {why}")
    left_out = [cell for cell in known if cell not in setup.cells]
    for cell in left_out:
        print(f"{', '.join(cell)}: published, not repeated")
    print(
        f"{counted(len(pairs), 'cell')} compared, {different} not reproduced, {len(left_out)} not "
        f"repeated; {inside} new means in the published interval"
    )
    return 1 if different or not pairs else 0


def _difference(differences: Sequence[float], published: int, p: float | None) -> str:
    """Why a cell is not reproduced; empty if it is."""
    if len(differences) < published:
        return (
            f"NOT REPRODUCED, {len(differences)} of {published} repetitions finished with the "
            "published seeds"
        )
    if all(abs(each) <= _SLACK for each in differences):
        return ""
    if p is None:
        return f"NOT REPRODUCED, differs, with too few seeds for a test ({len(differences)})"
    return f"NOT REPRODUCED, p = {p:.2g}" if p <= _LEVEL + 1e-12 else ""


def _place(found: Interval, values: Sequence[float]) -> tuple[str, bool]:
    """The new mean and the published one with its interval, and whether it holds the new one."""
    if not values:
        return f"no mean, published {mean_and_ends(found)}", False
    new = sum(values) / len(values)
    text = f"{number(new)}, published {mean_and_ends(found)}"
    if found.low is None or found.high is None:
        return text, False
    inside = found.low - _SLACK <= new <= found.high + _SLACK
    return f"{text}, {'inside' if inside else 'outside'}", inside


def _values(results: Iterable[RunResult]) -> dict[Cell, dict[int, float]]:
    """The metric of the finished repetitions of each cell, by their seed."""
    values: dict[Cell, dict[int, float]] = defaultdict(dict)
    for each in results:
        if each.kind == REPETITION and (value := value_of(each)) is not None:
            values[each.cell][each.seed] = value
    return values


def _order(result: RunResult) -> tuple[Cell, int, int]:
    return result.cell, (TRIAL, FINALIST, REPETITION).index(result.kind), result.number


def _thinned(result: RunResult) -> RunResult:
    """A result whose series have few points, and no evaluations before the last."""
    return dataclasses.replace(
        result,
        curve=result.curve[-1:],
        distance=_few(result.distance),
        noise=_few(result.noise),
    )


def _few(points: Sequence[Point]) -> tuple[Point, ...]:
    every = -(-len(points) // _MOST_POINTS) or 1
    kept = [point for place, point in enumerate(points) if (len(points) - 1 - place) % every == 0]
    return tuple(
        Point(point.step, round(point.epoch, 4), float(f"{point.value:.6g}"), point.lr)
        for point in kept
    )


def _section(finding: Finding, figure: str | None) -> list[str]:
    parts = [f"### {finding.title}", f"**{finding.verdict}**"]
    if finding.table:
        parts.append(_table(finding.table))
    if figure is not None:
        parts.append(f"![{finding.title}]({figure})")
    if finding.notes:
        parts.append("\n".join(f"- {note}" for note in finding.notes))
    return parts


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    return "\n".join([line(rows[0]), line("---" for _ in rows[0]), *map(line, rows[1:])])


def _small(png: bytes) -> bytes:
    """A picture with 64 colours, a third of the size."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64).save(buffer, "png", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
