"""Trains a job on many workers, with restarts: `python -m hvdlarge.launch -np N job.yaml`.

Starts mpirun in a process group of its own, turns SIGTERM and SIGINT into an orderly stop with a
checkpoint, and restarts the job from its last checkpoint after a rank was lost, as long as it makes
progress. Needs no torch, Horovod or MPI. `horovodrun` cannot be stopped in this way: a signal ends
only the shell around mpirun, and the ranks continue as orphans.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
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
from hvdlarge.comm.launcher import detect, report_wrong_launch, wrong_launch
from hvdlarge.config.job_file import job_path, read_job
from hvdlarge.telemetry.console import print_error, print_status

# A rank hung or was lost. 134, 137, 139: abort, kill and segmentation fault of a rank (137 also of
# an mpirun that waits for a host that was cut off); 205: of mpirun, a host was lost
_RESTARTABLE = frozenset([exits.HUNG, exits.RANK_LOST, 134, 137, 139, 205])
# mpirun notices within a minute that a host does not answer (Open MPI: within eight), before a rank
# reaches its limit: after that mpirun would wait for the host much longer
_KEEPALIVE = {
    "OMPI_MCA_oob_tcp_keepalive_time": "30",
    "OMPI_MCA_oob_tcp_keepalive_intvl": "10",
    "OMPI_MCA_oob_tcp_keepalive_probes": "3",
}
_NO_CONNECTION = 255  # of mpirun: ssh to a host failed, at the start or later
_USR1_CODE = 128 + signal.SIGUSR1  # of a process that SIGUSR1 has killed
_NO_PROGRESS_LIMIT = 3
_TERMINATE_SECONDS = 5.0  # between SIGTERM and SIGKILL
_HOSTS_COMMAND_SECONDS = 120.0
_PAUSE_SECONDS = 1.0  # before a restart; doubled for each start without progress
_HOST = re.compile(r"([^\s:=]+)(?::([0-9]*)|\s+slots\s*=\s*([0-9]+))?")
_MAX_SLOTS = re.compile(r"\s+max[_-]slots\s*=\s*[0-9]+(?=\s|$)")


class Hosts(NamedTuple):
    """The hosts to run on."""

    value: str  # of mpirun's option --host
    slots: int  # of all hosts together

    def equation(self) -> str:
        """Where the slots come from.

        >>> parse_hosts("a:4, b:4").equation(), parse_hosts("a:4, b:2").equation()
        ('2 hosts × 4 slots = 8', '4 + 2 = 6 slots')
        """
        counts = [host.rpartition(":")[2] for host in self.value.split(",")]
        if len(set(counts)) == 1:
            hosts, slots = (
                f"{number} {word}{'' if int(number) == 1 else 's'}"
                for number, word in ((len(counts), "host"), (counts[0], "slot"))
            )
            return f"{hosts} × {slots} = {self.slots}"
        return f"{' + '.join(counts)} = {self.slots} slots"


def parse_hosts(text: str) -> Hosts:
    """Parse hosts given as `name`, `name:slots` or `name slots=n`, separated by lines or commas; #
    starts a comment. Hosts with 0 slots are left out. Open MPI's `max_slots=n` has no effect: a run
    takes no more than the slots.

    Raises:
        JobError: if an entry is not of this form, or no host is left.

    >>> parse_hosts("a:4, b slots=2, c  # the small one")
    Hosts(value='a:4,b:2,c:1', slots=7)
    """
    hosts: list[tuple[str, int]] = []
    for line in text.splitlines():
        for entry in line.split("#")[0].split(","):
            if not entry.strip():
                continue
            host = _HOST.fullmatch(_MAX_SLOTS.sub("", entry).strip())
            if host is None:
                raise exits.JobError(
                    f"{entry.strip()!r} is not a host: write name, name:slots or name slots=n"
                )
            hosts.append((host[1], int(host[2] or host[3] or "1")))
    hosts = [(name, slots) for name, slots in hosts if slots]
    if not hosts:
        raise exits.JobError("no host is left to run on")
    return Hosts(
        ",".join(f"{name}:{slots}" for name, slots in hosts), sum(slots for _, slots in hosts)
    )


class Launcher:
    """Runs one job to its end, with restarts.

    Args:
        command: of each rank.
        workers: maximum number of workers.
        hosts: called at each start; None leaves the hosts to mpirun. A JobError of its ends the
            launcher at the first start, and counts as a start without progress at a restart.
        mpirun: the command and its options.
        grace_seconds: how long an orderly stop may take.
        max_restarts: maximum number of restarts.
        restart_stopped: restart also after an orderly stop (exit code 75) that was not requested
            through this launcher.
        progress: returns a number that grows with the run's progress.
        fresh: pass --fresh to the first start, and to the next as long as one ends before it has
            set the earlier run aside. A restart resumes what the first start began.
        folder: of the run; needed for `fresh`.
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
        fresh: bool = False,
        folder: Path | None = None,
    ) -> None:
        self._command = list(command)
        self._workers = workers
        self._hosts = hosts
        self._mpirun = list(mpirun)
        self._grace_seconds = grace_seconds
        self._max_restarts = max_restarts
        self._restart_stopped = restart_stopped
        self._progress = progress
        self._folder = folder
        self._fresh = fresh
        holds_run = folder is not None and (folder / "job.resolved.yaml").exists()
        self._earlier_run = self._identity() if holds_run else None
        self._stop_signal: str | None = None  # by which this launcher was asked to stop
        self._stop_time = 0.0  # of that signal, in seconds of time.monotonic

    def run(self) -> int:
        """Run the job, with restarts; returns the exit code of the last start."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup ignores SIGHUP; background jobs of a shell ignore SIGINT, yet must be stoppable
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        code = restarts = without_progress = 0
        while True:
            before = -1 if self._fresh else self._progress()
            try:
                code = self._start_once()
            except exits.JobError as error:  # the hosts cannot be read
                if self._stop_signal is not None:
                    return exits.STOPPED
                if not restarts:
                    raise
                # Whatever lists the hosts may fail for a while: a start that made no progress
                print_status(f"launch: warning: {error}")
            # An earlier run that is still in its place has not been set aside yet
            self._fresh = self._fresh and self._earlier_run is not None
            self._fresh = self._fresh and self._identity() == self._earlier_run
            moved = not self._fresh and self._progress() > before
            if not self._should_restart(code, began=restarts > 0 or moved):
                return code
            without_progress = 0 if moved else without_progress + 1
            restarts += 1
            if without_progress >= _NO_PROGRESS_LIMIT:
                print_error(
                    f"the last {_NO_PROGRESS_LIMIT} starts made no progress (exit code {code}): "
                    "not restarted"
                )
                return code
            if restarts > self._max_restarts:
                print_error(f"exit code {code} after {self._max_restarts} restarts: not restarted")
                return code
            pause = _PAUSE_SECONDS * 2**without_progress
            print_status(
                f"launch: exit code {code}; restart {restarts} from the last checkpoint in "
                f"{pause:g} s"
            )
            self._sleep(pause)
            if self._stop_signal is not None:
                print_status(f"launch: {self._stop_signal}: nothing more was started")
                return exits.STOPPED

    def _identity(self) -> int | None:
        """A number that tells the run folder from another of its name; None if there is none."""
        try:
            return None if self._folder is None else self._folder.stat().st_ino
        except OSError:
            return None

    def _should_restart(self, code: int, began: bool) -> bool:
        if self._stop_signal is not None:
            return False
        # Before the run has begun it may be a mistake of the command line
        if code == _NO_CONNECTION and began:
            return True
        return code in _RESTARTABLE or (code == exits.STOPPED and self._restart_stopped)

    def _start_once(self) -> int:
        workers, host_option = self._workers, []
        if self._hosts is not None:
            hosts = self._hosts()
            if self._stop_signal is not None:  # while the hosts were asked for
                print_status(f"launch: {self._stop_signal}: nothing was started")
                return exits.STOPPED
            workers, host_option = min(workers, hosts.slots), ["--host", hosts.value]
            if workers < self._workers:
                print_status(
                    f"launch: warning: {hosts.equation()}, fewer than the {self._workers} workers "
                    f"of -np: the run has {workers}"
                )
            print_status(f"launch: {workers} workers on {hosts.value}")
        fresh = ["--fresh"] if self._fresh else []
        command = [*self._mpirun, "-np", str(workers), *host_option, *self._command, *fresh]
        try:
            process = subprocess.Popen(
                command,
                env={**_KEEPALIVE, **os.environ},
                start_new_session=True,
                preexec_fn=_stop_with_parent,
            )
        except FileNotFoundError:
            print_error(
                f"{command[0]} is not on PATH; install an MPI, or name its launcher with --mpirun"
            )
            return exits.WRONG_ENVIRONMENT
        except OSError as error:  # it is not executable, for instance
            print_error(f"{command[0]} cannot be started: {error.strerror}")
            return exits.WRONG_ENVIRONMENT
        return self._watch(process)

    def _watch(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for mpirun. After a request to stop it gets SIGUSR1; after the grace time its
        process group gets SIGTERM, and 5 s later SIGKILL.
        """
        signals_sent, terminated = 0, 0.0
        while True:
            try:
                code = process.wait(timeout=0.2)
                code = 128 - code if code < 0 else code
                return self._stopped_early() if signals_sent == 1 and code == _USR1_CODE else code
            except subprocess.TimeoutExpired:
                pass
            if self._stop_signal is None:
                continue
            waited = time.monotonic() - self._stop_time
            if signals_sent == 0:
                print_status(
                    f"launch: {self._stop_signal}: stopping the run with a checkpoint (at most "
                    f"{self._grace_seconds:g} s)"
                )
                # mpirun forwards it to every rank, unlike SIGTERM, which kills them after 1 s
                process.send_signal(signal.SIGUSR1)
                signals_sent = 1
            elif signals_sent == 1 and waited > self._grace_seconds:
                print_error("the grace time is over: ending the run without another checkpoint")
                _signal_group(process, signal.SIGTERM)
                signals_sent, terminated = 2, time.monotonic()
            elif signals_sent == 2 and time.monotonic() - terminated > _TERMINATE_SECONDS:
                _signal_group(process, signal.SIGKILL)
                signals_sent = 3

    def _stopped_early(self) -> int:
        """The request to stop reached mpirun or a rank that did not handle it yet (or any more), so
        this start has trained nothing that is not in a checkpoint.
        """
        print_status(
            f"launch: {self._stop_signal}: stopped before the ranks were ready; the same command "
            "goes on from the last checkpoint, or begins"
        )
        return exits.STOPPED

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_signal is None:
            self._stop_signal, self._stop_time = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT:
            self._stop_time = float("-inf")  # a second Ctrl-C ends the grace time

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._stop_signal is None:
            time.sleep(0.05)


