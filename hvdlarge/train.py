"""Trains a job: `python -m hvdlarge.train job.yaml [key.sub=value ...]`.

Runs the job, alone or as one worker of a launch, and exits with a code of `exits.py`. `world.py`
opens the channels between the ranks; `run.py` builds and trains the run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdlarge import __version__, exits
from hvdlarge.comm.launcher import Launch, detect, reports_wrong_launch, wrong_launch
from hvdlarge.config.explain import explain
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import job_path, read_job
from hvdlarge.config.planning import UnknownSamples, known_or_counted_samples, plan_run
from hvdlarge.telemetry.console import print_error, print_status
from hvdlarge.world import RankContext, run_on_all_ranks

# torch is imported inside functions: it takes a second, and errors in a job should appear at once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code. Every rank of a launch calls this together."""
    launch, wrong = detect(os.environ), wrong_launch(os.environ)
    is_reporter = reports_wrong_launch(os.environ) if wrong else launch is None or launch.rank == 0
    options = _parse(arguments, is_reporter)
    if options.dry_run and not wrong:
        return _dry_run(options, launch)

    def work(context: RankContext, job: Job) -> None:
        from hvdlarge.run import run

        run(job, Path(options.job), options.fresh, context)

    return run_on_all_ranks(
        launch, lambda: read_job(options.job, options.overrides), {}, work, watched=True
    )


def _dry_run(options: argparse.Namespace, launch: Launch | None) -> int:
    """Print the job with every default and start nothing; every rank returns the same code."""
    is_reporter = launch is None or launch.rank == 0
    lines = []
    try:
        job = read_job(options.job, options.overrides)
        try:
            samples = known_or_counted_samples(job, _count)
        except UnknownSamples as unknown:
            lines.append(f"# the schedule was not checked: {unknown}")
        else:
            plan_run(job, samples.number, 1 if launch is None else launch.size)
            if samples.was_built:
                lines.append(f"# {job.data.name} was built: it has {samples.number:,} samples")
    except exits.RunExit as end:
        if is_reporter:
            print_error(str(end))
        return end.code
    if is_reporter:
        print_status("\n".join([*lines, job.to_yaml().rstrip()]))
    return exits.FINISHED


def _count(job: Job) -> int:
    from hvdlarge.build import load_data

    return len(load_data(job.data, job.seed)[0])


def _parse(arguments: Sequence[str] | None, is_reporter: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.train",
        description="Train a job with LARS, AdaBatch and LEGW, alone or on many workers.",
        epilog="Many workers: horovodrun -np 64 python -m hvdlarge.train job.yaml (or mpirun). "
        "Exit codes: 0 finished, 2 wrong job or command line, 3 wrong environment, 70 an error "
        "while training, 71 the ranks disagree, 72 a rank hangs, 73 diverged, 74 a checkpoint "
        "could not be written, 75 stopped on request: run it again, 76 a rank was lost, 77 a "
        "checkpoint is damaged or of another job.",
    )
    parser.add_argument("job", help="the job file, or the name of a shipped job such as digits")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="set a key of the job, e.g. lr.base=0.2",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start a new run; an earlier one is set aside"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the job with every default and start nothing"
    )
    parser.add_argument(
        "--explain",
        action=_Explain,
        nargs="?",
        const="",
        metavar="KEY",
        help="print what a key of the job means, e.g. lr.warmup, or all top-level keys, and exit",
    )
    parser.add_argument("--version", action="version", version=f"hvdlarge {__version__}")
    with contextlib.ExitStack() as stack:
        if not is_reporter:
            # Usage messages are printed by one rank; the others exit with the same code
            devnull = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
            stack.enter_context(contextlib.redirect_stderr(devnull))
        options = parser.parse_intermixed_args(arguments)
    options.job = job_path(options.job)
    return options


class _Explain(argparse.Action):
    """Prints the meaning of a key of the job file, and exits as `--help` does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            print(explain(values))
        except exits.JobError as error:
            parser.error(str(error))
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
