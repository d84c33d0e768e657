"""Reports on runs: `python -m hvdlarge.report runs/A [runs/B …]`.

Writes one HTML file and its pictures, for runs that are finished, go on, were killed, or were
resumed. Needs no torch, Horovod or MPI; without matplotlib it prints a summary.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlarge import exits
from hvdlarge.reporting.derived import derive
from hvdlarge.reporting.run_reader import RunRecords, find_runs, printable
from hvdlarge.reporting.summary_text import in_words
from hvdlarge.reporting.targets import parse_target
from hvdlarge.study.folder import is_study
from hvdlarge.telemetry.console import print_error, print_status

_INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended
_QUIET_SECONDS = 600.0  # a watch ends if a run writes nothing for so long
_PICTURES = re.compile(r"(progress|noise|(ratios|distance|phases)-\d+)\.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _report(options)
    except exits.RunExit as end:
        print_error(str(end))
        return end.code
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.report",
        description=(
            "A report on runs, finished or not, as one HTML file and its pictures: loss, results, "
            "schedule, trust ratios, gradient noise scale, distance of the weights, times. Several "
            "runs are compared. Needs no torch and no MPI, but matplotlib for the pictures."
        ),
        epilog=(
            "Exit codes: 0, 2 for a wrong command line, for what is not a run, or for a report "
            "that cannot be written (74 for that of a study), 130 after Ctrl-C."
        ),
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run folder, or its name in runs/; or that of a study",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the HTML file; the pictures are written to the folder FILE without .html (default: "
        "report.html in the run folder; for several runs, in the current folder)",
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="RESULT=VALUE",
        help="report the time to this result of the evaluations, as accuracy=0.98 or "
        "perplexity<=80; may be repeated",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--text", action="store_true", help="print a summary, write nothing")
    how.add_argument("--json", action="store_true", help="print the figures as JSON, write nothing")
    parser.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help="write the report again after so many seconds, until all runs have ended or written "
        "nothing for 10 minutes",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 0.1 to 86400 seconds")
    return seconds


def _report(options: argparse.Namespace) -> int:
    if studies := [name for name in options.runs if _study_folder(name) is not None]:
        return _report_on_study(studies[0], options)
    targets = list(dict.fromkeys(parse_target(text) for text in options.target))
    folders, notes = find_runs(options.runs)
    runs = [RunRecords(folder, label, targets) for label, folder in folders.items()]
    if importlib.util.find_spec("matplotlib") is None and not (options.text or options.json):
        options.text = True
        notes.append(
            "a report in HTML needs matplotlib (pip install 'hvdlarge[plot]'); this is the summary"
        )
    out = None if options.text or options.json else _output(options.out, runs)
    for note in notes:
        where = sys.stderr if options.json else sys.stdout
        print(printable(f"note     {note}"), file=where, flush=True)
    while True:
        for run in runs:
            run.update()
        watching = options.watch is not None and any(_goes_on(run) for run in runs)
        _write(runs, options, out, options.watch if watching else None)
        if not watching:
            return exits.FINISHED
        time.sleep(options.watch)


def _study_folder(name: str) -> Path | None:
    """The folder of a study of this name or path; None if there is none."""
    return next((each for each in (Path(name), Path("runs") / name) if is_study(each)), None)


def _report_on_study(name: str, options: argparse.Namespace) -> int:
    from hvdlarge.study.report import study_in_words, study_json, write_study_report

    for given, what in (
        (len(options.runs) > 1, "further runs or studies"),
        (options.target, "--target"),
        (options.watch is not None, "--watch"),
    ):
        if given:
            raise exits.JobError(f"{name} is a study, of which a report has no {what}")
    folder = _study_folder(name)
    assert folder is not None
    if options.json:
        print_status(json.dumps(study_json(folder), indent=2))
        return exits.FINISHED
    if options.text:
        lines = study_in_words(folder)
    else:
        lines = write_study_report(folder, _html_file(options.out, folder))
    print_status("\n".join(lines))
    return exits.FINISHED


def _goes_on(run: RunRecords) -> bool:
    if run.state == "finished":
        return False
    return run.last_seen is None or time.time() - run.last_seen < _QUIET_SECONDS


def _output(name: str | None, runs: Sequence[RunRecords]) -> Path:
    """The HTML file to write.

    Raises:
        JobError: if no such file can be written.
    """
    return _html_file(name, runs[0].folder if len(runs) == 1 else Path())


def _html_file(name: str | None, folder: Path) -> Path:
    if name is None:
        return folder / "report.html"
    out = Path(name)
    if out.suffix.lower() not in (".html", ".htm"):
        raise exits.JobError(f"--out {name}: the name must end with .html")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise exits.JobError(f"--out {name}: it is a folder, or its folder does not exist")
    return out


def _write(
    runs: Sequence[RunRecords], options: argparse.Namespace, out: Path | None, again: float | None
) -> None:
    """Print or write the report; `again` is in how many seconds the next is due."""
    figures = [derive(run) for run in runs]
    if options.json:
        print_status(json.dumps(figures, indent=None if again else 2))
    elif out is None:
        print_status("\n".join(in_words(runs, figures)))
    else:
        count = write_report(runs, figures, out, again)
        written = f"{out}: {count} {'figure' if count == 1 else 'figures'}{_ends(figures)}"
        print_status(printable(written))


def _ends(figures: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"; {each['name']} is {each['state']} at epoch {each['epochs']:.4g}" for each in figures
    )


def write_report(
    runs: Sequence[RunRecords],
    figures: Sequence[Mapping[str, Any]],
    out: Path,
    refresh_seconds: float | None = None,
) -> int:
    """Write the HTML file, and its pictures to the folder of its name; returns how many these are.

    Each file is written whole or not at all. Pictures of an earlier report are removed.

    Args:
        runs: at least one.
        figures: of each, as `derive` gives them.
        out: the HTML file.
        refresh_seconds: after how long a browser loads it again; None: not at all.

    Raises:
        JobError: if a file cannot be written.
    """
    from hvdlarge.reporting.figures import draw_all  # needs matplotlib
    from hvdlarge.reporting.html import page

    drawings = draw_all(runs)
    pictures = out.with_suffix("")
    try:
        if drawings:
            pictures.mkdir(exist_ok=True)
    except OSError as error:
        raise exits.JobError(
            f"{pictures}: cannot be created: {error.strerror}; --out FILE names another place"
        ) from None
    for drawing in drawings:
        _replace(pictures / drawing.file_name, drawing.png)
    _replace(out, page(runs, figures, drawings, refresh_seconds).encode("utf-8"))
    _remove_others(pictures, {drawing.file_name for drawing in drawings})
    return len(drawings)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise exits.JobError(
            f"{path}: cannot be written: {error.strerror}; --out FILE names another place"
        ) from None


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove the pictures of an earlier report that this one does not have."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _PICTURES.fullmatch(path.name) and path.name not in names:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main())
