"""Shows runs on one page: `python -m hvdlarge.report runs/A [runs/B …]`.

One HTML file that needs nothing else, and its figures as PNG files beside it; works on runs that
go on, were killed or were resumed. Without torch, Horovod and MPI; a summary in words without
matplotlib.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hvdlarge import exits
from hvdlarge.reporting.figures import Drawn, draw_all
from hvdlarge.reporting.html import page
from hvdlarge.reporting.report_text import Target, in_words
from hvdlarge.reporting.run_reader import RunRecords, read_run
from hvdlarge.telemetry.console import print_error, print_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        while True:
            runs = [read_run(folder) for folder in _folders(options.runs)]
            _report(runs, options)
            if options.watch is None or all(run.summary is not None for run in runs):
                return exits.FINISHED
            time.sleep(options.watch)
    except exits.RunExit as end:
        print_error(str(end))
        return end.code
    except KeyboardInterrupt:
        return exits.FINISHED if options.watch is not None else 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.report",
        description=(
            "Runs on one page: loss and metrics, learning rate and batch, trust ratios, gradient "
            "noise, distance from the start, time by phase, stages. Needs no torch and no MPI."
        ),
        epilog="Exit codes: 0, or 2 for a folder that is no run or a page that cannot be written.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page (default: report.html in the run folder, or here for several runs)",
    )
    parser.add_argument(
        "--target",
        type=_target,
        metavar="METRIC=VALUE",
        help="also show when a metric reaches a value, for example accuracy=0.98",
    )
    parser.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help="write it again every so many seconds, until all runs have ended",
    )
    parser.add_argument(
        "--text", action="store_true", help="only the summary in words; needs no matplotlib"
    )
    return parser


def _target(text: str) -> Target:
    metric, _, value = text.partition("=")
    try:
        return Target(metric, float(value))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not METRIC=VALUE") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _folders(names: Sequence[str]) -> list[Path]:
    folders = [Path(name) for name in names]
    for number, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise exits.JobError(f"{folder}: named twice")
    return folders


def _report(runs: Sequence[RunRecords], options: argparse.Namespace) -> None:
    _tell_apart(runs)
    print_status("\n".join(in_words(runs, options.target)))
    if options.text:
        return
    try:
        drawn = draw_all(runs)
    except ModuleNotFoundError:
        print_status(
            "note     the page needs matplotlib: pip install 'hvdlarge[plot]'; only the summary in "
            "words was written"
        )
        return
    if options.out is not None:
        out = Path(options.out)
    else:
        out = runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html")
    _write(out, runs, drawn, options.target)
    print_status(f"report   {out}")


def _tell_apart(runs: Sequence[RunRecords]) -> None:
    """Runs of one name are called by their folders."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)


def _write(
    out: Path, runs: Sequence[RunRecords], drawn: Sequence[Drawn], target: Target | None
) -> None:
    """The page, and a folder of its name with the figures.

    Raises:
        JobError: if one of them cannot be written.
    """
    figures = out.with_suffix("")
    try:
        figures.mkdir(parents=True, exist_ok=True)
        for figure in drawn:
            if figure.png is not None:
                name = "".join(c if c.isalnum() or c in "-._" else "_" for c in figure.file)
                _replace(figures / f"{name}.png", figure.png)
        _replace(out, page(runs, drawn, target).encode())
    except OSError as error:
        raise exits.JobError(f"{out}: cannot be written: {error.strerror}") from None


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
