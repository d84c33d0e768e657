import os

import pytest

from hvdlarge.comm.launcher import (
    Launch,
    bound_cores,
    cores_per_worker,
    detect,
    reports_wrong_launch,
    starting_settings,
    wrong_launch,
)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
         Launch("Open MPI", 1, 4, 0, 1)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}, Launch("Hydra", 2, 4, 2, 4)),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "2"}, Launch("horovodrun --gloo", 0, 2, 0, 2)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, Launch("srun", 5, 8, 1, 4)),
        ({"PMI_RANK": "8", "PMI_SIZE": "16", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
         Launch("Hydra", 8, 16, 0, 8)),
        # Hydra's processes inherit what Slurm says of the one that started them
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, Launch("Hydra", 3, 4, 3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, None),  # a batch script, not a launch
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "64"}, None),
    ],
)  # fmt: skip
def test_launchers_are_told_by_their_variables(environ, expected):
    assert detect(environ) == expected


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "is_wrong"),
    [
        (TORCHRUN, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),  # as of Kubernetes' operators, or set by hand
        (TORCHRUN | MPI, True),  # mpirun -np 2 torchrun …: each of the two starts several
        ({"RANK": "0", "WORLD_SIZE": "2"} | MPI, False),  # mpirun, with variables of one's own
        (TORCHRUN | {"WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "4"}, False),
        ({"RANK": "1", "WORLD_SIZE": "four"}, False),
        (MPI, False),
        ({}, False),
    ],
)
def test_several_processes_without_mpi_are_a_wrong_launch(environ, is_wrong):
    assert (wrong_launch(environ) is not None) == is_wrong


STEP = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}


def test_a_step_of_slurm_without_pmi_is_a_wrong_launch_which_its_first_task_reports():
    assert "srun --mpi=pmix" in wrong_launch(STEP)
    assert not reports_wrong_launch(STEP)
    assert reports_wrong_launch(STEP | {"SLURM_PROCID": "0", "RANK": "0"})


@pytest.mark.parametrize(
    "other",
    [
        {"PMIX_RANK": "1"},
        {"PMI_RANK": "1"},
        {"OMPI_COMM_WORLD_RANK": "1"},  # an mpirun in the step
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_step_of_slurm_with_pmi_is_none(other):
    assert wrong_launch(STEP | other) is None


def test_one_process_per_host_reports_a_wrong_launch():
    assert reports_wrong_launch({"RANK": "8", "LOCAL_RANK": "0"})
    assert not reports_wrong_launch({"RANK": "8", "LOCAL_RANK": "3"})
    assert reports_wrong_launch({"RANK": "0"})
    assert not reports_wrong_launch({"RANK": "1"})


def test_cores_are_those_of_the_binding_shared_with_the_workers_of_the_same_binding():
    assert bound_cores() == sorted(os.sched_getaffinity(0))
    one_host = [("a", range(8))] * 4
    assert [cores_per_worker(one_host, rank) for rank in range(4)] == [2, 2, 2, 2]
    assert cores_per_worker([("a", [0]), ("a", [1])], 1) == 1
    assert cores_per_worker([("a", range(8)), ("b", range(8))], 1) == 8  # two hosts share nothing
    assert cores_per_worker([("a", [3])] * 16, 5) == 1


def test_settings_never_replace_the_users():
    assert starting_settings({}, 2, 2) == {
        "HOROVOD_FUSION_THRESHOLD": "0",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    assert starting_settings({}, 4, 64) == {"HOROVOD_FUSION_THRESHOLD": "0"}
    assert starting_settings({"HOROVOD_FUSION_THRESHOLD": "1"}, 4, 64) == {}


def test_a_stall_shutdown_before_the_stall_check_is_mended():
    given = {"HOROVOD_FUSION_THRESHOLD": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "30"}
    assert starting_settings(given, 1, 64) == {"HOROVOD_STALL_CHECK_TIME_SECONDS": "30"}
    assert starting_settings(given | {"HOROVOD_STALL_CHECK_TIME_SECONDS": "20"}, 1, 64) == {}
    assert (
        starting_settings(given | {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "0"}, 1, 64) == {}
    )  # never
