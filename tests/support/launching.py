"""How the tests start runs: the commands that users type, with what several ranks on few cores need."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# More ranks than cores are meant here; root needs to be allowed, as containers have no other user; nothing leaves the machine.
MPIRUN = [
    "mpirun",
    "--allow-run-as-root",
    "--oversubscribe",
    "--mca",
    "oob_tcp_if_include",
    "lo",
    "--mca",
    "btl_tcp_if_include",
    "lo",
]
TRAIN = [sys.executable, "-m", "hvdlarge.train"]


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
