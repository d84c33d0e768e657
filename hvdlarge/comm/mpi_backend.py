"""The control channel over MPI: the only file that knows mpi4py.

An mpi4py broadcast of a fixed record costs 0.002 to 0.04 ms where a Horovod broadcast waits one
cycle (1 to 2 ms).

Every collective is begun without waiting and then asked after until it is done. A rank that waits
inside MPI would wait in C: no signal would reach Python, and two threads of one process, this one
and Horovod's, would block in the same MPI at once.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from typing import NoReturn

import mpi4py

from hvdlarge.comm.interfaces import WorldMismatchError
from hvdlarge.comm.launcher import Launch

# MPI starts when the channel is opened, after the environment has been settled
mpi4py.rc.initialize = False
# Nor may it ever start in a loader process whose data set's module imports mpi4py: such a process
# is no rank.
os.environ.setdefault("MPI4PY_RC_INITIALIZE", "0")
from mpi4py import MPI  # noqa: E402

# Most answers are there within microseconds. Who has waited longer gives the core away between two
# questions, and who has waited long sleeps: more ranks than cores must not take turns at asking.
_GIVE_WAY_AFTER, _SLEEP_AFTER, _SLEEP_SECONDS = 20e-6, 2e-3, 100e-6


class MpiChannel:
    """Decisions and verdicts over a communicator of their own, so that Horovod's messages never
    meet them.
    """

    def __init__(self, launch: Launch) -> None:
        """Start MPI. Every rank calls this together.

        Raises:
            WorldMismatchError: if MPI sees another number of workers than the launcher started, or
                cannot serve two threads.
        """
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        if MPI.COMM_WORLD.size != launch.size:
            raise WorldMismatchError(
                f"{launch.launcher} started {launch.size} workers, but MPI sees "
                f"{MPI.COMM_WORLD.size}: "
                "start the run with the launcher of the MPI that mpi4py uses "
                f"({MPI.Get_library_version().splitlines()[0].split(', package')[0].rstrip()})"
            )
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise WorldMismatchError(
                "this MPI does not allow calls from two threads (MPI_THREAD_MULTIPLE), which "
                "Horovod needs"
            )
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size

    def broadcast(self, record: bytes | None, length: int) -> bytes:
        """Rank 0's `record` of exactly `length` bytes, on every rank. Every rank calls this
        together.
        """
        buffer = bytearray(length)
        if self.rank == 0:
            if record is None or len(record) != length:
                raise ValueError(f"rank 0 must give a record of {length} bytes")
            buffer[:] = record
        _wait(self._comm.Ibcast([buffer, MPI.BYTE], root=0))
        return bytes(buffer)

    def allgather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of the ranks. Every rank calls this together."""
        lengths = bytearray(8 * self.size)
        _wait(
            self._comm.Iallgather(
                [len(message).to_bytes(8, "little"), MPI.BYTE], [lengths, MPI.BYTE]
            )
        )
        counts = [int.from_bytes(lengths[8 * r : 8 * r + 8], "little") for r in range(self.size)]
        gathered = bytearray(sum(counts))
        _wait(self._comm.Iallgatherv([message, MPI.BYTE], [gathered, counts, MPI.BYTE]))
        limits = itertools.accumulate(counts, initial=0)
        return [bytes(gathered[start:stop]) for start, stop in itertools.pairwise(limits)]

    def start_max(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Begin to find the largest of each value over all ranks. Every rank calls this together,
        and later the result.
        """
        mine, largest = array("d", values), array("d", bytes(8 * len(values)))
        request = self._comm.Iallreduce([mine, MPI.DOUBLE], [largest, MPI.DOUBLE], op=MPI.MAX)
        # MPI reads and writes both until it is done, and the request does not hold an array
        held = (mine, largest)

        def wait() -> list[float]:
            _wait(request)
            return held[1].tolist()

        return wait

    def barrier(self) -> None:
        """Wait until every rank has come here. Every rank calls this together."""
        _wait(self._comm.Ibarrier())

    def close(self) -> None:
        """Leave MPI in order, after the collectives are closed. Every rank calls this together."""
        self.barrier()
        self._comm.Free()
        MPI.Finalize()

    def abort(self, code: int) -> NoReturn:
        """End every process of the run with this exit code, at once. Any single rank may call
        it.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(code)
        os._exit(code)  # MPI's abort does not return; this is for the reader and the type checker


def _wait(request: MPI.Request) -> None:
    """Return when a collective is done. Python's signal handlers run meanwhile."""
    began = time.monotonic()
    while not request.Test():
        waited = time.monotonic() - began
        if waited > _SLEEP_AFTER:
            time.sleep(_SLEEP_SECONDS)
        elif waited > _GIVE_WAY_AFTER:
            os.sched_yield()
