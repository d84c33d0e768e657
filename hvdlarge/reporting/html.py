"""A report as one HTML file that needs nothing else: pictures are in it, and no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvdlarge import __version__
from hvdlarge.reporting import report_tables as tables
from hvdlarge.reporting.run_reader import RunRecords, printable

if TYPE_CHECKING:
    from hvdlarge.reporting.figures import Drawing  # needs matplotlib

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1320px; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
h3 { font-size: 1rem; margin: .8rem 0 .2rem; overflow-wrap: anywhere; }
p { max-width: 60rem; margin: .3rem 0; } .aside { color: #444; }
ul { margin: .3rem 0; padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { border: 1px solid #bbb; padding: .2rem .55rem; text-align: left; }
thead th { background: #eee; } tbody th { font-weight: normal; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
.row figure { flex: 1 1 560px; min-width: 0; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
"""


def page(
    runs: Sequence[RunRecords],
    figures: Sequence[Mapping[str, Any]],
    drawings: Sequence[Drawing],
    refresh_seconds: float | None = None,
) -> str:
    """The report of runs as an HTML document.

    Args:
        runs: at least one.
        figures: of each, as `derive` gives them.
        drawings: their figures.
        refresh_seconds: after how long a browser loads the file again; None: not at all.
    """
    title = escaped("Report: " + ", ".join(run.label for run in runs))
    parts = [f"<h1>{title}</h1>", table(tables.overview(figures)), _notes(figures)]
    if len(runs) > 1:
        parts.append(section("Settings that differ", table(tables.differing_settings(runs))))
    for each in figures:
        name = f" of {escaped(each['name'])}" if len(runs) > 1 else ""
        parts.append(section(f"Stages{name}", table(tables.stages(each))))
    for kind in dict.fromkeys(drawing.kind for drawing in drawings):
        parts.append(_figures(runs, [each for each in drawings if each.kind == kind]))
        if kind == "distance":
            parts.append(table(tables.fits(figures)))
            furthest = "\n".join(_furthest(runs, each) for each in figures)
            parts.append(f'<div class="row">\n{furthest}\n</div>')
        if kind == "phases" and len(runs) > 1:  # of one run the figure has the shares
            parts.append(table(tables.phases(figures)))
    refresh = (
        ""
        if refresh_seconds is None
        else f'<meta http-equiv="refresh" content="{max(1, round(refresh_seconds))}">\n'
    )
    return document(title, parts, refresh)


def document(title: str, parts: Sequence[str], head: str = "") -> str:
    """An HTML document.

    Args:
        title: escaped.
        parts: of its body, HTML; empty ones are left out.
        head: more of its head, HTML.
    """
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{head}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        f'<p class="aside">Written by hvdlarge {__version__}.</p>\n</body>\n</html>\n'
    )


def escaped(text: str) -> str:
    """A text of a run as HTML."""
    return html.escape(printable(text))


def section(title: str, content: str) -> str:
    """A heading (escaped) with its content (HTML); empty without content."""
    return f"<h2>{title}</h2>\n{content}" if content else ""


def table(rows: tables.Table) -> str:
    """Rows of text as a table, the first row as its heading; empty without rows."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in rows[0])
    body = "\n".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>'
        + "".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows[1:]
    )
    whole = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="wide">{whole}</div>'


def _notes(figures: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for each in figures:
        of_run = f"{each['name']}: " if len(figures) > 1 else ""
        sentences = [*each["notes"], *each["missing"]]
        parts += [f"<li>{escaped(of_run + sentence)}</li>" for sentence in sentences]
    return section("Notes", f"<ul>\n{chr(10).join(parts)}\n</ul>") if parts else ""


def picture(png: bytes, text: str) -> str:
    """A picture with a text (escaped) for those who do not see it."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{text}" src="data:image/png;base64,{data}">'


def _figures(runs: Sequence[RunRecords], drawings: Sequence[Drawing]) -> str:
    shown = []
    for drawing in drawings:
        of_run = "" if drawing.run is None else f" of {runs[drawing.run].label}"
        name = f"<h3>{escaped(of_run[4:])}</h3>" if of_run and len(runs) > 1 else ""
        image = picture(drawing.png, escaped(drawing.title + of_run))
        shown.append(f"<figure>{name}{image}</figure>")
    caption = f'<p class="aside">{escaped(drawings[0].caption)}</p>'
    row = "\n".join(shown)
    return section(escaped(drawings[0].title), f'{caption}\n<div class="row">\n{row}\n</div>')


def _furthest(runs: Sequence[RunRecords], figures: Mapping[str, Any]) -> str:
    furthest = table(tables.largest_distances(figures))
    of_run = f" of {escaped(figures['name'])}" if len(runs) > 1 else ""
    title = f"<h3>Parameters{of_run} furthest from their start</h3>"
    return f"<div>{title}\n{furthest}</div>" if furthest else ""
