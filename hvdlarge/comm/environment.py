"""The environment of a run: versions, the host, and the variables that MPI and Horovod read.

Imports neither MPI nor Horovod.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Protocol

from hvdlarge import __version__
from hvdlarge.comm.launcher import (
    THREADS,
    YIELD_WHEN_IDLE,
    Launch,
    bound_cores,
    starting_settings,
)
from hvdlarge.exits import InvalidEnvironmentError


class HorovodSettings(Protocol):
    """The job's section for Horovod."""

    @property
    def fusion_mib(self) -> float:
        """Size of the fusion buffer, in MiB."""
        ...

    @property
    def cycle_ms(self) -> float | None:
        """Length of Horovod's cycle, in milliseconds; None: its default."""
        ...

    @property
    def yield_when_idle(self) -> bool | None:
        """Whether a waiting rank yields its core; None: by the number of cores."""
        ...


_PACKAGES = ("torch", "horovod", "mpi4py", "numpy", "triton")
# Prefixes of Horovod's variables that may differ between ranks or hosts
_PER_RANK = (
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
    """Versions of the engine, Python and the packages that may change results; None if not
    installed.
    """
    numbers: dict[str, str | None] = {
        "hvdlarge": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    return numbers | {package: _installed_version(package) for package in _PACKAGES}


@functools.cache  # reading a package's metadata takes milliseconds
def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def set_environment(launch: Launch | None, horovod: HorovodSettings) -> dict[str, str]:
    """Set the environment variables for MPI and Horovod, before either starts; returns them. The
    values that are replaced are kept for `unset_environment`.
    """
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
    _replaced.clear()
    _replaced.update({name: os.environ[name] for name in settings if name in os.environ})
    os.environ.update(settings)
    _read_by_mpi.setdefault(YIELD_WHEN_IDLE, os.environ.get(YIELD_WHEN_IDLE, "0"))
    return settings


def unset_environment(settings: Mapping[str, str]) -> None:
    """Take back what `set_environment` has set, so that a later run in this process sets its own:
    Horovod reads its variables each time it starts.
    """
    for name in settings:
        os.environ.pop(name, None)
    os.environ.update(_replaced)
    _replaced.clear()


_replaced: dict[str, str] = {}  # variables of the user's that `set_environment` has changed
_read_by_mpi: dict[str, str] = {}  # as of the first run of this process: MPI starts once


def cannot_be_set(horovod: HorovodSettings) -> str | None:
    """What of a job's section MPI will not follow, having started with an earlier run of this
    process, in words; None if it will follow all. To be called before `set_environment`.
    """
    wanted, read = horovod.yield_when_idle, _read_by_mpi.get(YIELD_WHEN_IDLE)
    if wanted is None or read is None or wanted == (read != "0"):
        return None
    return (
        f"horovod.yield_when_idle is {str(wanted).lower()}, but MPI has started with an earlier "
        f"run of this process, and keeps {YIELD_WHEN_IDLE}={read}"
    )


def host() -> dict[str, Any]:
    """Host name and its cores, process id and usable cores of this worker, for the run folder;
    with HVDLARGE_THREADS also the most threads that it may have.

    Raises:
        InvalidEnvironmentError: if HVDLARGE_THREADS is not a positive whole number.
    """
    threads = os.environ.get(THREADS)
    if threads is not None and not (threads.isdecimal() and int(threads) >= 1):
        raise InvalidEnvironmentError(f"{THREADS}={threads}: it must be a whole number from 1")
    limit = {} if threads is None else {"threads": int(threads)}
    return {
        "host": socket.gethostname(),
        "host_cores": os.cpu_count(),
        "pid": os.getpid(),
        "cores": bound_cores(),
        **limit,
    }


def shared_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Horovod's variables that must be the same on every rank, as they affect the order of sums.

    >>> shared_settings({"HOROVOD_RANK": "1", "HOROVOD_CYCLE_TIME": "2", "HOME": "/home/ada"})
    {'HOROVOD_CYCLE_TIME': '2'}
    """
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith("HOROVOD_") and not name.startswith(_PER_RANK)
    }
