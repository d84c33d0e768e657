"""Writes the results of a study into its page in docs/studies, or compares a repetition with them.

    python studies/publish.py runs/adabatch            tables, verdicts, figures and trials
    python studies/publish.py runs/adabatch --check    does this study reproduce the published one?

All trials go to docs/studies/NAME.jsonl, a line each, and the figures beside it. The page keeps
what lies outside its two marks. `--check` compares each cell that has repetitions in both with the
published interval of its mean (95 %, over the seeds); exit code 1 if one lies outside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from hvdlarge.study.analysis.cells import by_cell
from hvdlarge.study.analysis.drawing import draw
from hvdlarge.study.analysis.finding import Finding
from hvdlarge.study.analysis.intervals import interval
from hvdlarge.study.folder import read_setup, record_json, result_of
from hvdlarge.study.page import cells_table
from hvdlarge.study.report import study_findings
from hvdlarge.study.results import Cell, Point, RunResult

PAGES = Path(__file__).parents[1] / "docs" / "studies"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_MOST_POINTS = 40  # of a series, in the file of trials


def main() -> int:
    """Publish or compare; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a study")
    parser.add_argument("--check", action="store_true", help="compare with the published results")
    options = parser.parse_args()
    if options.check:
        return check(options.folder)
    publish(options.folder)
    return 0


def publish(folder: Path) -> None:
    """Write page, figures and trials of a study."""
    setup, results, findings = study_findings(folder)
    name = setup.name
    lines = [record_json(_thinned(each)) for each in sorted(results, key=_order)]
    (PAGES / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for old in PAGES.glob(f"{name}-*.png"):
        old.unlink()
    figures = {}
    for picture in draw(findings):
        figures[picture.finding] = f"{name}-{picture.file_name}"
        (PAGES / figures[picture.finding]).write_bytes(_small(picture.png))
    parts = [_table(cells_table(setup, by_cell(setup, results)))]
    for number, finding in enumerate(findings):
        parts += _section(finding, figures.get(number))
    page = PAGES / f"{name}.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text("\n\n".join([f"{before}{BEGIN}", *parts, f"{END}{after}"]), encoding="utf-8")
    print(f"{page}: {len(results):,} runs, {len(findings)} analyses")


def check(folder: Path) -> int:
    """Compare the means of a repeated study with the published intervals."""
    setup, _ = read_setup(folder)
    text = (PAGES / f"{setup.name}.jsonl").read_text(encoding="utf-8")
    published = _means([result_of(json.loads(line)) for line in text.splitlines()])
    repeated = _means(study_findings(folder)[1])
    outside = compared = 0
    for cell, values in repeated.items():
        found = interval(published.get(cell, []), 0.95)
        if found.low is None or found.high is None or len(values) < found.seeds:
            continue
        mean = sum(values) / len(values)
        inside = found.low <= mean <= found.high
        compared, outside = compared + 1, outside + (not inside)
        print(
            f"{', '.join(cell) or setup.name}: {mean:.6g}, published {found.mean:.6g} "
            f"[{found.low:.6g}, {found.high:.6g}]{'' if inside else ': outside'}"
        )
    print(f"{compared} cells compared, {outside} outside the published interval")
    return 1 if outside or not compared else 0


def _means(results: Iterable[RunResult]) -> dict[Cell, list[float]]:
    values: dict[Cell, list[float]] = defaultdict(list)
    for each in results:
        if each.kind == "repetition" and each.value is not None:
            values[each.cell].append(each.value)
    return values


def _order(result: RunResult) -> tuple[Cell, bool, int]:
    return result.cell, result.kind == "repetition", result.number


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
