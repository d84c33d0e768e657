"""Trains a job on many workers, with restarts: `python -m hvdlarge.launch -np N job.yaml`.

Starts mpirun as its child in a process group of its own, turns SIGTERM and SIGINT into an orderly
stop with a checkpoint, and starts the job again from its last checkpoint after a rank was lost, as
long as it gets further. Needs neither torch, Horovod nor MPI itself. `horovodrun` cannot be stopped
like this: a signal ends only the shell around mpirun, and the ranks train on as orphans.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from hvdlarge import exits
from hvdlarge.config.job_file import job_path, read_job
from hvdlarge.telemetry.console import print_error, print_status

# A rank hung or was lost: it, or its host, is worth another try. 134, 137, 139: abort, kill and
# segmentation fault of a rank.
_TRY_AGAIN = frozenset([exits.HUNG, exits.LOST_RANK, 134, 137, 139])
_NO_PROGRESS_LIMIT = 3
_PAUSE_SECONDS = 1.0  # before a restart; doubles while there is no progress


class Hosts(NamedTuple):
    """Where workers may run: mpirun's --host value, and how many in all."""

    value: str
    slots: int


def parse_hosts(text: str) -> Hosts:
    """Hosts as `name`, `name:slots` or `name slots=n`, one a line or separated by commas; # begins
    a comment.

    Raises:
        JobError: for a line that is not of this form, or no host at all.

    >>> parse_hosts("a:4, b slots=2, c  # the small one")
    Hosts(value='a:4,b:2,c:1', slots=7)
    """
    found: list[tuple[str, int]] = []
    for line in text.splitlines():
        for entry in line.split("#")[0].split(","):
            words = entry.replace(" slots=", ":").replace("\tslots=", ":").strip()
            if words:
                name, _, slots = words.partition(":")
                if not (slots or "1").isdigit() or " " in name or not name:
                    raise exits.JobError(
                        f"{entry.strip()!r} is not a host: write name, name:slots or name slots=n"
                    )
                found.append((name, int(slots or "1")))
    found = [(name, slots) for name, slots in found if slots]
    if not found:
        raise exits.JobError("no host is left to run on")
    return Hosts(
        ",".join(f"{name}:{slots}" for name, slots in found), sum(slots for _, slots in found)
    )


class Launcher:
    """Runs one job to its end, over as many starts as that takes.

    Args:
        command: what each rank runs.
        workers: at most so many.
        hosts: asked at each start; None for mpirun's own choice.
        mpirun: the command and its own options.
        grace_seconds: how long an orderly stop may take.
        max_restarts: restarts in all.
        restart_stopped: start again after an orderly stop that somebody else asked for (exit code
            75).
        progress: how far the run has come, asked before and after each start.
    """

    def __init__(
        self,
        command: Sequence[str],
        workers: int,
        hosts: Callable[[], Hosts] | None,
        mpirun: Sequence[str],
        grace_seconds: float,
        max_restarts: int,
        restart_stopped: bool,
        progress: Callable[[], int],
    ) -> None:
        self._command = list(command)
        self._workers = workers
        self._hosts = hosts
        self._mpirun = list(mpirun)
        self._grace_seconds = grace_seconds
        self._max_restarts = max_restarts
        self._restart_stopped = restart_stopped
        self._progress = progress
        self._asked: str | None = None  # the signal that asked this launcher to stop
        self._asked_at = 0.0

    def run(self) -> int:
        """Start, watch, and start again; returns the exit code of the last start."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._heard)
        restarts = without_progress = 0
        while True:
            before = self._progress()
            code = self._start_once()
            if not self._again(code):
                return code
            without_progress = 0 if self._progress() > before else without_progress + 1
            restarts += 1
            if without_progress >= _NO_PROGRESS_LIMIT:
                print_error(
                    f"the last {_NO_PROGRESS_LIMIT} starts came no further (exit code {code}): not "
                    "started again"
                )
                return code
            if restarts > self._max_restarts:
                print_error(
                    f"exit code {code} after {self._max_restarts} restarts: not started again"
                )
                return code
            pause = _PAUSE_SECONDS * 2**without_progress
            print_status(
                f"launch: exit code {code}; restart {restarts} from the last checkpoint in "
                f"{pause:g} s"
            )
            self._sleep(pause)
            if self._asked is not None:
                return code

    def _again(self, code: int) -> bool:
        if self._asked is not None:
            return False
        return code in _TRY_AGAIN or (code == exits.STOPPED and self._restart_stopped)

    def _start_once(self) -> int:
        workers, where = self._workers, []
        if self._hosts is not None:
            hosts = self._hosts()
            workers, where = min(workers, hosts.slots), ["--host", hosts.value]
            print_status(f"launch: {workers} workers on {hosts.value}")
        command = [*self._mpirun, "-np", str(workers), *where, *self._command]
        try:
            process = subprocess.Popen(
                command, start_new_session=True, preexec_fn=_stop_with_parent
            )
        except FileNotFoundError:
            print_error(
                f"{command[0]} is not on PATH; install an MPI, or name its launcher with --mpirun"
            )
            return exits.WRONG_ENVIRONMENT
        return self._watch(process)

    def _watch(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for mpirun; once a stop is asked for: SIGUSR1, after the grace time SIGTERM, then
        SIGKILL to its group.
        """
        told = 0
        while True:
            try:
                code = process.wait(timeout=0.2)
                return 128 - code if code < 0 else code
            except subprocess.TimeoutExpired:
                pass
            if self._asked is None:
                continue
            waited = time.monotonic() - self._asked_at
            if told == 0:
                print_status(
                    f"launch: {self._asked}: the run is asked to stop with a checkpoint (at most "
                    f"{self._grace_seconds:g} s)"
                )
                # mpirun hands it to every rank, unlike SIGTERM, which kills them after 1 s
                process.send_signal(signal.SIGUSR1)
                told = 1
            elif told == 1 and waited > self._grace_seconds:
                print_error("the grace time is over: the run is ended without a further checkpoint")
                _signal_group(process, signal.SIGTERM)
                told = 2
            elif told == 2 and waited > self._grace_seconds + 5:
                _signal_group(process, signal.SIGKILL)
                told = 3

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked, self._asked_at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT:
            self._asked_at = float("-inf")  # a second Ctrl-C: no more grace

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._asked is None:
            time.sleep(0.05)


