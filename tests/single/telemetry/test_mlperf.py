"""MLPerf's lines: their form, their order over a whole life of a run, and what the public checker says of them."""

import json
import re
import subprocess
import sys
import time

import pytest

from hvdlarge.config.job_file import read_job
from hvdlarge.telemetry.mlperf import MlperfLog
from hvdlarge.telemetry.sinks import SinkRun

STEPS_OF_AN_EPOCH = 4
LINE = re.compile(r":::MLLOG (\{.*\})")


class Life:
    """The starts of a run: each step has a decision, each epoch an evaluation."""

    def __init__(self, folder, **arguments):
        self.folder = folder
        self.arguments = {"benchmark": "resnet", "org": "o", "platform": "p"} | arguments
        self.time = time.time()

    def start(self, step=0):
        self.sink = MlperfLog(**self.arguments)
        job = read_job("jobs/digits.yaml").resolved()
        self.sink.start(SinkRun("digits", self.folder, job, 2, 1437, 360, step, 0))

    def take(self, steps, accuracy=0.9):
        for step in steps:
            self.time += 0.5
            record = {"step": step, "time": self.time}
            self.sink.decision(record | {"epoch": step / STEPS_OF_AN_EPOCH})
            if (step + 1) % STEPS_OF_AN_EPOCH == 0:
                self.time += 0.25
                found = {"test_loss": 0.1, "accuracy": accuracy, "evaluate_seconds": 0.125}
                self.sink.metrics(record | {"time": self.time} | found)

    def events(self):
        lines = (self.folder / "mlperf.log").read_text().splitlines()
        return [json.loads(LINE.fullmatch(line)[1]) for line in lines]

    def keys(self, but=("submission_", "opt_")):
        return [each["key"] for each in self.events() if not each["key"].startswith(but)]


EPOCH = ["epoch_start", "eval_start", "eval_accuracy", "eval_stop", "epoch_stop"]


def test_a_whole_run(tmp_path):
    life = Life(tmp_path, cache_cleared=True)
    life.start()
    life.take(range(8))
    life.sink.end("finished")
    events = life.events()
    assert life.keys()[:2] == ["cache_clear", "init_start"]
    assert life.keys()[-13:] == ["init_stop", "run_start", *EPOCH, *EPOCH, "run_stop"]
    values = {each["key"]: each["value"] for each in events}
    assert values["submission_benchmark"] == "resnet"
    assert (values["global_batch_size"], values["gradient_accumulation_steps"]) == (32, 1)
    assert (values["opt_name"], values["opt_base_learning_rate"], values["seed"]) == ("lars", 4, 0)
    assert (values["train_samples"], values["eval_samples"]) == (1437, 360)
    assert values["eval_accuracy"] == 0.9
    evaluations = [each["time_ms"] for each in events if each["key"] in ("eval_start", "eval_stop")]
    durations = [stop - start for start, stop in zip(*[iter(evaluations)] * 2, strict=True)]
    assert durations == pytest.approx([125, 125], abs=1)  # each time is rounded
    assert events[-1]["metadata"]["status"] == "success"
    epochs = [each["metadata"].get("epoch_num") for each in events if each["key"] in EPOCH]
    assert epochs == [1] * 5 + [2] * 5
    times = [each["time_ms"] for each in events if each["key"] not in ("run_stop", "epoch_stop")]
    assert times == sorted(times)
    assert all(type(each["time_ms"]) is int for each in events)
    kinds = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}
    for each in events:
        assert each["event_type"] == kinds.get(each["key"].rpartition("_")[2], "POINT_IN_TIME")
    began = next(each["time_ms"] for each in events if each["key"] == "init_start")
    assert 0 < time.time() - began / 1000 < 3600  # of this process


def test_an_interrupted_run_and_one_that_is_rolled_back_read_as_one(tmp_path):
    whole, parts = Life(tmp_path / "whole"), Life(tmp_path / "parts")
    for life in (whole, parts):
        life.folder.mkdir()
        life.start()
    whole.take(range(12))
    parts.take(range(7))  # killed
    with (parts.folder / "mlperf.log").open("a") as file:
        file.write(':::MLLOG {"namespace": "hvd')
    parts.start(5)
    parts.take(range(5, 6))
    parts.sink.end("stopped")
    parts.start(6)
    parts.take(range(6, 11))
    parts.sink.roll_back(8, {})
    parts.take(range(8, 10))
    parts.sink.end("failed")
    assert parts.events()[-1]["metadata"] == {"status": "aborted"}
    parts.start(9)
    parts.take(range(9, 12))
    for life in (whole, parts):
        life.sink.end("finished")
    without_time = [
        [{name: value for name, value in each.items() if name != "time_ms"} for each in life.events()]
        for life in (whole, parts)
    ]  # fmt: skip
    assert without_time[0] == without_time[1]


def test_a_run_killed_before_its_first_checkpoint_begins_a_new_file(tmp_path):
    life = Life(tmp_path)
    for _ in range(2):
        life.start()
        life.take(range(2))
    assert life.keys().count("run_start") == life.keys().count("epoch_start") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "outcome"),
    [
        ({}, "finished", "success"),
        ({}, "failed", "aborted"),
        ({"target": 0.9}, "finished", "success"),
        ({"target": 0.91}, "finished", "aborted"),
        ({"metric": "test_loss", "target": 0.2, "higher_is_better": False}, "finished", "success"),
        ({"metric": "test_loss", "target": 0.05, "higher_is_better": False}, "finished", "aborted"),
    ],
)
def test_a_run_succeeds_at_its_target(tmp_path, arguments, status, outcome):
    life = Life(tmp_path, **arguments)
    life.start()
    life.take(range(4))
    life.sink.end(status)
    assert life.events()[-1]["metadata"] == {"status": outcome}


@pytest.mark.parametrize("ruleset", ["3.1.0", "4.0.0"])  # the last ones with a rule for ResNet
def test_the_public_checker_accepts_a_run_of_the_open_division(tmp_path, ruleset):
    pytest.importorskip("mlperf_logging", reason="mlperf-logging is not installed")
    life = Life(tmp_path, cache_cleared=True)
    life.start()
    life.take(range(6))
    life.sink.end("stopped")
    life.start(6)
    life.take(range(6, 8))
    life.sink.end("finished")

    def check():
        command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "mlperf.log"]
        options = ["--usage", "training", "--ruleset", ruleset]
        return subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)

    ended = check()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "SUCCESS" in ended.stdout + ended.stderr
    lines = (tmp_path / "mlperf.log").read_text().splitlines(keepends=True)
    (tmp_path / "mlperf.log").write_text("".join(line for line in lines if "run_start" not in line))
    assert check().returncode != 0  # it looks at them
