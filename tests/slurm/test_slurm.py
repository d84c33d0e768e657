"""The batch files of docker/slurm under a real Slurm: a run on two nodes, the time limit, a lost node, scancel, an array, and a wrong PMI."""

import json
import sys

import pytest
import torch
from support.launching import ROOT


def weights(folder):
    return torch.load(folder / "run/checkpoints/last.pt", weights_only=True)["model"]


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("file", ["train.sbatch", "launch.sbatch", "array.sbatch", "study.sbatch"])
def test_slurm_takes_the_batch_files_as_they_are(bench, file):
    """With their own options: two nodes of four tasks and four GPUs each."""
    tried = bench.cluster.run("sbatch", "--test-only", ROOT / "docker/slurm" / file, "job.yaml")
    assert tried.returncode == 0, tried.stderr
    assert "to start at" in tried.stderr


def test_a_run_on_two_nodes(bench):
    job = bench.cluster.wait_for_job(bench.submit())
    assert (job["JobState"], job["ExitCode"], job["NumNodes"]) == ("COMPLETED", "0:0", "2"), (
        bench.logs()
    )
    environment = json.loads((bench.folder / "run/environment.json").read_text())
    assert environment["world_size"] == 2
    assert "2 workers by srun" in bench.logs()


def undisturbed(bench):
    """The weights of the job in the folder without anything that disturbs it."""
    job = bench.cluster.wait_for_job(bench.submit())
    assert job["JobState"] == "COMPLETED", bench.logs()
    found = weights(bench.folder)
    (bench.folder / "run").rename(bench.folder / "whole")
    return found


def wait_for_requeue(bench, number):
    """Wait until a job was put back into the queue."""
    bench.cluster.wait_until(
        lambda: bench.cluster.job(number)["Restarts"] == "1", 240, "the job is in the queue again"
    )


def has_checkpoint(bench):
    return any((bench.folder / "run/checkpoints").glob("step_*.pt"))


@pytest.mark.long
def test_a_run_stopped_by_the_time_limit_goes_on_until_its_end(bench):
    """Slurm may send the signal a minute earlier than it says: here 15 to 75 s after the start."""
    bench.write(epochs=12)
    expected = undisturbed(bench)
    number = bench.submit("--time=2", "--signal=USR1@45", WAIT="0.3")
    wait_for_requeue(bench, number)
    bench.cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    job = bench.cluster.wait_for_job(number, 600)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), bench.logs()
    assert job["Restarts"] == "1"
    assert f"job {number} goes back into the queue" in bench.logs()
    assert same(weights(bench.folder), expected)


@pytest.mark.long
def test_a_run_goes_on_after_its_node_was_lost(bench):
    expected = undisturbed(bench)
    number = bench.submit("--nodes=1", "--ntasks-per-node=2", WAIT="0.1")
    bench.cluster.wait_until(lambda: has_checkpoint(bench), 120, "there is a checkpoint")
    node = bench.cluster.job(number)["NodeList"]
    bench.cluster.lose_node(node)
    wait_for_requeue(bench, number)
    job = bench.cluster.wait_for_job(number)
    bench.cluster.start_node(node)
    assert job["JobState"] == "COMPLETED", bench.logs()
    assert job["NodeList"] != node
    assert same(weights(bench.folder), expected)


@pytest.mark.long
def test_scancel_stops_in_order_and_for_good(bench):
    number = bench.submit(WAIT="0.3")
    bench.cluster.wait_until(lambda: has_checkpoint(bench), 120, "there is a checkpoint")
    bench.cluster.run("scancel", number)
    assert bench.cluster.wait_for_job(number)["JobState"] == "CANCELLED"
    assert "stopped after step" in bench.logs()
    assert "goes back" not in bench.logs()


@pytest.mark.long
def test_scancel_with_a_signal_puts_the_job_back_into_the_queue(bench):
    expected = undisturbed(bench)
    number = bench.submit(WAIT="0.3")
    bench.cluster.wait_until(lambda: has_checkpoint(bench), 120, "there is a checkpoint")
    bench.cluster.run("scancel", "--signal=USR1", number)
    wait_for_requeue(bench, number)
    assert bench.cluster.wait_for_job(number)["JobState"] == "COMPLETED", bench.logs()
    assert same(weights(bench.folder), expected)


@pytest.mark.long
def test_the_elements_of_an_array_are_runs_of_their_own(bench):
    (bench.folder / "settings.txt").write_text("seed=1\nseed=2 epochs=1\n")
    arguments = ("job.yaml", "settings.txt")
    number = bench.submit("--array=1-2", file="array.sbatch", arguments=arguments)
    for element in (1, 2):
        job = bench.cluster.wait_for_job(f"{number}_{element}")
        assert job["JobState"] == "COMPLETED", bench.logs()
        found = json.loads((bench.folder / f"runs/{number}/{element}/summary.json").read_text())
        assert found["epochs"] == {1: 3, 2: 1}[element]


STUDY = """\
name: shared
job: job.yaml
set: {epochs: 1}
factors:
  batch.growth: [{policy: none}, {policy: adabatch, every_epochs: 0.5, max: 64}]
tune: {search: {lr.base: {low: 0.5, high: 8, log: true}}, trials: 2, round: 2}
seeds: 2
"""


@pytest.mark.long
def test_the_elements_of_an_array_share_a_study(bench):
    (bench.folder / "study.yaml").write_text(STUDY)
    number = bench.submit("--array=1-3", file="study.sbatch", arguments=("study.yaml",))
    for element in (1, 2, 3):
        job = bench.cluster.wait_for_job(f"{number}_{element}")
        assert job["JobState"] == "COMPLETED", bench.logs()
    records = list((bench.folder / "runs/shared").glob("runs/*/*.json"))
    assert len(records) == 8
    assert all(json.loads(path.read_text())["state"] == "finished" for path in records)
    for path in (bench.folder / "runs/shared").glob("runs/*/*/starts.jsonl"):
        assert len(path.read_text().splitlines()) == 1  # none was trained twice


@pytest.mark.long
def test_an_element_that_is_stopped_goes_back_into_the_queue_and_goes_on(bench):
    (bench.folder / "study.yaml").write_text(STUDY)
    number = bench.submit("--array=1-1", file="study.sbatch", arguments=("study.yaml",))
    folder = bench.folder / "runs/shared"
    bench.cluster.wait_until(
        lambda: any(folder.glob("runs/*/*.json")), 120, "the first run has ended"
    )
    assert bench.cluster.run("scancel", "--signal=USR1", f"{number}_1").returncode == 0
    wait_for_requeue(bench, f"{number}_1")
    job = bench.cluster.wait_for_job(f"{number}_1", 400)
    assert job["JobState"] == "COMPLETED", bench.logs()
    assert "stopped; the same command goes on" in bench.logs()
    assert len(list(folder.glob("runs/*/*.json"))) == 8


@pytest.mark.long
def test_a_step_without_pmi_is_refused(bench):
    """Each of its workers would be alone."""
    done = bench.cluster.run(
        *("srun", "-N2", "-n2", "--mpi=none", f"--chdir={bench.folder}"),
        *(sys.executable, "-m", "hvdlarge.train", "job.yaml"),
        **bench.environ,
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("hvdlarge: error:") == 1
    assert not (bench.folder / "run").exists()


@pytest.mark.long
def test_the_launcher_starts_workers_on_the_hosts_of_the_allocation(bench):
    job = bench.cluster.wait_for_job(bench.submit(file="launch.sbatch"))
    assert job["JobState"] == "COMPLETED", bench.logs()
    assert json.loads((bench.folder / "run/environment.json").read_text())["world_size"] == 2
