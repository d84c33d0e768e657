"""What surrounds a run: versions, the host, and the variables that MPI and Horovod read. Needs none
of them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Protocol

from hvdlarge import __version__
from hvdlarge.comm.launcher import Launch, bound_cores, starting_settings


class HorovodSettings(Protocol):
    """The job's section for Horovod."""

    @property
    def fusion_mib(self) -> float:
        """Size of the buffers in which gradients are sent together, in MiB."""
        ...

    @property
    def cycle_ms(self) -> float | None:
        """How often Horovod looks for work, in milliseconds."""
        ...

    @property
    def yield_when_idle(self) -> bool | None:
        """Whether a waiting rank gives its core away."""
        ...


_PACKAGES = ("torch", "horovod", "mpi4py", "numpy", "triton")
# Horovod's variables that differ from rank to rank, or from host to host, by their nature.
_OF_A_RANK = (
    "HOROVOD_RANK",
    "HOROVOD_SIZE",
    "HOROVOD_LOCAL_",
    "HOROVOD_CROSS_",
    "HOROVOD_HOSTNAME",
    "HOROVOD_GLOO_",
    "HOROVOD_CONTROLLER",
    "HOROVOD_CPU_OPERATIONS",
    "HOROVOD_THREAD_AFFINITY",
    "HOROVOD_TIMELINE",
    "HOROVOD_LOG_",
    "HOROVOD_NCCL_HOME",
    "HOROVOD_CUDA_HOME",
)


def versions() -> dict[str, str | None]:
    """Of the engine, Python and the packages whose versions may change results; None for one that
    is not installed.
    """
    found: dict[str, str | None] = {
        "hvdlarge": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def settle(launch: Launch | None, horovod: HorovodSettings) -> dict[str, str]:
    """Set what MPI and Horovod read when they start, before either does; returns what was set."""
    if launch is None:
        return {}
    cores = len(bound_cores())
    settings = starting_settings(
        os.environ,
        launch.local_size,
        cores,
        horovod.fusion_mib,
        horovod.cycle_ms,
        horovod.yield_when_idle,
    )
    os.environ.update(settings)
    return settings


def host() -> dict[str, Any]:
    """What the run folder keeps about each worker; `cores` are the numbers of those it may run
    on.
    """
    return {"host": socket.gethostname(), "pid": os.getpid(), "cores": bound_cores()}


def shared_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Horovod's variables that must be the same on every rank: they decide in which order sums are
    added up, and when.

    >>> shared_settings({"HOROVOD_RANK": "1", "HOROVOD_CYCLE_TIME": "2", "HOME": "/home/ada"})
    {'HOROVOD_CYCLE_TIME': '2'}
    """
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith("HOROVOD_") and not name.startswith(_OF_A_RANK)
    }
