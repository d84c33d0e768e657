"""Trains a job: `python -m hvdlarge.train job.yaml [key.sub=value ...]`.

Runs the job, alone or as one worker of a launch, and leaves with an exit code of `exits.py`. This
file opens and closes what the run needs around it and answers for how it ends; `run.py` puts the
run itself together.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdlarge import __version__, exits
from hvdlarge.comm.connect import open_control, open_tensors
from hvdlarge.comm.environment import settle, shared_settings, versions
from hvdlarge.comm.interfaces import (
    CollectiveError,
    CollectiveMismatchError,
    ControlChannel,
    RankLostError,
    WorldMismatchError,
)
from hvdlarge.comm.launcher import Launch, detect
from hvdlarge.comm.rank_checks import check_equal_across_ranks, raise_on_all_ranks
from hvdlarge.config.explain import explain
from hvdlarge.config.job import Horovod, Timeouts
from hvdlarge.config.job_file import job_path, read_job
from hvdlarge.config.planning import UnknownSamples, plan_run, training_samples
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.telemetry.console import print_error, print_status

# torch is imported inside the functions that need it: it takes a second, and a wrong job file
# should be answered at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code. Every rank of a launch calls this together."""
    launch = detect(os.environ)
    options = _parse(arguments, speaks=launch is None or launch.rank == 0)
    if options.dry_run:
        return _dry_run(options, launch)
    timeouts, horovod = _early(options)
    watchdog = Watchdog(0 if launch is None else launch.rank, timeouts.limits())
    watchdog.start()
    stop = StopRequest()
    stop.install_handlers()
    settings = settle(launch, horovod)
    try:
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            raise WorldMismatchError(
                "elastic Horovod is not supported; hvdlarge.launch goes on with fewer or more "
                "workers instead"
            )
        control = open_control(launch)
    except WorldMismatchError as error:
        return _wrong_world(error, launch)
    try:
        return _leave_together(
            _run(options, launch, control, settings, watchdog, stop), control, watchdog
        )
    except exits.RunExit as end:  # raised by every rank
        if control.rank == 0:
            (print_status if end.code == exits.STOPPED else print_error)(str(end))
        return _leave_together(end.code, control, watchdog)
    except WorldMismatchError as error:
        code = _wrong_world(error, launch)
        # Let the message out before the run ends
        time.sleep(0 if launch is None or launch.is_local_leader else 2)
        control.abort(code)
    except CollectiveMismatchError as error:
        _let_lower_ranks_speak(control.rank)
        print_error(f"the ranks disagree (seen by rank {control.rank}): {error}")
        control.abort(exits.RANKS_DISAGREE)
    except CollectiveError as error:
        _let_lower_ranks_speak(control.rank)
        print_error(
            f"communication failed on rank {control.rank} of {control.size} "
            f"({socket.gethostname()}): {error}"
        )
        control.abort(exits.INTERNAL_ERROR)
    except RankLostError as error:
        # The rank that is gone, or the launcher, knows better why: it has some seconds to say so
        # and to set the exit code.
        time.sleep(3.0)
        print_error(
            f"rank {control.rank} of {control.size} ({socket.gethostname()}) has lost another "
            f"rank: {error}"
        )
        os._exit(exits.LOST_RANK)
    except exits.OutOfMemory as error:
        _let_lower_ranks_speak(control.rank)
        print_error(f"rank {control.rank} of {control.size} ({socket.gethostname()}): {error}")
        control.abort(exits.INTERNAL_ERROR)
    # This rank alone: end the others too, who would wait for it for ever
    except BaseException as error:
        _let_lower_ranks_speak(control.rank)
        name = "interrupted" if isinstance(error, KeyboardInterrupt) else "internal error"
        print_error(
            f"{name} on rank {control.rank} of {control.size} "
            f"({socket.gethostname()})\n{traceback.format_exc()}"
        )
        control.abort(exits.INTERNAL_ERROR)


def _dry_run(options: argparse.Namespace, launch: Launch | None) -> int:
    """Print the job with every default written out; nothing is started, so every rank leaves with
    the same code by itself.
    """
    speaks = launch is None or launch.rank == 0
    try:
        job = read_job(options.job, options.overrides)
        with contextlib.suppress(UnknownSamples):  # then only the data could tell
            plan_run(job, training_samples(job), 1 if launch is None else launch.size)
    except exits.RunExit as end:
        if speaks:
            print_error(str(end))
        return end.code
    if speaks:
        print_status(job.to_yaml().rstrip())
    return exits.FINISHED


def _let_lower_ranks_speak(rank: int) -> None:
    """Where many ranks fail alike, one message is enough: the lowest rank's. Its abort ends this
    one while it waits here.
    """
    # mpirun's way to end a rank, about a second after another one's abort
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(min(5.0, 1.25 * rank))


def _early(options: argparse.Namespace) -> tuple[Timeouts, Horovod]:
    """What the job says about the time before the ranks can talk; a wrong job is reported later, by
    all together.
    """
    try:
        job = read_job(options.job, options.overrides)
    except exits.JobError:
        return Timeouts(), Horovod()
    return job.timeouts, job.horovod


def _leave_together(code: int, control: ControlChannel, watchdog: Watchdog) -> int:
    """Close the control channel and return the code. Every rank calls this together."""
    control.close()
    watchdog.stop()
    return code


def _parse(arguments: Sequence[str] | None, speaks: bool) -> argparse.Namespace:
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
        "--fresh", action="store_true", help="begin anew; an earlier run of the folder is set aside"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the job with every default, and start nothing"
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
        if not speaks:
            # One copy of a usage message is enough; the other ranks leave with the same code.
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        options = parser.parse_intermixed_args(arguments)
    options.job = job_path(options.job)
    return options


class _Explain(argparse.Action):
    """Prints what a key of the job file means, and exits as `--help` does."""

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


def _wrong_world(error: WorldMismatchError, launch: Launch | None) -> int:
    if launch is None or launch.is_local_leader:
        print_error(f"{error} (host {socket.gethostname()})")
    return exits.WRONG_ENVIRONMENT


def _run(
    options: argparse.Namespace,
    launch: Launch | None,
    control: ControlChannel,
    settings: dict[str, str],
    watchdog: Watchdog,
    stop: StopRequest,
) -> int:
    """Agree on the job, then train it between the opening and the closing of the collectives."""
    job = raise_on_all_ranks(control, lambda: read_job(options.job, options.overrides))
    check_equal_across_ranks(control, job.resolved(), "job")
    check_equal_across_ranks(control, versions(), "versions")
    check_equal_across_ranks(control, shared_settings(os.environ), "settings in their environment")
    tensors = open_tensors(launch, control)
    from hvdlarge.run import RankContext, run

    try:
        run(
            job,
            Path(options.job),
            options.fresh,
            RankContext(launch, settings, control, tensors, watchdog, stop),
        )
    # Raised by every rank; what one rank raises alone must not wait for the others here
    except exits.RunExit:
        tensors.close()
        raise
    tensors.close()
    return exits.FINISHED


if __name__ == "__main__":
    sys.exit(main())