def _stop_with_parent() -> None:
    """In the child: request SIGUSR1, an orderly stop, for when this launcher is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def checkpointed_steps(folder: Path) -> int:
    """The step of the newest checkpoint in a run folder; −1 if there is none."""
    steps = [path.stem.removeprefix("step_") for path in (folder / "checkpoints").glob("step_*.pt")]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch a job; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        if (code := _refuse_launchers()) is not None:
            return code
        if options.np < 1:
            raise exits.JobError("-np must be at least 1")
        if options.hosts_file and options.hosts_command:
            raise exits.JobError("give either --hosts-file or --hosts-command")
        folder = read_job(job_path(options.job), options.overrides).run_folder
        hosts = _hosts_source(options.hosts_file, options.hosts_command)
        command = [sys.executable, "-m", "hvdlarge.train", options.job, *options.overrides]
        launcher = Launcher(
            command,
            options.np,
            hosts,
            _mpirun_command(options.mpirun),
            options.grace_seconds,
            options.max_restarts,
            options.restart_stopped,
            lambda: checkpointed_steps(folder),
            options.fresh,
            folder,
        )
        return launcher.run()
    except exits.RunExit as end:
        print_error(str(end))
        return end.code


def _refuse_launchers() -> int | None:
    """The exit code where a launcher started this command several times, which one process per
    host reports; None otherwise.
    """
    if wrong := wrong_launch(os.environ):
        report_wrong_launch(os.environ, lambda: print_error(wrong))
        return exits.WRONG_ENVIRONMENT
    launch = detect(os.environ)
    if launch is None or launch.size < 2:
        return None
    if launch.is_local_leader:
        print_error(
            f"hvdlarge launch starts mpirun itself, but {launch.launcher} started it "
            f"{launch.size} times: run it without a launcher, or start `hvdlarge train` with it"
        )
    return exits.WRONG_ENVIRONMENT


def _mpirun_command(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise exits.JobError(f"--mpirun {text}: {error}") from None
    if not words:
        raise exits.JobError("--mpirun is empty: name the command that starts the ranks")
    return words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.launch",
        description=(
            "Run a job on many workers with mpirun, with orderly stops, and restarts after a lost "
            "rank."
        ),
        epilog=(
            "Exit codes are those of hvdlarge.train. SIGTERM or Ctrl-C stops with a checkpoint "
            "(75); the same command resumes the run."
        ),
    )
    parser.add_argument(
        "-np", type=int, required=True, metavar="N", help="maximum number of workers"
    )
    parser.add_argument("--hosts-file", metavar="FILE", help="hosts with slots, read at each start")
    parser.add_argument(
        "--hosts-command", metavar="COMMAND", help="prints the hosts, run at each start"
    )
    parser.add_argument(
        "--mpirun",
        default="mpirun",
        metavar="COMMAND",
        help="mpirun and its options, in one string",
    )
    parser.add_argument(
        "--grace-seconds", type=float, default=60.0, help="time for an orderly stop (default: 60)"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=100, help="maximum number of restarts (default: 100)"
    )
    parser.add_argument(
        "--restart-stopped",
        action="store_true",
        help="restart also after exit code 75 (stopped on request)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="set an earlier run aside and begin anew; restarts resume the new run",
    )
    parser.add_argument("job", help="the job file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="as for hvdlarge.train"
    )
    return parser


def _hosts_source(file: str | None, command: str | None) -> Callable[[], Hosts] | None:
    def from_file() -> Hosts:
        try:
            return parse_hosts(Path(file or "").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise exits.JobError(f"--hosts-file {file}: {reason}") from None

    def from_command() -> Hosts:
        try:
            result = subprocess.run(
                shlex.split(command or "") or [""],
                capture_output=True,
                text=True,
                timeout=_HOSTS_COMMAND_SECONDS,
                check=False,
                start_new_session=True,  # Ctrl-C is for this launcher
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise exits.JobError(f"--hosts-command {command}: {error}") from None
        if result.returncode:
            raise exits.JobError(
                f"--hosts-command {command}: exit code {result.returncode}: {result.stderr.strip()}"
            )
        return parse_hosts(result.stdout)

    if file is not None:
        return from_file
    return from_command if command is not None else None


if __name__ == "__main__":
    sys.exit(main())
