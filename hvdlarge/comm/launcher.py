"""What a launcher told this process through its environment, and what the process sets in it before
MPI starts.

Source:   the variables that Open MPI, MPICH's and Intel's Hydra, PMIx under Slurm, Slurm itself and
          Horovod's own launcher set for each process.
Contract: reads the environment only; needs neither Horovod nor MPI, so it also works where both are
          missing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One process of a launch, as its launcher described it."""

    launcher: str
    rank: int
    size: int  # workers
    local_rank: int
    local_size: int  # workers on this host

    @property
    def is_local_leader(self) -> bool:
        """Whether this is the one process of its host that reports what is wrong with the host."""
        return self.local_rank == 0


# (launcher, rank, size, local rank, local size); the first whose rank and size are both there
# counts.
_FAMILIES = (
    (
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("Hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    (
        "horovodrun --gloo",
        "HOROVOD_RANK",
        "HOROVOD_SIZE",
        "HOROVOD_LOCAL_RANK",
        "HOROVOD_LOCAL_SIZE",
    ),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)

_STALL_CHECK_SECONDS = 60  # Horovod's default


def detect(environ: Mapping[str, str]) -> Launch | None:
    """The launch that this process belongs to, or None for a plain `python -m hvdlarge.train`.

    >>> detect({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"})
    Launch(launcher='Open MPI', rank=3, size=8, local_rank=3, local_size=8)
    >>> detect({"HOME": "/home/ada"}) is None
    True
    """
    for launcher, rank_name, size_name, local_rank_name, local_size_name in _FAMILIES:
        if rank_name in environ and size_name in environ:
            # A Slurm batch script carries such variables too; only a step of more than one task is
            # a launch.
            if launcher == "srun" and int(environ[size_name]) < 2:
                continue
            rank, size = int(environ[rank_name]), int(environ[size_name])
            local_rank = int(environ.get(local_rank_name, rank))
            local_size = environ.get(local_size_name, str(size))
            return Launch(launcher, rank, size, local_rank, _leading_number(local_size, size))
    return None


def _leading_number(text: str, default: int) -> int:
    """The 4 of '4(x2)', Slurm's way of writing tasks per node."""
    digits = text.split("(")[0].split(",")[0]
    return int(digits) if digits.isdigit() else default


def bound_cores() -> list[int]:
    """The cores that this process may run on."""
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


def cores_per_worker(bindings: Sequence[tuple[str, Sequence[int]]], rank: int) -> int:
    """Cores that a worker has for itself: those it is bound to, shared with the workers bound to
    the same ones.

    Args:
        bindings: the host and the cores of each worker, in the order of the ranks.
        rank: the worker asked about.

    >>> cores_per_worker([("a", (0, 1)), ("a", (0, 1)), ("b", (0, 1))], rank=0)
    1
    >>> cores_per_worker([("a", (0, 1)), ("a", (2, 3))], rank=1)
    2
    """
    host, cores = bindings[rank]
    sharing = sum(
        other_host == host and list(other) == list(cores) for other_host, other in bindings
    )
    return max(1, len(cores) // sharing)


def starting_settings(
    environ: Mapping[str, str],
    local_size: int,
    cores: int,
    fusion_mib: float = 0.0,
    cycle_ms: float | None = None,
    yield_when_idle: bool | None = None,
) -> dict[str, str]:
    """Environment variables to set before MPI and Horovod start; those that the user has set
    already are left alone.

    HOROVOD_FUSION_THRESHOLD=0: fused buffers change from run to run with the timing, and with them
    the order of the sums. OMPI_MCA_mpi_yield_when_idle=1, where there may be less than two cores
    for each worker: a waiting rank, or Horovod's own thread, otherwise keeps a core from a rank
    that computes. HOROVOD_STALL_CHECK_TIME_SECONDS, where HOROVOD_STALL_SHUTDOWN_TIME_SECONDS is
    below it: Horovod would ignore the latter.

    Args:
        environ: the environment as it is.
        local_size: workers on this host.
        cores: that this process may run on.
        fusion_mib: HOROVOD_FUSION_THRESHOLD, in MiB.
        cycle_ms: HOROVOD_CYCLE_TIME, in milliseconds; None leaves it at Horovod's own.
        yield_when_idle: OMPI_MCA_mpi_yield_when_idle; None: by the number of cores.
    """
    settings = {"HOROVOD_FUSION_THRESHOLD": str(round(fusion_mib * 2**20))}
    if cycle_ms is not None:
        settings["HOROVOD_CYCLE_TIME"] = f"{cycle_ms:g}"
    if yield_when_idle is not None or cores < 2 * local_size:
        settings["OMPI_MCA_mpi_yield_when_idle"] = "0" if yield_when_idle is False else "1"
    settings = {name: value for name, value in settings.items() if name not in environ}
    check, shutdown = (
        environ.get(f"HOROVOD_STALL_{what}_TIME_SECONDS", "") for what in ("CHECK", "SHUTDOWN")
    )
    if shutdown.isdigit() and 0 < int(shutdown) < (
        int(check) if check.isdigit() else _STALL_CHECK_SECONDS
    ):
        settings["HOROVOD_STALL_CHECK_TIME_SECONDS"] = shutdown
    return settings
