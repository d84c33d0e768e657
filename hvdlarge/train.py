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
from hvdlarge.comm.launcher import Launch, detect, is_reporter
from hvdlarge.config.explain import explain
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import job_path, read_job
from hvdlarge.config.planning import UnknownSamples, plan_run, training_samples
from hvdlarge.telemetry.console import only_if, print_error, print_status
from hvdlarge.world import RankContext, run_on_all_ranks

# torch is imported inside functions: it takes a second, and errors in a job should appear at once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code. Every rank of a launch calls this together."""
    launch = detect(os.environ)
    options = _parse(arguments, launch)
    if options.dry_run:
        return _dry_run(options, launch)

    def work(context: RankContext, job: Job) -> None:
        from hvdlarge.run import run

        run(job, Path(options.job), options.fresh, context)

    return run_on_all_ranks(
        launch, lambda: read_job(options.job, options.overrides), {}, work, watched=True
    )


def _dry_run(options: argparse.Namespace, launch: Launch | None) -> int:
    """Print the job with every default and start nothing; every rank returns the same code."""
    try:
        job = read_job(options.job, options.overrides)
        with contextlib.suppress(UnknownSamples):  # the plan needs the size of the data set
            plan_run(job, training_samples(job), 1 if launch is None else launch.size)
    except exits.RunExit as end:
        if is_reporter(launch):
            print_error(str(end))
        return end.code
    if is_reporter(launch):
        print_status(job.to_yaml().rstrip())
    return exits.FINISHED


def _parse(arguments: Sequence[str] | None, launch: Launch | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.train",
        description="Train a job with LARS, AdaBatch and LEGW, alone or on many workers.",
        epilog="Many workers: horovodrun -np 64 python -m hvdlarge.train job.yaml (or mpirun). "
        "Exit codes: 0 finished, 2 wrong job or command line, 3 wrong environment, 70 internal "
        "error, 71 the ranks disagree, 72 a rank hangs, 73 diverged, 74 a checkpoint could not be "
        "written, 75 stopped on request: run it again, 76 a rank was lost, 77 a checkpoint is "
        "damaged or of another job.",
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
    with only_if(is_reporter(launch)):
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
