"""The report as one file of HTML that needs nothing else, and its figures as files."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from hvdlarge.reporting.figures import Drawn
from hvdlarge.reporting.report_text import Target, run_rows, stage_rows
from hvdlarge.reporting.run_reader import RunRecords

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: 0.85rem; }
div.wide { overflow-x: auto; }
th, td { text-align: left; padding: 0.25rem 0.9rem 0.25rem 0; white-space: nowrap;
         border-bottom: 1px solid #e5e5e5; }
img { max-width: 100%; }
.note { color: #555; }
"""


def page(runs: Sequence[RunRecords], drawn: Sequence[Drawn], target: Target | None) -> str:
    """The page of some runs; every word of theirs is escaped."""
    title = ", ".join(run.name for run in runs)
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        _table(run_rows(runs, target)),
    ]
    for run in runs:
        parts += [f'<p class="note">{_text(run.name)}: {_text(note)}</p>' for note in run.notes]
    for figure in drawn:
        parts.append(f"<h2>{_text(figure.title)}</h2>")
        if figure.png is None:
            parts.append(f'<p class="note">{_text(figure.missing)}</p>')
        else:
            data = base64.b64encode(figure.png).decode()
            parts.append(f'<img alt="{_text(figure.title)}" src="data:image/png;base64,{data}">')
    for run in runs:
        parts += [f"<h2>Stages: {_text(run.name)}</h2>", _table(stage_rows(run))]
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _text(words: str) -> str:
    return html.escape(words)
