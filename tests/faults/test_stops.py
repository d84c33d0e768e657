"""Stops on request, and the launcher that goes on."""

import json
import os
import signal
import sys
import time

import pytest
from support.comparing import distance, same
from support.launching import MPIRUN

short = pytest.mark.short
LAUNCH = [sys.executable, "-m", "hvdlarge.launch", "--mpirun", " ".join(MPIRUN)]


@pytest.fixture
def whole(undisturbed):
    """The last checkpoint of the undisturbed run."""
    return undisturbed(2)


@pytest.mark.parametrize("kind", ["usr1", "usr2", "term", "twice"])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(bench, whole, kind):
    ended = bench.run(2, FAULT=f"{kind}@1:33")
    assert ended.fired
    assert ended.code == 75, ended.text
    assert not ended.errors
    assert ended.text.count("stopped after step 32") == 1
    assert bench.checkpoint()["progress"]["step"] == 33
    assert bench.run(2).code == 0
    assert same(bench.checkpoint(), whole)


@short
def test_a_model_without_statistics_stops_and_goes_on(bench):
    """A stop also keeps each rank's part of the running statistics; here there are none to keep."""
    model = "model={name: mlp}"
    process = bench.begin(2, model, "epochs=30")
    bench.until(bench.has_checkpoint)
    os.kill(max(bench.ranks()), signal.SIGUSR1)
    ended = bench.end(process)
    assert ended.code == 75, ended.text
    assert bench.run(2, model, "epochs=30").code == 0
    assert bench.run(2, model, "epochs=30", "run_dir=runs/whole").code == 0
    assert same(bench.checkpoint(), bench.checkpoint("runs/whole"))


@short
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_mpirun_stops_all_with_a_checkpoint(bench, number):
    process = bench.begin(2, "epochs=100")
    bench.until(bench.has_checkpoint)
    sent = time.monotonic()
    process.send_signal(number)
    ended = bench.end(process)
    assert ended.code == 75, ended.text
    assert time.monotonic() - sent < 60
    assert bench.run(2, "epochs=100", "stop_after_minutes=0.02").code == 75


def test_a_signal_during_evaluation_stops_the_run(bench):
    ended = bench.run(2, "evaluate.every_epochs=0.5", FAULT="eval-usr1@1:23")
    assert ended.fired
    assert ended.code == 75, ended.text


def test_a_signal_while_the_run_starts_stops_it_after_one_step(bench):
    process = bench.begin(2, FAULT="build-usr1@0:0")
    ended = bench.end(process)
    assert ended.fired
    assert ended.code == 75, ended.text
    assert bench.checkpoint()["progress"]["step"] == 1


def test_sigterm_to_mpirun_leaves_a_checkpoint_that_goes_on(bench, whole):
    process = bench.begin(2)
    bench.until(bench.has_checkpoint)
    process.send_signal(signal.SIGTERM)
    ended = bench.end(process)
    assert ended.code in (1, 75), (
        ended.text
    )  # Open MPI's own code: it kills the ranks a second later
    assert bench.run(2).code == 0
    assert same(bench.checkpoint(), whole)


@short
def test_the_file_stop_stops_the_run(bench):
    process = bench.begin(2, "epochs=100")
    bench.until(bench.has_checkpoint)
    (bench.run_folder() / "STOP").touch()
    ended = bench.end(process)
    assert ended.code == 75, ended.text
    assert "as asked by the file runs/faults/STOP" in ended.text
    assert not (bench.run_folder() / "STOP").exists()


def test_a_signal_with_loader_processes_stops_the_run(bench):
    process = bench.begin(2, "data={name: 'faulty:data', num_workers: 2}", "epochs=50")
    bench.until(bench.has_checkpoint)
    process.send_signal(signal.SIGUSR1)
    ended = bench.end(process)
    assert ended.code == 75, ended.text


def test_a_stop_request_while_a_rank_hangs_ends_the_run(bench):
    limits = ["timeouts.step_seconds=6", "timeouts.fetch_seconds=2"]
    process = bench.begin(2, "epochs=100", *limits)
    bench.until(bench.has_checkpoint)
    os.kill(max(bench.ranks()), signal.SIGSTOP)
    process.send_signal(signal.SIGUSR1)
    ended = bench.end(process)
    assert ended.code == 72, ended.text


def test_a_time_limit_stops_the_run(bench):
    ended = bench.run(2, "epochs=1000", "stop_after_minutes=0.1")
    assert ended.code == 75, ended.text
    assert "the time limit of 0.1 minutes" in ended.text


def test_ctrl_c_without_a_launcher_stops_the_run(bench):
    process = bench.begin(None, "epochs=100")
    bench.until(bench.has_checkpoint)
    process.send_signal(signal.SIGINT)
    ended = bench.end(process)
    assert ended.code == 75, ended.text


# --- the launcher


def begin_launch(bench, options, **environ):
    """Start hvdlarge.launch."""
    return bench.begin_command([*LAUNCH, *options], **environ)


