"""The control channel over MPI: the only file that imports mpi4py.

An mpi4py broadcast of a small record takes 0.002 to 0.04 ms; one by Horovod waits for a cycle of 1
to 2 ms.

Every collective is non-blocking and polled until it completes. A blocking call would wait in C,
where Python handles no signals, while Horovod's thread blocks in the same MPI.
"""

from __future__ import annotations

import atexit
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

# MPI starts when the channel is opened, after its environment variables have been set
mpi4py.rc.initialize = False
# It must not start in a loader process whose data set's module imports mpi4py: that is not a rank
os.environ.setdefault("MPI4PY_RC_INITIALIZE", "0")
from mpi4py import MPI  # noqa: E402

# Most collectives complete within microseconds. After longer waits a rank yields its core between
# polls, then sleeps: with more ranks than cores, polling would take time from ranks that compute.
_YIELD_AFTER_SECONDS, _SLEEP_AFTER_SECONDS, _SLEEP_SECONDS = 20e-6, 2e-3, 100e-6


class MpiChannel:
    """Small messages over a communicator separate from Horovod's."""

    def __init__(self, launch: Launch) -> None:
        """Start MPI. Every rank calls this together.

        Raises:
            WorldMismatchError: if MPI sees another number of workers than the launcher started, or
                does not support MPI_THREAD_MULTIPLE.
        """
        if not MPI.Is_initialized():  # by an earlier channel of this process, or the user's program
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

        Raises:
            ValueError: on rank 0, for a record of another length.
        """
        buffer = bytearray(length)
        if self.rank == 0:
            if record is None or len(record) != length:
                raise ValueError(f"rank 0 must give a record of {length} bytes")
            buffer[:] = record
        _wait(self._comm.Ibcast([buffer, MPI.BYTE], root=0))
        return bytes(buffer)

    def allgather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in rank order. Every rank calls this together."""
        # Both have names, since MPI reads and writes them until it is done
        length, lengths = len(message).to_bytes(8, "little"), bytearray(8 * self.size)
        _wait(self._comm.Iallgather([length, MPI.BYTE], [lengths, MPI.BYTE]))
        counts = [int.from_bytes(lengths[8 * r : 8 * r + 8], "little") for r in range(self.size)]
        gathered = bytearray(sum(counts))
        _wait(self._comm.Iallgatherv([message, MPI.BYTE], [gathered, counts, MPI.BYTE]))
        limits = itertools.accumulate(counts, initial=0)
        return [bytes(gathered[start:stop]) for start, stop in itertools.pairwise(limits)]

    def start_max(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Start a Max-allreduce of each value. Every rank calls this together, and later the
        returned function, which waits and returns the maxima.
        """
        local, largest = array("d", values), array("d", bytes(8 * len(values)))
        request = self._comm.Iallreduce([local, MPI.DOUBLE], [largest, MPI.DOUBLE], op=MPI.MAX)
        # `wait` refers to both: MPI uses them until it is done, and the request keeps neither alive
        buffers = (local, largest)

        def wait() -> list[float]:
            _wait(request)
            return buffers[1].tolist()

        return wait

    def barrier(self) -> None:
        """Wait for every rank. Every rank calls this together."""
        _wait(self._comm.Ibarrier())

    def close(self, last: bool = True) -> None:
        """Free the channel, after the collectives are closed, and finalize MPI if this is the
        `last` one, else when the process exits. Every rank calls this together.
        """
        self.barrier()
        self._comm.Free()
        if last:
            MPI.Finalize()
        else:
            atexit.register(_finalize)

    def abort(self, code: int) -> NoReturn:
        """End every process of the run with this exit code, at once. One rank suffices."""
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(code)
        os._exit(code)  # for the type checker: Abort does not return


def _finalize() -> None:
    if not MPI.Is_finalized():
        MPI.Finalize()


def _wait(request: MPI.Request) -> None:
    """Wait for a collective. Python's signal handlers run meanwhile."""
    start = time.monotonic()
    while not request.Test():
        waited = time.monotonic() - start
        if waited > _SLEEP_AFTER_SECONDS:
            time.sleep(_SLEEP_SECONDS)
        elif waited > _YIELD_AFTER_SECONDS:
            os.sched_yield()
