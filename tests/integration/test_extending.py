"""The page on extending the engine: what it shows is added to a copy of the package, and trains."""

import json
import re
import shutil
import sys

import jsonschema
import pytest
import torch
import yaml
from support.launching import ROOT

BLOCK = re.compile(r"`([\w./]+)`(?:, in `([A-Z_]+)`)?:\n\n```(?:python|yaml)\n(.*?)```", re.DOTALL)
WITHOUT_TORCH = """
import json, sys
for name in ("torch", "horovod", "mpi4py", "sklearn"):
    sys.modules[name] = None
import hvdlarge
from hvdlarge.config.explain import explain
from hvdlarge.config.json_schema import job_schema
from hvdlarge.config.job_file import read_job
from hvdlarge.config.planning import estimate, plan_run, training_samples
from hvdlarge.exits import JobError
job = read_job("rings.yaml")
try:
    refused = read_job("rings.yaml", ["lr.decay.halving_epochs=0", "optimizer.momentum=1"])
except JobError as error:
    refused = str(error)
keys = ["data.name", "model.name", "loss.name", "evaluate.metrics", "optimizer", "lr.decay"]
print(json.dumps({
    "package": hvdlarge.__file__,
    "plan": estimate(job, plan_run(job, training_samples(job), 3), None),
    "explain": {key: explain(key) for key in keys},
    "schema": job_schema(),
    "refused": refused,
}))
"""


@pytest.fixture
def extended(folder):
    """A copy of the package with everything that the page adds, and its job beside it."""
    shutil.copytree(
        ROOT / "hvdlarge", folder / "hvdlarge", ignore=shutil.ignore_patterns("__pycache__")
    )
    new_files, lines = [], []
    for name, table, text in BLOCK.findall((ROOT / "docs/extending.md").read_text("utf-8")):
        path = folder / name
        if table:
            assert text.count("\n") == 1, "one line elsewhere"
            before = path.read_text("utf-8")
            opening = re.search(rf"^{table} = \{{\n", before, re.MULTILINE)
            path.write_text(before[: opening.end()] + text + before[opening.end() :], "utf-8")
            lines.append(table)
        else:
            assert not path.exists(), "one new file"
            path.write_text(text, "utf-8")
            new_files.append(name)
    assert lines == ["DECAYS", "OPTIMIZERS", "MODELS", "DATA_SETS", "LOSSES", "METRICS", "SINKS"]
    assert len(new_files) == len(lines) + 1
    return folder


def test_every_part_of_the_page_is_planned_explained_and_trained(extended, start, train):
    ended = start([sys.executable, "-c", WITHOUT_TORCH], PYTHONPATH=str(extended))
    assert ended.code == 0, ended.err
    known = json.loads(ended.out)
    assert known["package"] == str(extended / "hvdlarge/__init__.py")
    assert (known["plan"]["training_samples"], known["plan"]["steps"]) == (600, 120)
    last_epoch = 119 * 20 / 600
    assert known["plan"]["stages"][0]["lr_last"] == pytest.approx(0.05 / (1 + last_epoch / 2))
    names = ["rings", "quadratic", "focal", "bits_per_target", "signum", "inverse_time"]
    for (key, text), name in zip(known["explain"].items(), names, strict=True):
        assert name in text, key
    assert "Momentum β of the average of gradients." in known["explain"]["optimizer"]
    assert "lr.decay: halving_epochs must be above 0, got 0.0" in known["refused"]
    assert "optimizer.momentum is 1: input should be less than 1" in known["refused"]
    job = yaml.safe_load((extended / "rings.yaml").read_text())
    job["optimizer"]["weight_decay"] = float(job["optimizer"]["weight_decay"])
    jsonschema.validate(job, known["schema"])
    job["optimizer"]["momentum"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, known["schema"])

    ended = train(None, "rings.yaml", PYTHONPATH=str(extended))
    assert ended.code == 0, ended.err
    assert re.search(r"Signum, momentum 0\.8, weight_decay 0\.0001", ended.out)
    summary = json.loads((extended / "runs/rings/summary.json").read_text())
    assert summary["steps"] == 120
    assert summary["accuracy"] > 0.9
    assert 0 < summary["bits_per_target"] < 1  # 1 is that of a guess
    assert (
        f"accuracy {summary['accuracy']:.4f}, bits_per_target {summary['bits_per_target']:.4f}"
        in ended.out
    )
    results = [
        line.split(";") for line in (extended / "runs/rings/figures.csv").read_text().split()
    ]
    curve = [(int(step), float(value)) for step, name, value in results if name == "eval/accuracy"]
    assert [step for step, _ in curve] == [29, 59, 89, 119]
    assert curve[-1][1] == summary["accuracy"]
    best = torch.load(extended / "runs/rings/checkpoints/best.pt", weights_only=True)
    assert best["state"]["best"]["by"] == "bits_per_target"
    assert best["optimizer"]["classifier.weight"]["average"].shape == (2, 4)
