"""Ends a launcher that outlives the rank that has ended because of a hang.

mpirun then ends every other rank and waits for all hosts to confirm. For a host that was cut off it
waits until the kernel gives the connection up: a quarter of an hour with Linux's defaults. The same
holds for mpirun's daemon on that host.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 30.0  # mpirun needs 1 to 2 s where all hosts answer
# The command names of mpirun and of its daemons, in Open MPI 4 and 5
_LAUNCHERS = ("mpirun", "mpiexec", "orte", "prte")
# A descriptor of a process becomes readable when the process ends
_GUARD = """
import select, signal, sys
launcher, seconds = int(sys.argv[1]), float(sys.argv[2])
if not select.select([launcher], [], [], seconds)[0]:
    signal.pidfd_send_signal(launcher, signal.SIGKILL)
"""


def kill_stuck_launcher(seconds: float = SECONDS) -> None:
    """Let a process of its own kill this rank's parent if that is a launcher which is still there
    after some seconds. To be called just before this rank exits; Linux only.
    """
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text()
        if not name.startswith(_LAUNCHERS):
            return
        launcher = os.pidfd_open(parent)
        # Without this rank's streams, which mpirun reads to their end, and outside of its process
        # group, which mpirun kills
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(launcher), str(seconds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[launcher],
            start_new_session=True,
            cwd="/",
        )
    except (OSError, AttributeError):  # not Linux, or one before 5.3
        return
