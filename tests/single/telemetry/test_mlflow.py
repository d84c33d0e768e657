"""Runs of MLflow in its store of files."""

import json

import pytest

from hvdlarge.config.job_file import read_job
from hvdlarge.telemetry.mlflow import MlflowSink
from hvdlarge.telemetry.sinks import SinkRun

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the sink would leave it behind
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


def started(folder, step=0, **arguments):
    sink = MlflowSink(**arguments)
    job = read_job("jobs/digits.yaml").resolved()
    sink.start(SinkRun("digits", folder, job, 2, 1437, 360, step, 32 * step))
    return sink


def record(step, loss):
    return {"step": step, "samples_seen": 32 * step, "loss": loss, "time": 1.8e9 + step}


def logged(folder):
    from mlflow.tracking import MlflowClient

    known = json.loads((folder / "mlflow_run.json").read_text())
    client = MlflowClient(tracking_uri=known["tracking_uri"])
    run = client.get_run(known["run_id"])
    losses = client.get_metric_history(known["run_id"], "train/loss")
    return run, client.get_experiment(run.info.experiment_id).name, losses


def test_parameters_metrics_and_the_status_are_logged(tmp_path):
    sink = started(tmp_path)
    for step in range(3):
        sink.metrics(record(step, 0.5))
    sink.metrics({"step": 2, "test_loss": 0.2, "a metric (%)": 90.0, "time": 1.8e9})
    sink.end("finished")
    run, experiment, losses = logged(tmp_path)
    assert (run.info.run_name, run.info.status, experiment) == ("digits", "FINISHED", "digits")
    assert run.data.params["lr.base"] == "4.0"
    assert run.data.params["lr.warmup.policy"] == "legw"
    assert run.data.params["evaluate.metrics"] == "['accuracy']"
    assert [(each.step, each.value, each.timestamp) for each in losses] == [
        (step, 0.5, 1_800_000_000_000 + 1000 * step) for step in range(3)
    ]
    assert run.data.metrics["eval/loss"] == 0.2
    assert run.data.metrics["eval/a metric ___"] == 90


def test_a_stopped_run_is_resumed_as_the_same_run(tmp_path):
    sink = started(tmp_path)
    sink.metrics(record(0, 0.5))
    sink.end("stopped")
    assert logged(tmp_path)[0].info.status == "KILLED"
    sink = started(tmp_path, step=1)
    assert logged(tmp_path)[0].info.status == "RUNNING"
    sink.metrics(record(1, 0.4))
    sink.end("failed")
    run, _, losses = logged(tmp_path)
    assert run.info.status == "FAILED"
    assert [each.step for each in losses] == [0, 1]


def test_more_figures_than_mlflow_takes_at_once(tmp_path):
    sink = started(tmp_path)
    layers = {f"layer{number}": {"weight_norm": float(number)} for number in range(1001)}
    sink.metrics({"step": 0, "time": 1.8e9, "layers": layers})
    metrics = logged(tmp_path)[0].data.metrics
    assert metrics == {f"layers/layer{number}/weight_norm": number for number in range(1001)}


def test_another_server_gets_another_run(tmp_path, monkeypatch):
    started(tmp_path).end("stopped")
    first = logged(tmp_path)[0].info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits of all kinds")
    started(tmp_path, step=1).end("finished")
    run, experiment, _ = logged(tmp_path)
    assert run.info.run_id != first
    assert experiment == "digits of all kinds"
    assert (tmp_path / "elsewhere").is_dir()
