"""The benchmarks run, on one worker and on two, and write what they print; how fast anything is decides no test."""

import json
import socket
import sys

import pytest
from support.launching import MPIRUN

BENCH = [sys.executable, "-m", "hvdlarge.bench"]


def figures(folder):
    return json.loads((folder / "found.json").read_text())


def test_the_lars_benchmark_writes_what_it_prints(start, folder):
    ended = start([*BENCH, "lars", "--rounds", "1", "--json", "found.json"])
    assert ended.code == 0, ended.err
    found = figures(folder)
    assert set(found["variants"]) == {"LARS", "fused SGD", "loop", "foreach", "copy"}
    assert all(
        0 < side["lowest"] <= side["median"] <= side["highest"]
        for side in found["variants"].values()
    )
    assert found["variants"]["LARS"]["ratio"] == 1
    assert all(name in ended.out for name in found["variants"])


@pytest.mark.parametrize("workers", [None, 2])
def test_the_step_benchmark_writes_what_it_prints(start, folder, workers):
    launch = [] if workers is None else [*MPIRUN, "-np", str(workers)]
    job = ["jobs/digits.yaml", "batch.base=64", "epochs=1", "lr.warmup.epochs=0.1"]
    ended = start(
        [*launch, *BENCH, "step", *job, "--rounds", "1", "--steps", "3", "--json", "found.json"]
    )
    assert ended.code == 0, ended.err
    found = figures(folder)
    assert set(found["variants"]) == {"engine", "control", "bare loop", "one worker alone"}
    assert found["variants"]["bare loop"]["ratio"] == 1
    assert found["world_size"] == (workers or 1)
    assert ended.out.count("bare loop") == 2
    assert not (folder / "runs").exists()


def test_step_without_a_job_is_resnet20(start, folder):
    ended = start(
        [
            *BENCH,
            "step",
            "batch.micro=4",
            "--only",
            "engine",
            "--rounds",
            "1",
            "--steps",
            "2",
            "--json",
            "found.json",
        ]
    )
    assert ended.code == 0, ended.err
    assert list(figures(folder)["variants"]) == ["engine"]
    assert "resnet20" in ended.out


def test_an_allreduce_measurement_is_taken_up_by_a_plan(start, train, folder):
    ended = start(
        [*MPIRUN, "-np", "2", *BENCH, "allreduce", "--rounds", "1", "--json", "found.json"]
    )
    assert ended.code == 0, ended.err
    found = figures(folder)
    assert found["workers"] == 2
    assert found["cycle_seconds"] + found["message_seconds"] + found["hop_seconds"] > 0
    assert found["hosts"] == [socket.gethostname()] * 2
    carried = list(found["carried_seconds"].values())
    assert carried == sorted(carried)
    assert carried[-1] > 0
    assert train(2, "jobs/digits.yaml", "epochs=1").code == 0
    plan = [
        sys.executable,
        "-m",
        "hvdlarge.plan",
        "jobs/digits.yaml",
        "--world-size",
        "8",
        "--allreduce",
        "found.json",
    ]
    planned = start([*plan, "--measured", "runs/digits", "--json"])
    assert planned.code == 0, planned.err
    (row,) = json.loads(planned.out)["forecast"]["world_sizes"]
    assert (row["world_size"], row["hosts"]) == (8, 4)
    assert all(stage["allreduce_seconds"] > 0 for stage in row["stages"])
    assert row["seconds"] > 0
    assert "the run is fastest with" in start([*plan, "--measured", "runs/digits"]).out
    alone = start(plan)
    assert (alone.code, "name that run with --measured" in alone.err) == (2, True)
    wrong = start([*plan[:-1], "jobs/digits.yaml", "--measured", "runs/digits"])
    assert (wrong.code, "not what hvdlarge.bench allreduce --json writes" in wrong.err) == (2, True)


def test_the_data_benchmark_writes_what_it_prints(start, folder):
    (folder / "slow.py").write_text(
        "import time, torch\n"
        "class Set(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, i): time.sleep(0.001); return torch.zeros(3), i % 2\n"
        "def data(): return Set(), None\n"
    )
    (folder / "slow.yaml").write_text(
        "name: slow\nepochs: 3\ndata: {name: 'slow:data', num_workers: 1}\nmodel: {name: mlp}\n"
        "batch: {base: 8, micro: 4, growth: {policy: adabatch, every_epochs: 1}}\nlr: {base: 0.1}\n"
    )
    ended = start(
        [*MPIRUN, "-np", "2", *BENCH, "data", "slow.yaml", "--steps", "50", "--json", "found.json"]
    )
    assert ended.code == 0, ended.err
    found = figures(folder)
    assert set(found["samples_per_second"]) == {"0", "1", "2"}
    assert found["samples_per_second"]["0"] < 1000  # a sample takes a millisecond at least
    assert (found["waits"]["steps"], found["waits"]["borders"]) == (8 + 4 + 2, 2)
    assert found["waits"]["longest"] >= found["waits"]["longest_at_border"] >= 0


@pytest.mark.parametrize(
    ("workers", "arguments", "code", "message"),
    [
        (None, ["allreduce"], 2, "needs at least two workers"),
        (None, ["step", "jobs/digits.yaml", "--only", "bear loop"], 2, "the variants are"),
        (2, ["step", "jobs/digits.yaml", "--only", "bear loop"], 2, "the variants are"),
        (2, ["step", "jobs/digits.yaml", "lr.bas=1"], 2, "unknown key 'lr.bas'"),
        (2, ["data", "nowhere.yaml"], 2, "no such job file"),
        (None, ["lars", "--rounds", "0"], 2, "0 is less than 1"),
        (2, ["everything"], 2, "invalid choice"),
    ],
)
def test_a_benchmark_that_cannot_run_ends_with_one_message(
    start, workers, arguments, code, message
):
    launch = [] if workers is None else [*MPIRUN, "-np", str(workers)]
    ended = start([*launch, *BENCH, *arguments])
    assert ended.code == code, ended.err
    assert (ended.out + ended.err).count(message) == 1
    assert "Traceback" not in ended.err
