"""Reads a launcher's environment variables, and chooses those to set before MPI starts.

Source:   the variables that Open MPI, MPICH's and Intel's Hydra, PMIx under Slurm, Slurm itself and
          Horovod's own launcher set for each process.
Contract: reads the environment only; works without Horovod and MPI.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """The place of this process in a launch, as described by its launcher."""

    launcher: str
    rank: int
    size: int  # workers
    local_rank: int
    local_size: int  # workers on this host

    @property
    def is_local_leader(self) -> bool:
        """Whether this process reports for its host."""
        return self.local_rank == 0


def is_reporter(launch: Launch | None) -> bool:
    """Whether this process reports for all workers: rank 0, or the only one."""
    return launch is None or launch.rank == 0


# (launcher, rank, size, local rank, local size); the first whose rank and size are both set counts
_VARIABLES = (
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

THREADS = "HVDLARGE_THREADS"  # the most threads of a worker
_REPORT_SECONDS = 5.0  # within which another process of this host has reported
YIELD_WHEN_IDLE = "OMPI_MCA_mpi_yield_when_idle"
_STALL_CHECK_SECONDS = 60  # Horovod's default


def detect(environ: Mapping[str, str]) -> Launch | None:
    """The launch of this process; None for a plain `python -m hvdlarge.train`.

    >>> detect({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"})
    Launch(launcher='Open MPI', rank=3, size=8, local_rank=3, local_size=8)
    >>> detect({"HOME": "/home/ada"}) is None
    True
    """
    for launcher, rank_name, size_name, local_rank_name, local_size_name in _VARIABLES:
        if rank_name in environ and size_name in environ:
            # A Slurm batch script has these variables too; only a step of several tasks is a launch
            if launcher == "srun" and int(environ[size_name]) < 2:
                continue
            rank, size = int(environ[rank_name]), int(environ[size_name])
            # Slurm's PMI gives no place on the host; Slurm itself does
            by_slurm = environ.get("SLURM_STEP_NUM_TASKS") == environ[size_name]
            slurm_rank, slurm_size = (
                environ.get(name) if by_slurm else None
                for name in ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
            )
            local_rank = int(environ.get(local_rank_name, slurm_rank or rank))
            local_size = environ.get(local_size_name, slurm_size or str(size))
            return Launch(launcher, rank, size, local_rank, _leading_number(local_size, size))
    return None


def wrong_launch(environ: Mapping[str, str]) -> str | None:
    """What is wrong with a launch by torchrun, `accelerate launch`, an `srun` without PMIx, or
    another launcher that starts several processes without MPI, each of which would train the whole
    job alone; None otherwise.

    >>> wrong_launch({"RANK": "1", "WORLD_SIZE": "4"})[:52]
    'RANK=1 and WORLD_SIZE=4 are set as by torchrun or ac'
    >>> wrong_launch({"RANK": "0", "WORLD_SIZE": "1"}) is None
    True
    """
    if tasks := _tasks_without_pmi(environ):
        return (
            f"srun started {tasks} processes without PMIx, so that MPI sees one of them each: "
            f"{tasks} runs of one would begin. Start it with `srun --mpi=pmix …`, if `srun "
            f"--mpi=list` names it, else without srun: `hvdlarge launch -np {tasks} job.yaml`"
        )
    size = environ.get("WORLD_SIZE", "")
    if "RANK" not in environ or not size.isdigit() or int(size) < 2:
        return None
    # One torchrun on each host may be started by MPI or Slurm, whose variables it passes on
    if "TORCHELASTIC_RUN_ID" not in environ and detect(environ) is not None:
        return None
    return (
        f"RANK={environ['RANK']} and WORLD_SIZE={size} are set as by torchrun or accelerate "
        f"launch, but workers find each other over MPI only: {size} independent runs of one worker "
        "would start. "
        f"Start it with `hvdlarge launch -np {size} job.yaml`, `mpirun -np {size} hvdlarge "
        f"train job.yaml` or `horovodrun -np {size} hvdlarge train job.yaml`, or unset RANK and "
        "WORLD_SIZE for a run on one worker"
    )


def _tasks_without_pmi(environ: Mapping[str, str]) -> int | None:
    """Processes of a step of Slurm whose ranks MPI has no way to know; None in any other launch."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if "SLURM_PROCID" not in environ or not tasks.isdigit() or int(tasks) < 2:
        return None
    by_mpi = ("PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
    return None if any(name in environ for name in by_mpi) else int(tasks)


def reports_wrong_launch(environ: Mapping[str, str]) -> bool:
    """Whether this process is the one of its host that reports such a launch; of a step of Slurm
    it is the first.
    """
    if _tasks_without_pmi(environ):
        return environ["SLURM_PROCID"] == "0"
    return environ.get("LOCAL_RANK", environ.get("RANK")) == "0"


def report_wrong_launch(environ: Mapping[str, str], report: Callable[[], None]) -> None:
    """Call `report` in the process of its host that reports such a launch. The others wait, since
    torchrun ends all processes of a host as soon as one of them has ended.
    """
    if reports_wrong_launch(environ):
        report()
    else:
        time.sleep(_REPORT_SECONDS)


def _leading_number(text: str, default: int) -> int:
    """4 for '4(x2)', Slurm's notation of tasks per node."""
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
    """A worker's share of the cores it is bound to, at least 1.

    Args:
        bindings: host and cores of each worker, in rank order.
        rank: of the worker.

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


def threads_per_worker(workers: Sequence[Mapping[str, Any]], rank: int) -> int:
    """The threads of a worker: its share of the cores, and no more than HVDLARGE_THREADS there.

    Args:
        workers: of each, in rank order, what `environment.host` gives.
        rank: of the worker.

    >>> threads_per_worker([{"host": "a", "cores": [0, 1], "threads": 1}], rank=0)
    1
    """
    cores = cores_per_worker([(worker["host"], worker["cores"]) for worker in workers], rank)
    return min(cores, workers[rank].get("threads") or cores)


def starting_settings(
    environ: Mapping[str, str],
    local_size: int,
    cores: int,
    fusion_mib: float = 0.0,
    cycle_ms: float | None = None,
    yield_when_idle: bool | None = None,
) -> dict[str, str]:
    """Environment variables to set before MPI and Horovod start, except those already set.

    HOROVOD_FUSION_THRESHOLD=0: what is fused depends on timing, and with it the order of sums.
    OMPI_MCA_mpi_yield_when_idle=1 with less than two cores per worker: otherwise a waiting rank, or
    Horovod's thread, takes a core from a rank that computes. HOROVOD_STALL_CHECK_TIME_SECONDS is
    lowered to HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, which Horovod ignores if it is below the former.

    Args:
        environ: the current environment.
        local_size: workers on this host.
        cores: number of cores that this process may run on.
        fusion_mib: HOROVOD_FUSION_THRESHOLD, in MiB.
        cycle_ms: HOROVOD_CYCLE_TIME, in milliseconds; None: Horovod's default.
        yield_when_idle: OMPI_MCA_mpi_yield_when_idle; None: by the number of cores.
    """
    settings = {"HOROVOD_FUSION_THRESHOLD": str(round(fusion_mib * 2**20))}
    if cycle_ms is not None:
        settings["HOROVOD_CYCLE_TIME"] = f"{cycle_ms:g}"
    if yield_when_idle is not None or cores < 2 * local_size:
        settings[YIELD_WHEN_IDLE] = "0" if yield_when_idle is False else "1"
    settings = {name: value for name, value in settings.items() if name not in environ}
    check, shutdown = (
        environ.get(f"HOROVOD_STALL_{what}_TIME_SECONDS", "") for what in ("CHECK", "SHUTDOWN")
    )
    if shutdown.isdigit() and 0 < int(shutdown) < (
        int(check) if check.isdigit() else _STALL_CHECK_SECONDS
    ):
        settings["HOROVOD_STALL_CHECK_TIME_SECONDS"] = shutdown
    return settings
