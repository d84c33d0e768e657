"""Sinks in whole runs on two workers: they change nothing, cannot stop a run, and go on with it."""

import json
import re

import pytest
import torch
from support.comparing import read_lines
from support.launching import ROOT

BAD_SINKS = """
import threading

class Raises:
    def metrics(self, record):
        if record["step"] > 40:
            raise ValueError("no room for more")

class NotBuilt:
    def __init__(self):
        raise ConnectionError("no server answers")

class NeverFinishes:
    def metrics(self, record):
        pass

    def close(self):
        threading.Event().wait()
"""
SHORT = ["jobs/digits.yaml", "epochs=2", "batch.growth.every_epochs=1"]


def weights(run):
    return torch.load(run / "checkpoints/last.pt", weights_only=True)["model"]


def test_sinks_neither_stop_a_run_nor_change_its_weights(train, folder):
    text = (ROOT / "docs/telemetry.md").read_text()
    for name, code in re.findall(r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", text, flags=re.DOTALL):
        (folder / name).write_text(code)
    (folder / "bad.py").write_text(BAD_SINKS)
    bad = ["Raises", "NotBuilt", "NeverFinishes"]
    names = ", ".join(f"'bad:{name}'" for name in bad)
    own = "{name: 'my_sinks:Best', args: {result: accuracy}}"
    ended = train(2, *SHORT, "run_dir=with", f"log.sinks=[jsonl, {names}, {own}]")
    assert ended.code == 0, ended.text
    plain = train(2, *SHORT, "run_dir=without")
    assert plain.code == 0, plain.text
    for name, value in weights(folder / "without").items():
        assert torch.equal(value, weights(folder / "with")[name]), name
    for name, reason in zip(bad, ["no room for more", "no server", "not finished"], strict=True):
        (note,) = [line for line in ended.out.splitlines() if f"bad:{name} was dropped" in line]
        assert note.startswith("note     log.sinks: bad:")
        assert reason in note
    assert ended.err == plain.err == ""
    results = [line for line in read_lines(folder / "with/metrics.jsonl") if "accuracy" in line]
    best = max(results, key=lambda line: line["accuracy"])
    kept = json.loads((folder / "with/best_accuracy.json").read_text())
    assert kept == {"step": best["step"], "accuracy": best["accuracy"], "status": "finished"}


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        ("tensorbord", "log.sinks: unknown name 'tensorbord'; did you mean 'tensorboard'?"),
        ("{name: 'bad:Raises', args: {to: 1}}", "log.sinks: the arguments (to) do not fit bad:Raises"),
    ],
)  # fmt: skip
def test_a_wrong_sink_is_refused_on_every_rank(train, folder, sink, message):
    (folder / "bad.py").write_text(BAD_SINKS)
    ended = train(2, *SHORT, "run_dir=run", f"log.sinks=[{sink}]")
    assert ended.code == 2, ended.text
    assert len(ended.errors) == 1
    assert message in ended.errors[0]
    assert not (folder / "run").exists()


INTERRUPTS = """
import os, signal

class Interrupts:
    def after_step(self, step):
        if step.rank == 0 and step.step == int(os.environ["AT"]):
            os.kill(os.getpid(), getattr(signal, os.environ["HOW"]))
"""


def test_tensorboard_shows_each_step_once_after_a_stop_and_a_kill(train, folder):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder / "interrupts.py").write_text(INTERRUPTS)
    arguments = [*SHORT, "run_dir=run", "checkpoint.every_steps=20", "log.every_steps=1"]
    arguments += ["hooks=['interrupts:Interrupts']", "log.sinks=[tensorboard]"]
    assert train(2, *arguments, HOW="SIGTERM", AT="10").code == 75
    assert train(2, *arguments, HOW="SIGKILL", AT="53").code != 0
    assert len(read_lines(folder / "run/decisions.jsonl")) > 41
    assert train(2, *arguments, HOW="", AT="-1").code == 0
    assert len(list((folder / "run/tensorboard").iterdir())) == 3
    events = EventAccumulator(str(folder / "run/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    lines = read_lines(folder / "run/metrics.jsonl")
    for tag, name in (("train/loss", "loss"), ("train/lr", "lr"), ("eval/accuracy", "accuracy")):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        logged = [(line["step"], line[name]) for line in lines if name in line]
        assert len(shown) > 1
        assert [step for step, _ in shown] == [step for step, _ in logged]
        assert [value for _, value in shown] == pytest.approx([value for _, value in logged])


def test_every_sink_of_the_package_in_one_run(train, folder):
    for name in ("tensorboard", "mlflow", "wandb"):
        pytest.importorskip(name, reason=f"the extra {name} is not installed")
    sinks = "[tensorboard, mlflow, wandb, {name: mlperf, args: {benchmark: resnet}}]"
    offline = {"WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true"}
    ended = train(2, *SHORT, "run_dir=run", f"log.sinks={sinks}", **offline)
    assert ended.code == 0, ended.text
    assert "dropped" not in ended.out
    assert list((folder / "run/tensorboard").glob("events.*"))
    known = json.loads((folder / "run/mlflow_run.json").read_text())
    (losses,) = (folder / "run/mlflow").glob(f"*/{known['run_id']}/metrics/train/loss")
    lines = [line for line in read_lines(folder / "run/metrics.jsonl") if "loss" in line]
    assert len(losses.read_text().splitlines()) == len(lines)
    run_id = (folder / "run/wandb_run_id").read_text().strip()
    assert len(list((folder / "run/wandb").glob(f"offline-run-*/run-{run_id}.wandb"))) == 1
    assert '"success"' in (folder / "run/mlperf.log").read_text().splitlines()[-1]


POISONED = """
import json, math
from pathlib import Path
from hvdlarge.data.digits import digits

class Poisoned:
    def __init__(self, samples):
        self.samples, self.reads = samples, 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.reads += 1
        image, target = self.samples[index]
        return (image * math.nan if self.reads == 1000 else image), target

def data():
    training_set, test_set = digits()
    return Poisoned(training_set), test_set

class Calls:
    def __init__(self):
        self.calls = []

    def start(self, run):
        self.folder = run.folder

    def decision(self, record):
        self.calls.append(["decision", record["step"]])

    def roll_back(self, step, offsets):
        self.calls.append(["roll_back", step])

    def end(self, status):
        (self.folder / "calls.json").write_text(json.dumps(self.calls))
"""


def test_a_rollback_reaches_the_sinks_between_the_steps_that_it_separates(train, folder):
    (folder / "poisoned.py").write_text(POISONED)
    arguments = [*SHORT, "run_dir=run", "checkpoint.every_steps=20", "data={name: 'poisoned:data'}"]
    arguments += ["on_nonfinite={policy: rollback}", "log.sinks=['poisoned:Calls']"]
    ended = train(None, *arguments)
    assert ended.code == 0, ended.text
    assert "back to step 20" in ended.out
    calls = [tuple(call) for call in json.loads((folder / "run/calls.json").read_text())]
    before = calls[: calls.index(("roll_back", 20))]
    assert [step for _, step in before] == list(range(len(before)))
    assert len(before) > 21
    steps = [line["step"] for line in read_lines(folder / "run/decisions.jsonl")]
    assert calls[len(before) + 1 :] == [("decision", step) for step in steps[20:]]
