"""The report of a study: one HTML file with its figures, and its verdicts in words."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hvdlarge.exits import CheckpointWriteError, JobError
from hvdlarge.study.analysis.dispatch import analyse
from hvdlarge.study.analysis.finding import Finding
from hvdlarge.study.analysis.sections import Analysis
from hvdlarge.study.folder import read_results, read_setup
from hvdlarge.study.page import in_words, study_page
from hvdlarge.study.results import RunResult, Setup
from hvdlarge.telemetry.console import print_status

_SECTIONS: TypeAdapter[list[Analysis]] = TypeAdapter(list[Analysis])
_PICTURES = re.compile(r"\d+-[a-z_]+\.png")


def write_study_report(folder: Path, out: Path | None) -> list[str]:
    """Print the verdicts of a study as far as it has come, and write its report; returns what was
    written, in words.

    Without matplotlib nothing is written, and the words say so.

    Args:
        folder: of the study.
        out: the HTML file; None: report.html in the folder. Its figures go to the folder of the
            same name without .html.

    Raises:
        JobError: if the folder cannot be read.
        CheckpointWriteError: if the report cannot be written.
    """
    setup, results, findings = study_findings(folder)
    print_status("\n".join(in_words(setup, results, findings)))
    if importlib.util.find_spec("matplotlib") is None:
        return ["note     a report in HTML needs matplotlib (pip install 'hvdlarge[plot]')"]
    from hvdlarge.study.analysis.drawing import draw

    out = folder / "report.html" if out is None else out
    pictures = draw(findings)
    page = study_page(setup, results, findings, pictures)
    _write(folder, out, page, {picture.file_name: picture.png for picture in pictures})
    return [f"report   {out}"]


def study_in_words(folder: Path) -> list[str]:
    """The verdicts of a study as far as it has come, as lines.

    Raises:
        JobError: if the folder cannot be read.
    """
    return in_words(*study_findings(folder))


def study_findings(folder: Path) -> tuple[Setup, list[RunResult], list[Finding]]:
    """What the analyses of a study find in the runs that have ended.

    Raises:
        JobError: if the folder cannot be read.
    """
    setup, analysis = read_setup(folder)
    try:
        sections = _SECTIONS.validate_json(json.dumps(analysis))
    except ValidationError as error:
        raise JobError(
            f"{folder}: its analyses are those of another version of hvdlarge "
            f"({error.errors()[0]['msg']}); run the study again"
        ) from None
    results = read_results(folder)
    return setup, results, analyse(sections, setup, results)


def study_json(folder: Path) -> dict[str, Any]:
    """The findings as plain values."""
    setup, results, findings = study_findings(folder)
    return {
        "study": setup.name,
        "metric": setup.metric,
        "ended": len(results),
        "findings": [
            {"kind": each.kind, "title": each.title, "verdict": each.verdict, **each.facts}
            for each in findings
        ],
    }


def _write(study: Path, out: Path, page: str, pictures: dict[str, bytes]) -> None:
    folder = out.with_suffix("")
    try:
        if pictures:
            folder.mkdir(exist_ok=True)
        for name, png in pictures.items():
            _replace(folder / name, png)
        _replace(out, page.encode("utf-8"))
    except OSError as error:
        raise CheckpointWriteError.of(
            f"the report {out}",
            out.parent,
            error,
            f"the results are in {study}, and `hvdlarge report {study} --out FILE` writes their "
            "report elsewhere",
        ) from None
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _PICTURES.fullmatch(path.name) and path.name not in pictures:
                path.unlink()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
