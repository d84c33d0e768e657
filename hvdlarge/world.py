"""Opens the channels between the ranks, runs a command on them, and ends all ranks together.

Every command for several ranks goes through `run_on_all_ranks`: an error that all ranks raise ends
them with one message and one exit code; an error on a single rank aborts the others too, which
would otherwise wait for it forever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from hvdlarge import exits
from hvdlarge.comm.connect import open_control, open_tensors
from hvdlarge.comm.environment import (
    cannot_be_set,
    set_environment,
    shared_settings,
    unset_environment,
    versions,
)
from hvdlarge.comm.interfaces import (
    CollectiveError,
    CollectiveMismatchError,
    Collectives,
    ControlChannel,
    RankLostError,
    WorldMismatchError,
)
from hvdlarge.comm.launcher import Launch, report_wrong_launch, wrong_launch
from hvdlarge.comm.rank_checks import check_equal_across_ranks, raise_on_all_ranks
from hvdlarge.config.job import Horovod, Job, Timeouts
from hvdlarge.config.part_errors import describe, origin
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.shared_memory import is_shared_memory_error, shared_memory_advice
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.telemetry.console import print_error, print_status

Result = TypeVar("Result")
JobOrNone = TypeVar("JobOrNone", Job, None, Job | None)


@dataclass(frozen=True)
class RankContext:
    """The objects of a rank that do not depend on its job."""

    launch: Launch | None  # None without a launcher
    settings: Mapping[str, str]  # environment variables set for MPI and Horovod
    control: ControlChannel
    tensors: Collectives
    watchdog: Watchdog
    stop: StopRequest
    # In place of what the job names: "data", "model", "loss"
    objects: Mapping[str, Any] = field(default_factory=dict)


def run_on_all_ranks(
    launch: Launch | None,
    read: Callable[[], JobOrNone],
    options: Mapping[str, Any],
    work: Callable[[RankContext, JobOrNone], None],
    watched: bool,
) -> int:
    """Read the job, open the channels, call `work`, close the channels. Every rank of a launch
    calls this together.

    Args:
        launch: None without a launcher.
        read: reads the job; returns None for work without one.
        options: of the command line; must be the same on every rank.
        work: called with the open channels and the job.
        watched: whether to start the watchdog and to handle signals to stop.

    Returns:
        The exit code: FINISHED; that of the `RunExit` that every rank raised, whose message
        rank 0 has printed; or WRONG_ENVIRONMENT where the channels cannot be opened, which one rank
        of each host has printed. If a single rank raises anything else, this does not return: all
        processes are ended.
    """
    try:
        on_all_ranks(launch, read, options, work, watched)
    except WorldMismatchError as error:
        return _report_mismatch(error, launch)
    except exits.RunExit as end:
        if launch is None or launch.rank == 0:
            (print_status if end.code == exits.STOPPED else print_error)(str(end))
        return end.code
    return exits.FINISHED


def on_all_ranks(
    launch: Launch | None,
    read: Callable[[], JobOrNone],
    options: Mapping[str, Any],
    work: Callable[[RankContext, JobOrNone], None],
    watched: bool,
    last: bool = True,
) -> None:
    """As `run_on_all_ranks`, for a caller that reports errors itself.

    Args:
        launch: see there, and the next four.
        read: see there.
        options: see there.
        work: see there.
        watched: see there.
        last: whether MPI is finalized at the end, and this process opens no channel again; if not,
            signal handlers and environment variables are put back at the end.

    Raises:
        RunExit: on every rank.
        WorldMismatchError: if the channels cannot be opened.
    """
    attempt = _attempt(read)
    timeouts, horovod = _before_the_ranks_agree(attempt)
    watchdog = Watchdog(0 if launch is None else launch.rank, timeouts.limits())
    stop = StopRequest()
    not_set = None if launch is None else cannot_be_set(horovod)
    settings = set_environment(launch, horovod)
    if not_set and launch is not None and launch.rank == 0:
        print_status(f"note     {not_set}")
    try:
        if watched:
            watchdog.start()
            if threading.current_thread() is threading.main_thread():  # as Python demands
                stop.install_handlers()
        _refuse_other_launchers()
        control = open_control(launch)
        _on_channels(launch, attempt, options, work, last, control, settings, watchdog, stop)
    finally:  # not reached where a single rank has failed: that ends the process
        watchdog.stop()
        if not last:  # the process goes on, as it was
            stop.restore_handlers()
            unset_environment(settings)


def _on_channels(
    launch: Launch | None,
    attempt: Callable[[], JobOrNone],
    options: Mapping[str, Any],
    work: Callable[[RankContext, JobOrNone], None],
    last: bool,
    control: ControlChannel,
    settings: Mapping[str, str],
    watchdog: Watchdog,
    stop: StopRequest,
) -> None:
    try:
        job = raise_on_all_ranks(control, attempt)
        _check_equal(control, options, job)
        tensors = open_tensors(launch, control)
        try:
            work(RankContext(launch, settings, control, tensors, watchdog, stop), job)
        except exits.RunExit:  # not any error: closing waits for the ranks that did not raise it
            tensors.close()
            raise
        tensors.close()
    except exits.RunExit:
        control.close(last)
        raise
    except BaseException as error:
        _abort_all(error, launch, control)
    control.close(last)


def _refuse_other_launchers() -> None:
    if wrong := wrong_launch(os.environ):
        raise WorldMismatchError(wrong)
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        raise WorldMismatchError(
            "elastic Horovod is not supported; hvdlarge.launch restarts a run with fewer or more "
            "workers instead"
        )


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
    """Run `action` now. The returned function returns its result or raises its RunExit, so that an
    error can be raised on all ranks once the channel is open.
    """
    try:
        result = action()
    except exits.RunExit as error:
        problem = error

        def fail() -> Result:
            raise problem

        return fail
    return lambda: result


def _report_mismatch(error: WorldMismatchError, launch: Launch | None) -> int:
    message = f"{error} (host {socket.gethostname()})"
    if wrong_launch(os.environ):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends the others
        report_wrong_launch(os.environ, lambda: print_error(message))
    elif launch is None or launch.is_local_leader:
        print_error(message)
    return exits.WRONG_ENVIRONMENT


def _abort_all(error: BaseException, launch: Launch | None, control: ControlChannel) -> NoReturn:
    """Report an error that this rank raised alone, and end all ranks."""
    rank = f"rank {control.rank} of {control.size} ({socket.gethostname()})"
    if isinstance(error, WorldMismatchError):
        code = _report_mismatch(error, launch)
        # Give the rank that prints the message time before the abort
        time.sleep(0 if launch is None or launch.is_local_leader else 2)
        control.abort(code)
    if isinstance(error, RankLostError):
        # The lost rank or the launcher knows the cause: let it print that and set the exit code
        time.sleep(3.0)
        print_error(f"{rank} has lost another rank: {error}")
        os._exit(exits.RANK_LOST)
    _wait_for_lower_ranks(control.rank)
    if isinstance(error, CollectiveMismatchError):
        print_error(f"the ranks disagree (detected by {rank}): {error}")
        control.abort(exits.RANKS_DISAGREE)
    if isinstance(error, CollectiveError):
        print_error(f"communication failed on {rank}: {error}")
    elif isinstance(error, exits.OutOfMemory):
        print_error(f"{rank}: {error}")
    elif exits.is_device_assert(error):
        print_error(
            f"an index was out of its range on the GPU of {rank}: most often a class index in the "
            "targets that the model has no output for, or an index beyond an embedding; the lines "
            "with 'Assertion' above name the operation, and CUDA_LAUNCH_BLOCKING=1 or a run on the "
            "CPU (CUDA_VISIBLE_DEVICES=) the line of code"
        )
    elif is_shared_memory_error(error):
        print_error(f"{rank}: {shared_memory_advice(error)}")
        control.abort(exits.WRONG_ENVIRONMENT)
    elif not isinstance(error, KeyboardInterrupt) and (part := origin(error)):
        print_error(f"in {part}, on {rank}: {describe(error)}")
    else:
        kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "internal error"
        print_error(f"{kind} on {rank}\n{''.join(traceback.format_exception(error)).rstrip()}")
    control.abort(exits.INTERNAL_ERROR)


def _wait_for_lower_ranks(rank: int) -> None:
    """If many ranks fail in the same way, only the lowest prints a message: its abort ends the
    others while they wait here.
    """
    # mpirun ends a rank by SIGTERM, about a second after the abort of another
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(min(5.0, 1.25 * rank))
