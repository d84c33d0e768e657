"""The main job, end to end."""

import json

import pytest
import torch
from comparing import read_lines
from launching import MPIRUN, TRAIN

from hvdlarge.controller import Controller
from hvdlarge.job import read_job


def weights(folder, run):
    return torch.load(folder / "runs" / run / "checkpoints" / "last.pt", weights_only=True)["model"]


def test_two_workers_by_horovodrun(train, folder):
    ended = train(2, "jobs/digits.yaml", launcher=["horovodrun", "-np", "2"])
    assert ended.code == 0, ended.err
    summary = json.loads((folder / "runs/digits/summary.json").read_text())
    assert summary["accuracy"] >= 0.98
    assert (summary["steps"], summary["world_size"], summary["growths"]) == (524, 2, 4)
    decisions = read_lines(folder / "runs/digits/decisions.jsonl")
    assert [line["global_batch"] for line in decisions if "grew_from" in line] == [64, 128, 256, 512]
    assert "32 = 16 × 1 × 2" in ended.out
    assert ended.out.count("the global batch grows") == 4
    assert ended.out.count("done: accuracy") == 1


def test_decisions_of_a_run_are_those_on_paper(train, folder):
    assert train(2, "jobs/digits.yaml", "epochs=7").code == 0
    job = read_job(str(folder / "jobs/digits.yaml"), ["epochs=7"])
    paper = list(iter(Controller(job.plan(1437, 2)).decide, None))
    lines = read_lines(folder / "runs/digits/decisions.jsonl")
    assert [(line["step"], line["global_batch"], line["lr"], line["samples_seen"]) for line in lines] == [
        (decision.step, decision.global_batch, decision.lr, decision.samples_seen) for decision in paper
    ]


def test_float64_weights_are_those_of_the_job_and_not_of_the_workers(train, folder):
    for workers in (None, 2, 3):
        ended = train(workers, "jobs/digits.yaml", "precision=fp64", f"run_dir=runs/w{workers}")
        assert ended.code == 0, ended.err
    alone = weights(folder, "wNone")
    assert all(torch.isfinite(value).all() for value in alone.values())
    for workers in (2, 3):
        for name, value in weights(folder, f"w{workers}").items():
            if value.is_floating_point():
                assert (value - alone[name]).norm() <= 1e-10 * alone[name].norm(), name
    results = [json.loads((folder / f"runs/w{workers}/summary.json").read_text()) for workers in (None, 2, 3)]
    assert len({result["accuracy"] for result in results}) == 1
    assert results[0]["accuracy"] >= 0.98


def test_sixteen_workers_on_few_cores(train, folder):
    ended = train(16, "jobs/digits.yaml", "epochs=3", "batch.initial=256", timeout=240)
    assert ended.code == 0, ended.err
    assert json.loads((folder / "runs/digits/summary.json").read_text())["world_size"] == 16
    assert "256 = 16 × 1 × 16" in ended.out


def test_the_row_lstm_with_legw(train, folder):
    ended = train(2, "jobs/digits_lstm.yaml")
    assert ended.code == 0, ended.err
    assert json.loads((folder / "runs/digits_lstm/summary.json").read_text())["accuracy"] >= 0.97


def test_the_run_folder_says_what_ran(train, folder):
    for number in (1, 2):
        assert train(2, "jobs/digits.yaml", "epochs=1", f"seed={number}", "--fresh").code == 0
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
    assert {"global_batch", "lr", "loss", "trust_ratio_min", "allreduce_seconds"} <= metrics[0].keys()
    assert 0 < metrics[0]["trust_ratio_min"] <= metrics[0]["trust_ratio_max"]
    assert [line["accuracy"] for line in metrics if "accuracy" in line]


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_help_is_printed_once(start, launcher):
    launch = [*MPIRUN, "-np", "3"] if launcher == "mpirun" else ["horovodrun", "-np", "2"]
    ended = start([*launch, *TRAIN, "--help"])
    assert ended.code == 0
    assert ended.out.count("usage:") == 1
