"""One process of a launch, from before the other ranks can be reached until all have left: opens
the channels between the ranks, and answers for how the work between them ends.

Every command that works on all ranks goes through `run_on_all_ranks`: what every rank raises ends
all of them with one message and one exit code; what a single rank raises ends the others too, who
would wait for it for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from hvdlarge import exits
from hvdlarge.comm.connect import open_control, open_tensors
from hvdlarge.comm.environment import settle, shared_settings, versions
from hvdlarge.comm.interfaces import (
    CollectiveError,
    CollectiveMismatchError,
    Collectives,
    ControlChannel,
    RankLostError,
    WorldMismatchError,
)
from hvdlarge.comm.launcher import Launch
from hvdlarge.comm.rank_checks import check_equal_across_ranks, raise_on_all_ranks
from hvdlarge.config.job import Horovod, Job, Timeouts
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.telemetry.console import print_error, print_status

Result = TypeVar("Result")
JobOrNone = TypeVar("JobOrNone", Job, None, Job | None)


@dataclass(frozen=True)
class RankContext:
    """What a rank works with, whatever its job."""

    launch: Launch | None  # None without a launcher
    settings: Mapping[str, str]  # what was set in the environment for MPI and Horovod
    control: ControlChannel
    tensors: Collectives
    watchdog: Watchdog
    stop: StopRequest


def run_on_all_ranks(
    launch: Launch | None,
    read: Callable[[], JobOrNone],
    options: Mapping[str, Any],
    work: Callable[[RankContext, JobOrNone], None],
    watched: bool,
) -> int:
    """Read the job, open the channels, do the work, close them again. Every rank of a launch calls
    this together.

    Args:
        launch: what the launcher said; None without one.
        read: reads the job, where the work has one.
        options: of the command line, which have to be the same on every rank.
        work: what is done with everything open.
        watched: whether a rank that hangs or is asked to stop is noticed.

    Returns:
        The exit code: FINISHED, or that of a `RunExit` which every rank has raised, whose message
        rank 0 has printed. A process whose rank alone fails ends here with its code, and takes the
        others with it.
    """
    attempt = _attempt(read)
    timeouts, horovod = _before_the_ranks_agree(attempt)
    watchdog = Watchdog(0 if launch is None else launch.rank, timeouts.limits())
    stop = StopRequest()
    if watched:
        watchdog.start()
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
        job = raise_on_all_ranks(control, attempt)
        _check_equal(control, options, job)
        tensors = open_tensors(launch, control)
        try:
            work(RankContext(launch, settings, control, tensors, watchdog, stop), job)
        # Raised by every rank; what one rank raises alone must not wait for the others here
        except exits.RunExit:
            tensors.close()
            raise
        tensors.close()
        code = exits.FINISHED
    except exits.RunExit as end:
        if control.rank == 0:
            (print_status if end.code == exits.STOPPED else print_error)(str(end))
        code = end.code
    except BaseException as error:
        _end_all(error, launch, control)
    control.close()
    watchdog.stop()
    return code


def _check_equal(control: ControlChannel, options: Mapping[str, Any], job: Job | None) -> None:
    check_equal_across_ranks(control, options, "command line")
    check_equal_across_ranks(control, {} if job is None else job.resolved(), "job")
    check_equal_across_ranks(control, versions(), "versions")
    check_equal_across_ranks(control, shared_settings(os.environ), "settings in their environment")


def _before_the_ranks_agree(read: Callable[[], Job | None]) -> tuple[Timeouts, Horovod]:
    """The sections of the job that are needed to reach the other ranks; the defaults for a wrong
    job, which is reported once they can be reached.
    """
    with contextlib.suppress(exits.RunExit):
        if (job := read()) is not None:
            return job.timeouts, job.horovod
    return Timeouts(), Horovod()


def _attempt(action: Callable[[], Result]) -> Callable[[], Result]:
    """Run `action` now; the returned function gives its result, or raises its RunExit, as often as
    it is called: it has to fail on all ranks together, which cannot be reached yet.
    """
    try:
        result = action()
    except exits.RunExit as error:
        problem = error

        def fail() -> Result:
            raise problem

        return fail
    return lambda: result


def _wrong_world(error: WorldMismatchError, launch: Launch | None) -> int:
    if launch is None or launch.is_local_leader:
        print_error(f"{error} (host {socket.gethostname()})")
    return exits.WRONG_ENVIRONMENT


def _end_all(error: BaseException, launch: Launch | None, control: ControlChannel) -> NoReturn:
    """End every rank for what this rank alone has raised."""
    rank = f"rank {control.rank} of {control.size} ({socket.gethostname()})"
    if isinstance(error, WorldMismatchError):
        code = _wrong_world(error, launch)
        # Let the message out before the run ends
        time.sleep(0 if launch is None or launch.is_local_leader else 2)
        control.abort(code)
    if isinstance(error, RankLostError):
        # The rank that is gone, or the launcher, knows better why: it has some seconds to say so
        # and to set the exit code.
        time.sleep(3.0)
        print_error(f"{rank} has lost another rank: {error}")
        os._exit(exits.LOST_RANK)
    _let_lower_ranks_speak(control.rank)
    if isinstance(error, CollectiveMismatchError):
        print_error(f"the ranks disagree (seen by {rank}): {error}")
        control.abort(exits.RANKS_DISAGREE)
    if isinstance(error, CollectiveError):
        print_error(f"communication failed on {rank}: {error}")
    elif isinstance(error, exits.OutOfMemory):
        print_error(f"{rank}: {error}")
    else:
        kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "internal error"
        print_error(f"{kind} on {rank}\n{''.join(traceback.format_exception(error)).rstrip()}")
    control.abort(exits.INTERNAL_ERROR)


def _let_lower_ranks_speak(rank: int) -> None:
    """Where many ranks fail in the same way, one message is enough: the lowest rank's. Its abort
    ends this one while it waits here.
    """
    # mpirun's way to end a rank, about a second after another one's abort
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(min(5.0, 1.25 * rank))
