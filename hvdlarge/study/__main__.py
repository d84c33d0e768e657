"""Runs a study: `python -m hvdlarge.study study.yaml [--jobs N]`.

Trains the runs that the study file describes, each in a process of its own, and prints and draws
what its analyses find. The same command goes on after any end; several processes on one folder
share the work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdlarge import exits
from hvdlarge.comm.launcher import bound_cores
from hvdlarge.study.analysis.sections import Compare
from hvdlarge.study.cells import (
    CellPlan,
    in_words,
    job_source,
    plan_cells,
    setup_of,
    signature,
)
from hvdlarge.study.child import mpirun_command, visible_gpus
from hvdlarge.study.folder import StudyFolder, write_setup
from hvdlarge.study.results import Setup
from hvdlarge.study.search import check_available, grid
from hvdlarge.study.session import Session, folder_of, tell
from hvdlarge.study.study_file import Study, read_study
from hvdlarge.telemetry.console import print_error, print_status

_INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended, while no run trains


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except exits.RunExit as end:
        print_error(str(end))
        return end.code
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    study = read_study(options.study)
    path = folder_of(study, options.folder)
    source = job_source(study, Path(options.study), path)
    try:
        plans = plan_cells(study, source)
        setup = setup_of(study, plans)
        _check_analyses(study, plans, setup)
        if study.tune is not None:
            check_available(study.tune)
            if study.tune.sampler == "grid":
                for plan in plans:
                    if plan.search:
                        grid(plan.search, study.tune.trials)
    except exits.JobError as error:
        raise exits.JobError(f"{options.study}: {error}") from None
    folder = StudyFolder(path)
    if options.plan:
        print_status("\n".join(_plan_in_words(study, plans, setup, path)))
        return exits.FINISHED
    mpirun = "mpirun" if options.mpirun is None else options.mpirun
    mpirun = mpirun_command(mpirun) if study.workers > 1 else ""
    for note in folder.open(_document(study, plans, setup), options.extend):
        tell(f"note     {note}")
    analyses = study.analysis or (Compare(),)
    write_setup(path, setup, [each.model_dump(mode="json") for each in analyses])
    if options.retry_failed:
        count = folder.forget_failed()
        tell(f"{count:,} {'run is' if count == 1 else 'runs are'} trained again")
    far = bool(mpirun and options.mpirun)  # the GPUs of other hosts are not known
    gpus = [] if far or options.jobs == 1 else visible_gpus(os.environ)
    for note in _notes(study, options, gpus):
        tell(f"note     {note}")
    session = Session(study, plans, setup, source, folder, options.jobs, mpirun, gpus)
    tell(
        f"{study.name}: {session.total():,} runs in {path}, {session.ended():,} of them ended "
        "before"
    )
    code = session.run()
    if code == exits.FINISHED:
        from hvdlarge.study.report import write_study_report

        tell("\n".join(["", *write_study_report(path, None)]))
    return code


def _check_analyses(study: Study, plans: Sequence[CellPlan], setup: Setup) -> None:
    from hvdlarge.study.analysis.sections import check, unlogged

    logs = {in_words(study, plan.cell): plan.job.log for plan in plans}
    if problems := [*check(study.analysis, setup), *unlogged(study.analysis, logs)]:
        raise exits.JobError("\n".join(problems))


def _document(study: Study, plans: Sequence[CellPlan], setup: Setup) -> dict[str, Any]:
    """What decides the results, and what the analyses need, as plain values."""
    tune = None
    if study.tune is not None:
        without = {"search", "at"}
        if study.tune.finalists == 1:  # as in the folders of versions that had none
            without |= {"finalists", "finalist_seeds"}
        tune = study.tune.model_dump(mode="json", exclude=without)
    return {
        "name": study.name,
        "metric": study.metric,
        "lower_is_better": setup.lower_is_better,
        "tune": tune,
        "seeds": list(study.seed_list),
        "workers": study.workers,
        "threads": study.threads,
        "cells": {in_words(study, plan.cell): signature(plan) for plan in plans},
    }


def _notes(study: Study, options: argparse.Namespace, gpus: Sequence[str]) -> list[str]:
    jobs = options.jobs
    cores, threads = len(bound_cores()), jobs * study.workers * study.threads
    notes = []
    if options.mpirun is not None and study.workers == 1:
        notes.append("--mpirun has no effect: each run has one worker (`workers` of the study)")
    if threads > cores:
        notes.append(
            f"{threads} threads on {cores} cores: {jobs} {'run' if jobs == 1 else 'runs'} × "
            f"{study.workers} workers × {study.threads} threads; they slow one another down"
        )
    if gpus and jobs > 1:
        at_once = max(len(gpus) // study.workers, 1)
        sees = study.workers if at_once > 1 else len(gpus)
        shared = ", shared with others" if jobs > at_once else ""
        notes.append(f"{jobs} runs at once: each sees {sees} of {len(gpus)} GPUs{shared}")
    return notes


def _plan_in_words(study: Study, plans: Sequence[CellPlan], setup: Setup, path: Path) -> list[str]:
    """What a study would run."""
    from hvdlarge.reporting.describe import columns

    rows: list[tuple[str, ...]] = [("cell", "trials", "repetitions", "searched")]
    for plan in plans:
        where = "" if plan.tuned_at is None else f"settings of {in_words(study, plan.tuned_at)}"
        searched = ", ".join(_space_in_words(key, space) for key, space in plan.search.items())
        trials = setup.trials if plan.search else 0
        rows.append(
            (
                in_words(study, plan.cell),
                f"{trials:,}",
                f"{setup.repetitions:,}",
                searched or where or "nothing",
            )
        )
    cells = sum(bool(plan.search) for plan in plans)
    tuned, repeated = cells * setup.trials, len(plans) * setup.repetitions
    finalists = 0 if study.tune is None else cells * study.tune.finalist_runs
    of_finalists = f" + {finalists:,} of finalists" if finalists else ""
    better = "smaller" if setup.lower_is_better else "larger"
    return [
        *columns(rows),
        f"{tuned + finalists + repeated:,} runs = {tuned:,} trials{of_finalists} + {repeated:,} "
        f"repetitions, into {path}",
        f"metric   {setup.metric}, {better} is better",
    ]


def _space_in_words(key: str, space: Any) -> str:
    if hasattr(space, "choices"):
        return f"{key} one of {', '.join(map(str, space.choices))}"
    return f"{key} {space.low:g} to {space.high:g}{' (log)' if space.log else ''}"


def _jobs(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.study",
        description=(
            "Train the runs of a study and report what they show. The same command goes on after "
            "any end, and may be started several times on one folder, on any hosts."
        ),
        epilog=(
            "Exit codes: 0 finished, or a budget is used up; 2 wrong study or command line; 3 "
            "wrong environment; 74 a file could not be written; 75 stopped on request: run it "
            "again. An end of a run that is no result of the study ends it with the run's code."
        ),
    )
    parser.add_argument("study", help="the study file")
    parser.add_argument(
        "--jobs", type=_jobs, default=1, metavar="N", help="runs at the same time (default: 1)"
    )
    parser.add_argument(
        "--folder", metavar="FOLDER", help="where its files go (default: runs/NAME)"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what would be run, and start nothing"
    )
    parser.add_argument(
        "--extend", action="store_true", help="accept cells and seeds that the file has in addition"
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="train failed runs again (not diverged ones), and repetitions whose settings change "
        "with them",
    )
    parser.add_argument(
        "--mpirun",
        metavar="COMMAND",
        help="mpirun and its options in one string, for runs on several workers (default: mpirun)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
