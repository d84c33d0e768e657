"""The main job, end to end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.comparing import read_lines
from support.launching import MPIRUN, ROOT, TRAIN, environment

from hvdlarge.config.job_file import parse_job, read_job


def weights(folder, run):
    return torch.load(folder / "runs" / run / "checkpoints" / "last.pt", weights_only=True)["model"]


def assert_is_as_planned(start, folder, job, ended):
    """What the plan of a job says for two workers is what a run on two workers did, byte for byte."""
    plan = [sys.executable, "-m", "hvdlarge.plan", f"jobs/{job}", "--world-size", "2"]
    planned = start([*plan, "--decisions", "planned.jsonl"])
    assert planned.code == 0, planned.err
    run = folder / "runs" / Path(job).stem
    assert (folder / "planned.jsonl").read_text() == (run / "decisions.jsonl").read_text()
    summary = json.loads((run / "summary.json").read_text())
    estimate = json.loads(start([*plan, "--json", "--measured", str(run)]).out)
    assert (estimate["steps"], estimate["samples"], estimate["growths"]) == (
        summary["steps"],
        summary["samples_seen"],
        summary["growths"],
    )
    assert estimate["peak_memory_bytes"] == summary["peak_memory_bytes"] > 50e6
    assert f"schedule {estimate['fingerprint']}" in ended.out
    assert summary["accuracy"] >= 0.97


def test_two_workers_by_horovodrun_train_the_main_job_as_planned(train, start, folder):
    ended = train(2, "jobs/digits.yaml", launcher=["horovodrun", "-np", "2"])
    assert ended.code == 0, ended.err
    summary = json.loads((folder / "runs/digits/summary.json").read_text())
    assert summary["accuracy"] >= 0.98
    assert (summary["steps"], summary["world_size"], summary["growths"]) == (524, 2, 4)
    decisions = read_lines(folder / "runs/digits/decisions.jsonl")
    assert [line["global_batch"] for line in decisions if "grew_from" in line] == [
        64,
        128,
        256,
        512,
    ]
    assert "32 = 16 × 1 × 2" in ended.out
    assert ended.out.count("the global batch grows") == 4
    assert ended.out.count("done: accuracy") == 1
    assert_is_as_planned(start, folder, "digits.yaml", ended)


OTHER_JOBS = sorted({path.name for path in (ROOT / "jobs").glob("*.yaml")} - {"digits.yaml"})


@pytest.mark.parametrize("job", OTHER_JOBS)
def test_two_workers_train_every_other_shipped_job_as_planned(train, start, folder, job):
    ended = train(2, f"jobs/{job}")
    assert ended.code == 0, ended.err
    assert_is_as_planned(start, folder, job, ended)


def test_a_dry_run_prints_the_job_and_starts_nothing(train, folder):
    for workers in (None, 3):
        ended = train(workers, "jobs/digits.yaml", "--dry-run", "seed=7")
        assert ended.code == 0, ended.err
        assert parse_job(ended.out, "printed") == read_job(
            str(folder / "jobs/digits.yaml"), ["seed=7"]
        )
    assert not (folder / "runs").exists()
    ended = train(3, "jobs/digits.yaml", "--dry-run", "reduction=exact")
    assert (ended.code, len(ended.errors)) == (2, 1)


def test_train_and_plan_refuse_in_the_same_words(train, start, folder):
    ran = train(3, "jobs/digits.yaml", "reduction=exact")
    planned = start(
        [
            sys.executable,
            "-m",
            "hvdlarge.plan",
            "jobs/digits.yaml",
            "reduction=exact",
            "--world-size",
            "3",
        ]
    )
    assert ran.code == planned.code == 2
    assert (
        ran.errors
        == planned.errors
        == ["hvdlarge: error: reduction: exact needs 1, 2, 4, 8, … workers, not 3"]
    )
    assert not (folder / "runs").exists()


def test_data_of_another_size_than_the_job_says_are_refused(train):
    ended = train(2, "jobs/digits.yaml", "data.samples=1000")
    assert ended.code == 2
    assert "data.samples is 1,000, but the training set of digits has 1,437 samples" in ended.err


def test_float64_weights_are_those_of_the_job_and_not_of_the_workers(train, folder):
    shorter = ["precision=fp64", "epochs=10", "batch.growth.every_epochs=2"]
    for workers in (None, 2, 3):
        ended = train(workers, "jobs/digits.yaml", *shorter, f"run_dir=runs/w{workers}")
        assert ended.code == 0, ended.err
    alone = weights(folder, "wNone")
    assert all(torch.isfinite(value).all() for value in alone.values())
    for workers in (2, 3):
        for name, value in weights(folder, f"w{workers}").items():
            if value.is_floating_point():
                assert (value - alone[name]).norm() <= 1e-10 * alone[name].norm(), name
    results = [
        json.loads((folder / f"runs/w{workers}/summary.json").read_text())
        for workers in (None, 2, 3)
    ]
    assert len({result["accuracy"] for result in results}) == 1
    assert results[0]["growths"] == 4
    assert results[0]["accuracy"] >= 0.98


def test_sixteen_workers_on_few_cores_train_a_job(train, folder):
    ended = train(16, "jobs/digits.yaml", "epochs=1", "batch.initial=256", "lr.warmup.epochs=0.1")
    assert ended.code == 0, ended.err
    assert json.loads((folder / "runs/digits/summary.json").read_text())["world_size"] == 16
    assert "256 = 16 × 1 × 16" in ended.out


def test_the_run_folder_says_what_ran(train, folder):
    for number, workers in ((1, None), (2, 2)):
        ended = train(workers, "jobs/digits.yaml", "epochs=1", f"seed={number}", "--fresh")
        assert ended.code == 0, ended.err
    run, before = folder / "runs/digits", folder / "runs/digits.1"
    assert (run / "job.yaml").read_bytes() == (folder / "jobs/digits.yaml").read_bytes()
    assert read_job(str(run / "job.resolved.yaml")).seed == 2
    assert read_job(str(before / "job.resolved.yaml")).seed == 1
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == len(environment["workers"]) == 2
    assert environment["versions"]["torch"] == torch.__version__
    metrics = read_lines(run / "metrics.jsonl")
    for line in metrics:
        assert {"step", "epoch", "samples_seen"} <= line.keys()
    first = next(line for line in metrics if "loss" in line)
    assert {"global_batch", "lr", "trust_ratio_min", "allreduce_seconds"} <= first.keys()
    assert 0 < first["trust_ratio_min"] <= first["trust_ratio_max"]
    assert [line["accuracy"] for line in metrics if "accuracy" in line]


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_gets_the_summary_at_the_next_start(
    train, folder
):
    """A pipe that nobody reads stands where the summary is written aside: the run waits there for its end."""
    arguments = ["jobs/digits.yaml", "epochs=1", "log.every_steps=1"]
    assert train(None, *arguments, "run_dir=whole").code == 0
    whole = json.loads((folder / "whole/summary.json").read_text())
    (folder / "run").mkdir()
    pipe = folder / "run/.summary.json.part"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*TRAIN, *arguments, "run_dir=run"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    listing, last = folder / "run/checkpoints/SHA256SUMS", f"step_{whole['steps']:09d}.pt"
    deadline = time.monotonic() + 60
    while not (listing.exists() and last in listing.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    pipe.unlink()
    ended = train(2, *arguments, "run_dir=run")
    assert ended.code == 0, ended.err
    assert (
        "already finished: run holds the complete run (the missing summary.json was written)"
        in ended.out
    )
    summary = json.loads((folder / "run/summary.json").read_text())
    measured = {"train_seconds", "samples_per_second", "peak_memory_bytes"}
    assert {key: value for key, value in summary.items() if key not in measured} == {
        key: value for key, value in whole.items() if key not in measured
    }
    assert summary["samples_per_second"] == summary["samples_seen"] / summary["train_seconds"]
    assert summary["peak_memory_bytes"] is None
    written = (folder / "run/summary.json").read_bytes()
    assert "which was missing" not in train(None, *arguments, "run_dir=run").out
    assert (folder / "run/summary.json").read_bytes() == written


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_help_is_printed_once(start, launcher):
    launch = [*MPIRUN, "-np", "3"] if launcher == "mpirun" else ["horovodrun", "-np", "2"]
    ended = start([*launch, *TRAIN, "--help"])
    assert ended.code == 0
    assert ended.out.count("usage:") == 1
