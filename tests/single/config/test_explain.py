"""What `--explain` prints about the keys of the job file."""

import pytest

from hvdlarge import train
from hvdlarge.config.explain import explain
from hvdlarge.config.json_schema import job_schema
from hvdlarge.exits import JobError


def test_every_property_of_the_schema_has_a_description():
    schema = job_schema()
    sections = {"job": schema, **schema["$defs"]}
    missing = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, entry in section.get("properties", {}).items()
        if not entry.get("description")
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("epochs", ["epochs: number > 0, required", "fractional"]),
        ("precision", ["fp32 | tf32 | bf16 | fp16 | fp64", 'default: "fp32"']),
        ("batch.micro", ["integer ≥ 1", "| auto, required"]),
        (
            "lr.warmup",
            ["section (none, linear, legw, package.module:Class)", "lr.warmup: {policy: legw, …}"],
        ),
        ("lr.warmup.epochs", ["lr.warmup.epochs (linear)", "lr.warmup.epochs (legw)"]),
        ("optimizer.weight_decay", ["optimizer.weight_decay: number ≥ 0"]),
        ("optimizer.eps", ["optimizer.eps (lars): number ≥ 0, default: 0.0"]),
        ("", ["name: text, required", "optimizer: section (lars, lamb"]),
    ],
)
def test_a_key_is_explained(key, parts):
    text = explain(key)
    assert all(part in text for part in parts), text


def test_a_key_that_means_the_same_everywhere_is_explained_once():
    assert explain("optimizer.weight_decay").count("optimizer.weight_decay") == 1


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("lr.warmpu", "unknown key 'lr.warmpu'; did you mean 'warmup'?"),
        ("zzz", "unknown key 'zzz'; known keys: name, run_dir"),
        ("lr.base.x", "lr.base is not a section: it has no keys"),
        ("lr..base", "unknown key 'lr.'"),
    ],
)
def test_an_unknown_key_is_an_error(key, problem):
    with pytest.raises(JobError, match=problem):
        explain(key)


def test_the_command_explains_and_leaves(capsys):
    with pytest.raises(SystemExit) as left:
        train.main(["--explain", "lr.base"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("lr.base: number > 0, required")
    with pytest.raises(SystemExit) as left:
        train.main(["--explain", "lr.bas"])
    assert left.value.code == 2
    assert "did you mean 'base'?" in capsys.readouterr().err