@short
def test_a_lost_rank_is_started_again_until_the_end(bench, whole):
    process = begin_launch(bench, ["-np", "2", "job.yaml"], FAULT="kill@1:25 segv@0:50")
    ended = bench.end(process, timeout=600)
    assert len(ended.fired) == 2
    assert ended.code == 0, ended.text
    assert ended.text.count("restart") == 2
    assert same(bench.checkpoint(), whole)


def test_a_fresh_launch_sets_an_earlier_run_aside_once_and_restarts_resume(bench, whole):
    assert bench.run(2, "seed=9", "epochs=0.5").code == 0
    process = begin_launch(bench, ["-np", "2", "job.yaml", "--fresh"], FAULT="kill@1:35")
    ended = bench.end(process, timeout=600)
    assert ended.fired
    assert ended.code == 0, ended.text
    assert ended.text.count("the earlier run was moved to runs/faults.1") == 1
    assert ended.text.count("resuming from runs/faults/checkpoints/") == 1
    assert not (bench.folder / "runs/faults.2").exists()
    assert same(bench.checkpoint(), whole)


def test_a_hanging_rank_is_started_again_until_the_end(bench, whole):
    limits = ["timeouts.step_seconds=6", "timeouts.fetch_seconds=2"]
    process = begin_launch(bench, ["-np", "2", "job.yaml", *limits], FAULT="stop@1:25")
    ended = bench.end(process, timeout=600)
    assert ended.fired
    assert ended.code == 0, ended.text
    assert same(bench.checkpoint(), whole)


def test_a_run_that_comes_no_further_is_given_up(bench):
    faults = " ".join(f"kill@1:{at}" for at in range(3, 9))
    process = begin_launch(bench, ["-np", "2", "job.yaml"], FAULT=faults)
    ended = bench.end(process, timeout=600)
    assert ended.code == 137, ended.text
    assert "the last 3 starts made no progress" in ended.text


def test_a_wrong_job_is_not_tried_again(bench):
    process = begin_launch(bench, ["-np", "2", "job.yaml", "model.name=nothing:here"])
    ended = bench.end(process)
    assert ended.code == 2, ended.text
    assert "restart" not in ended.text


@short
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_stops_the_run_in_order(bench, number):
    process = begin_launch(bench, ["-np", "2", "job.yaml", "epochs=100"])
    bench.until(bench.has_checkpoint)
    process.send_signal(number)
    ended = bench.end(process)
    assert ended.code == 75, ended.text
    assert "stopped after step" in ended.text


def test_a_run_that_outlasts_the_grace_time_is_killed(bench):
    process = begin_launch(
        bench,
        ["-np", "2", "--grace-seconds", "1", "job.yaml", "epochs=100", "timeouts.step_seconds=100"],
        FAULT="sleep@1:25",
    )
    bench.until(lambda: list(bench.folder.glob("fired-sleep*")))
    process.send_signal(signal.SIGTERM)
    ended = bench.end(process)
    assert ended.code not in (0, 75), ended.text
    assert "the grace time is over" in ended.text


def test_a_second_interrupt_ends_the_grace_time_and_leaves_mpirun_time_to_end_its_ranks(bench):
    process = begin_launch(
        bench,
        ["-np", "2", "job.yaml", "epochs=100", "timeouts.step_seconds=100"],
        FAULT="sleep@1:25",
    )
    bench.until(lambda: list(bench.folder.glob("fired-sleep*")))
    process.send_signal(signal.SIGINT)
    bench.until(lambda: "SIGINT: stopping the run" in (bench.folder / "log0").read_text())
    process.send_signal(signal.SIGINT)
    ended = bench.end(process, timeout=600)
    assert ended.code not in (0, 75, 137), ended.text  # 137: mpirun itself was killed
    assert "the grace time is over" in ended.text


def test_a_launch_on_hosts_that_shrink_goes_on_with_fewer_workers(bench):
    hosts = bench.folder / "hosts"
    hosts.write_text("localhost slots=3\n")
    arguments = ["job.yaml", "precision=fp64"]
    process = begin_launch(
        bench, ["-np", "4", "--hosts-file", "hosts", *arguments], FAULT="kill@2:12"
    )
    bench.until(lambda: list(bench.folder.glob("fired-kill*")))
    hosts.write_text("localhost:2\n")
    ended = bench.end(process, timeout=600)
    assert ended.code == 0, ended.text
    assert "launch: 3 workers on localhost:3" in ended.text
    assert "launch: 2 workers on localhost:2" in ended.text
    starts = [
        json.loads(line)["world_size"]
        for line in (bench.run_folder() / "starts.jsonl").read_text().splitlines()
    ]
    assert starts == [3, 2]
    assert bench.run(2, "precision=fp64", "run_dir=runs/whole", FAULT="").code == 0
    assert distance(bench.checkpoint(), bench.checkpoint("runs/whole")) < 1e-12


def test_a_run_whose_launcher_is_killed_stops_in_order(bench):
    process = begin_launch(bench, ["-np", "2", "job.yaml", "epochs=100"])
    bench.until(bench.has_checkpoint)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    bench.until(lambda: "stopped after step" in (bench.folder / "log0").read_text())
