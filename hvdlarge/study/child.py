"""Trains one run of a study in a process of its own: `hvdlarge.train`, or `hvdlarge.launch`."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hvdlarge.comm.launcher import THREADS
from hvdlarge.exits import InvalidEnvironmentError, JobError
from hvdlarge.study.cells import JobSource, overrides

_LAUNCHERS = (
    *("OMPI_", "PMI_", "PMIX_", "HYDI_", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_"),
    *("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_", "HOROVOD_CROSS_"),
)
_KEPT = ("OMPI_MCA_", "OMPI_ALLOW_RUN_AS_ROOT")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LAST_BYTES = 20_000  # of its output, in which the reason of an end is looked for
_ERROR = "hvdlarge: error: "


class Child:
    """A run that trains.

    Args:
        source: the job.
        settings: of this run.
        workers: ranks.
        threads: of each.
        mpirun: the command and its options, for several workers, as `mpirun_command` gives it.
        output: the file that gets what it prints; a run that goes on adds to it.
        gpus: CUDA_VISIBLE_DEVICES of the run; None: that of the study.
        claim: the lock of the run, which the process (that of the launcher, for several workers)
            inherits: a run is free again only when both this process and that have ended.
    """

    def __init__(
        self,
        source: JobSource,
        settings: Mapping[str, Any],
        workers: int,
        threads: int,
        mpirun: str,
        gpus: str | None,
        output: Path,
        claim: IO[str],
    ) -> None:
        changes = overrides(settings)
        if workers == 1:
            command = [sys.executable, "-m", "hvdlarge.train", str(source.path), *changes]
        else:
            command = [sys.executable, "-m", "hvdlarge.launch", "-np", str(workers)]
            command += ["--mpirun", mpirun, str(source.path), *changes]
        self._output, self._claim, self.begun = output, claim, time.monotonic()
        self._alone, self._sent = workers == 1, 0
        environment = child_environment(os.environ, threads, source.place.parent)
        if gpus is not None:
            environment[_VISIBLE] = gpus
        # A launcher stops its ranks with a checkpoint; a single run needs no time for that, since
        # the next start goes on from its last one
        parent_ends = signal.SIGKILL if workers == 1 else signal.SIGTERM
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the study
                pass_fds=[claim.fileno()],
                preexec_fn=lambda: _end_with_parent(parent_ends),
            )

    def code(self) -> int | None:
        """The exit code; None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def stop(self) -> None:
        """Request an orderly stop, with a checkpoint; once."""
        if not self._sent:
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it: a single run at once; several workers by their launcher, within seconds."""
        if self._alone:
            self._signal(signal.SIGKILL)
        elif self._sent < 2:
            self.stop()
            self._signal(signal.SIGINT)  # ends the grace time

    def close(self) -> None:
        """Release the run."""
        self._process.wait()
        self._claim.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)
            self._sent += 1

    def reason(self) -> str:
        """The last error that it printed, on one line; else its last line."""
        try:
            with self._output.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - _LAST_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        at = [number for number, line in enumerate(lines) if _ERROR in line]
        if at:
            text = " ".join([lines[at[-1]].partition(_ERROR)[2], *_continued(lines[at[-1] + 1 :])])
        else:
            text = next((line for line in reversed(lines) if line.strip()), "")
        return text.strip()[:500]


def _continued(lines: list[str]) -> list[str]:
    """The lines of a list of problems, which are indented."""
    found = []
    for line in lines:
        if not line.startswith("  "):
            break
        found.append(line.strip())
    return found


def child_environment(environ: Mapping[str, str], threads: int, beside: Path) -> dict[str, str]:
    """The environment of a run: without the variables of a launcher that has started the study,
    with its threads, and with the folder of the job's or study's file for parts of its own.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name.startswith(_KEPT) or not name.startswith(_LAUNCHERS)
    }
    path = [*filter(None, [environ.get("PYTHONPATH")]), str(beside.absolute())]
    return kept | {
        THREADS: str(threads),
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(path),
    }


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that runs of this process can see, as CUDA_VISIBLE_DEVICES names them.

    >>> visible_gpus({"CUDA_VISIBLE_DEVICES": "3, 5"}), visible_gpus({"CUDA_VISIBLE_DEVICES": ""})
    (['3', '5'], [])
    """
    given = environ.get(_VISIBLE)
    if given is None:
        import torch  # seconds

        return [str(number) for number in range(torch.cuda.device_count())]
    return [name.strip() for name in given.split(",") if name.strip()]


def gpus_of_slot(gpus: Sequence[str], slot: int, workers: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of one of several runs at once: to each its own GPUs, in turn.

    Args:
        gpus: that are visible.
        slot: number of the run among those of the process, from 0.
        workers: of the run, each with a GPU.

    Returns:
        None if there are too few GPUs for more than one run.

    >>> [gpus_of_slot(["0", "1", "2", "3"], slot, workers=2) for slot in range(3)]
    ['0,1', '2,3', '0,1']
    """
    groups = len(gpus) // workers
    if groups < 2:
        return None
    first = slot % groups * workers
    return ",".join(gpus[first : first + workers])


def mpirun_command(text: str) -> str:
    """The command that starts ranks, with what passes HVDLARGE_THREADS to those on all hosts;
    MPICH's passes all variables.

    Raises:
        JobError: if the text is no command.
        InvalidEnvironmentError: if it cannot be run.

    >>> mpirun_command("mpirun --oversubscribe")  # doctest: +SKIP
    'mpirun -x HVDLARGE_THREADS --oversubscribe'
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise JobError(f"--mpirun {text}: {error}") from None
    if not words:
        raise JobError("--mpirun is empty: name the command that starts the ranks")
    return shlex.join([words[0], *(["-x", THREADS] if _is_open_mpi(words[0]) else []), *words[1:]])


def _is_open_mpi(command: str) -> bool:
    try:
        result = subprocess.run(
            [command, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        raise InvalidEnvironmentError(
            f"{command} cannot be run; install an MPI, or name its launcher with --mpirun"
        ) from None
    return "Open MPI" in result.stdout or "OpenRTE" in result.stdout


def _end_with_parent(number: signal.Signals) -> None:
    """In the child: get a signal when the study is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
