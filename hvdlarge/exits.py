"""How a run ends: the exit codes, and the one way in which every rank leaves together.

Source:   docs/design.md. Under MPI a rank that leaves alone makes the launcher's
          code a race, so there are two ways only: all ranks raise the same `RunExit`, or one rank
          aborts the whole run with a code.
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
CANNOT_SAVE = 74
STOPPED = 75
LOST_RANK = 76
BAD_CHECKPOINT = 77


class RunExit(Exception):
    """The run ends here, on every rank; the message is for the user, in one piece."""

    code = INTERNAL_ERROR


class JobError(RunExit):
    """The job file or the command line is wrong."""

    code = WRONG_JOB


class InvalidEnvironmentError(RunExit):
    """The machine cannot carry the run."""

    code = WRONG_ENVIRONMENT


class RanksDisagreeError(RunExit):
    """The ranks do not run the same thing."""

    code = RANKS_DISAGREE


class DivergedError(RunExit):
    """Training is no longer finite."""

    code = DIVERGED


class CheckpointWriteError(RunExit):
    """A checkpoint, or another file of the run, could not be written."""

    code = CANNOT_SAVE

    @classmethod
    def of(cls, what: str, folder: Path, error: BaseException, left: str) -> CheckpointWriteError:
        """The end of a run that could not write `what` below `folder`.

        Args:
            what: with its path.
            folder: whose disk is looked at.
            error: an OSError, or torch's RuntimeError in the place of one, or whatever else came in
                between.
            left: what the user still has.
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
        return cls(f"{what} could not be written ({reason}); {free} bytes are free there; {left}")


class Stopped(RunExit):
    """The run was asked to stop and left a checkpoint: the same command goes on with it."""

    code = STOPPED


class CheckpointError(RunExit):
    """A checkpoint is damaged or belongs to another job."""

    code = BAD_CHECKPOINT


def run_exit(code: int, message: str) -> RunExit:
    """The end of a run with an exit code, of the class that stands for it.

    >>> run_exit(STOPPED, "as asked")
    Stopped('as asked')
    """
    kinds = {kind.code: kind for kind in RunExit.__subclasses__()}
    return kinds.get(code, RunExit)(message)


class OutOfMemory(Exception):
    """Memory ran out on one rank, which ends the run for all; the message says what to change. No
    RunExit: it is raised alone.
    """