def _stop_with_parent() -> None:
    """In the child: be asked to stop in order when this launcher is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def checkpointed_steps(folder: Path) -> int:
    """Steps taken at the newest checkpoint of a run folder, −1 without any."""
    steps = [path.stem.removeprefix("step_") for path in (folder / "checkpoints").glob("step_*.pt")]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch a job; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.launch",
        description=(
            "Run a job on many workers by mpirun: stopped in order, started again after a lost "
            "rank."
        ),
        epilog=(
            "Exit codes are those of hvdlarge.train. SIGTERM or Ctrl-C stops with a checkpoint "
            "(75); the same command goes on."
        ),
    )
    parser.add_argument("-np", type=int, required=True, metavar="N", help="workers, at most")
    parser.add_argument("--hosts-file", metavar="FILE", help="hosts with slots, read at each start")
    parser.add_argument(
        "--hosts-command", metavar="COMMAND", help="prints the hosts, run at each start"
    )
    parser.add_argument(
        "--mpirun",
        default="mpirun",
        metavar="COMMAND",
        help="mpirun and its own options, in one string",
    )
    parser.add_argument(
        "--grace-seconds", type=float, default=60.0, help="for an orderly stop (default: 60)"
    )
    parser.add_argument("--max-restarts", type=int, default=100, help="in all (default: 100)")
    parser.add_argument(
        "--restart-stopped",
        action="store_true",
        help="also after exit code 75 (stopped on request)",
    )
    parser.add_argument("job", help="the job file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="as for hvdlarge.train"
    )
    options = parser.parse_args(arguments)
    try:
        if options.np < 1:
            raise exits.JobError("-np must be at least 1")
        if options.hosts_file and options.hosts_command:
            raise exits.JobError("give either --hosts-file or --hosts-command")
        folder = read_job(job_path(options.job), options.overrides).run_folder
        hosts = _hosts_of(options.hosts_file, options.hosts_command)
        command = [sys.executable, "-m", "hvdlarge.train", options.job, *options.overrides]
        launcher = Launcher(
            command,
            options.np,
            hosts,
            shlex.split(options.mpirun),
            options.grace_seconds,
            options.max_restarts,
            options.restart_stopped,
            lambda: checkpointed_steps(folder),
        )
        return launcher.run()
    except exits.RunExit as end:
        print_error(str(end))
        return end.code


def _hosts_of(file: str | None, command: str | None) -> Callable[[], Hosts] | None:
    def from_file() -> Hosts:
        try:
            return parse_hosts(Path(file or "").read_text(encoding="utf-8"))
        except OSError as error:
            raise exits.JobError(f"--hosts-file {file}: {error.strerror}") from None

    def from_command() -> Hosts:
        done = subprocess.run(
            shlex.split(command or ""), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise exits.JobError(
                f"--hosts-command {command}: exit code {done.returncode}: {done.stderr.strip()}"
            )
        return parse_hosts(done.stdout)

    if file is not None:
        return from_file
    return from_command if command is not None else None


if __name__ == "__main__":
    sys.exit(main())
