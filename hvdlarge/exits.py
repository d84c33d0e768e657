"""The exit codes of a run, and the exceptions with which all ranks end together.

Source:   docs/design.md. Under MPI the launcher's exit code is a race if one rank exits alone, so a
          run ends in one of two ways: all ranks raise the same `RunExit`, or one rank aborts all.
          Only a rank that hangs or has lost another exits alone; the launcher ends the others.
"""

from __future__ import annotations

import shutil
from pathlib import Path

FINISHED = 0
WRONG_JOB = 2
WRONG_ENVIRONMENT = 3
INTERNAL_ERROR = 70
RANKS_DISAGREE = 71
HUNG = 72
DIVERGED = 73
CHECKPOINT_WRITE_FAILED = 74
STOPPED = 75
RANK_LOST = 76
INVALID_CHECKPOINT = 77


class RunExit(Exception):
    """Ends the run on every rank; the message is for the user."""

    code = INTERNAL_ERROR


class JobError(RunExit):
    """The job file or the command line is invalid."""

    code = WRONG_JOB


class InvalidEnvironmentError(RunExit):
    """The machine or its installation does not support the run."""

    code = WRONG_ENVIRONMENT


class RanksDisagreeError(RunExit):
    """The ranks differ in something that must be the same on all."""

    code = RANKS_DISAGREE


class DivergedError(RunExit):
    """Gradients, weights or a loss are not finite."""

    code = DIVERGED


class CheckpointWriteError(RunExit):
    """A checkpoint, or another file of the run, could not be written."""

    code = CHECKPOINT_WRITE_FAILED

    @classmethod
    def of(cls, what: str, folder: Path, error: BaseException, intact: str) -> CheckpointWriteError:
        """The error with a message on `what`, the cause and the free space on the disk.

        Args:
            what: the file that could not be written, with its path.
            folder: on the disk that is written to.
            error: the cause: an OSError, torch's RuntimeError for one, or any other.
            intact: what the user still has.
        """
        try:
            free = f"{shutil.disk_usage(folder).free:,}"
        except OSError:
            free = "an unknown number of"
        kind = (
            ""
            if isinstance(error, (OSError, RuntimeError)) and str(error)
            else type(error).__name__
        )
        reason = getattr(error, "strerror", None) or ": ".join(
            filter(None, [kind, *str(error).splitlines()[:1]])
        )
        return cls(f"{what} could not be written ({reason}); {free} bytes are free there; {intact}")


class Stopped(RunExit):
    """The run was stopped on request, with a checkpoint from which the same command resumes."""

    code = STOPPED


class CheckpointError(RunExit):
    """A checkpoint is damaged or belongs to another job."""

    code = INVALID_CHECKPOINT


def run_exit(code: int, message: str) -> RunExit:
    """The exception of the class that belongs to an exit code.

    >>> run_exit(STOPPED, "as asked")
    Stopped('as asked')
    """
    kinds = {kind.code: kind for kind in RunExit.__subclasses__()}
    return kinds.get(code, RunExit)(message)


class PartError(Exception):
    """A part that the job names broke its contract on one rank. Not a RunExit, since the other
    ranks do not raise it.
    """

    origin = "a part that the job names"  # in words


class OutOfMemory(Exception):
    """One rank ran out of memory; the message names what to change. Not a RunExit, since the other
    ranks do not raise it.
    """


_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's, on a CPU
    "not enough memory",
    "CUDA error: out of memory",  # outside torch's caching allocator
    "[CUDA]: out of memory",
    "_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU or the host ran out of memory. Needs no torch.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shape mismatch"))
    (True, False)
    """
    if isinstance(error, (MemoryError, OutOfMemory)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # torch.OutOfMemoryError, by its name
    return type(error).__name__ == "OutOfMemoryError" or any(
        text in str(error) for text in _OUT_OF_MEMORY
    )


def is_device_assert(error: BaseException) -> bool:
    """Whether a kernel of a GPU found an index out of its range; raised late, by whatever waits for
    the GPU next.

    >>> is_device_assert(RuntimeError("CUDA error: device-side assert triggered"))
    True
    """
    return isinstance(error, RuntimeError) and "device-side assert" in str(error)
