"""How the tests start runs: the commands that users type, with what several ranks on few cores need."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# More ranks than cores are meant here; root needs to be allowed, as containers have no other user; nothing leaves the machine.
MPIRUN = [
    "mpirun",
    "--allow-run-as-root",
    "--oversubscribe",
    "--bind-to",
    "none",
    "--mca",
    "oob_tcp_if_include",
    "lo",
    "--mca",
    "btl_tcp_if_include",
    "lo",
]
TRAIN = [sys.executable, "-m", "hvdlarge.train"]


@pytest.fixture(scope="session", autouse=True)
def core_of_its_own(worker_id):
    """Give each process of pytest-xdist a core, which the runs that it starts inherit.

    Ranks wait for each other by asking again and again. Those of one run yield to each other on
    their common core; next to other runs' ranks they would take turns with them in asking.
    """
    if worker_id != "master":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker_id.removeprefix("gw")) % len(cores)]})


def environment(**changes):
    """The environment of a run: this one, with the tests' Python first on PATH."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **changes,
    }


@dataclass
class EndedRun:
    """A run that has ended, with what it printed."""

    code: int
    out: str
    err: str = ""

    @property
    def text(self):
        """Both streams."""
        return self.out + self.err

    @property
    def errors(self):
        """The engine's own error lines."""
        return [line for line in self.text.splitlines() if "hvdlarge: error:" in line]
