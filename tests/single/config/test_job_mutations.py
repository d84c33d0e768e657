"""Job files with one thing wrong: each either is a job that can be planned, or is refused in words that name the key."""

import copy
import functools
import random
import subprocess
import sys

import pytest
import yaml
from support.launching import ROOT

from hvdlarge.config.job_file import parse_job
from hvdlarge.config.planning import estimate, plan_run
from hvdlarge.exits import JobError

WHOLE = """\
name: whole
run_dir: runs/whole
seed: 3
epochs: 30
precision: fp32
reduction: fast
deterministic: false
data: {name: digits, num_workers: 0}
model: {name: convnet, args: {width: 4}}
loss: {name: cross_entropy, label_smoothing: 0.1}
batch:
  base: 32
  initial: 32
  micro: 16
  growth: {policy: adabatch, factor: 2, at_epochs: [6, 12, 18], max: 512}
lr:
  base: 4
  scaling: sqrt
  warmup: {policy: legw, epochs: 0.5, on_growth: ramp}
  decay: {policy: multistep, gamma: 0.5, milestones: [10, 20]}
optimizer: {name: lars, momentum: 0.9, weight_decay: 1e-4, trust_coefficient: 0.001, exclude: [head.*]}
evaluate: {every_epochs: 1, micro_batch: 256}
log: {every_steps: 10}
checkpoint: {every_epochs: 1, every_steps: 100, keep: 3, best: accuracy}
on_nonfinite: {policy: rollback, limit: 3, lr_factor: 0.5}
compare_every_steps: 100
stop_after_minutes: 55
timeouts: {step_seconds: 300}
"""
VALUES = [
    None, True, "", "word", "3", "1e3", -1, 0, 1, 0.5, -0.5, 1e-300, 1e300, 10**30, -(10**30), float("nan"), float("inf"), [], [1],
    [[]], {}, {"policy": "none"}, {"a": 1}, "digits", "none", "${NOT_SET_ANYWHERE}", "yes", "30 epochs",
]  # fmt: skip


def keys_of(section, path=()):
    for key, value in section.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*path, key))


def section_of(values, path):
    for key in path[:-1]:
        values = values[key]
    return values


def misspelt(chance, key):
    at = chance.randrange(len(key))
    return chance.choice(
        [
            key[:at] + key[at + 1 :] + "x",
            key[:at] + "q" + key[at:],
            key.upper(),
            key + "s",
            key.replace("e", "a") + "_",
        ]
    )


def written(values):
    return yaml.dump(values, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))


def structured():
    """(what was done, the key, the text) for one change of a key or a value at a time."""
    chance, whole = random.Random(1), yaml.safe_load(WHOLE)
    for path in keys_of(whole):
        for kind in ("drop", "misspell", "move", "swap"):
            values = copy.deepcopy(whole)
            section, key = section_of(values, path), path[-1]
            if kind == "drop":
                section.pop(key)
            elif kind == "misspell":
                section[misspelt(chance, key)] = section.pop(key)
            elif kind == "move":  # to another section
                values[
                    chance.choice([name for name in ("batch", "lr", "data") if name != path[0]])
                ][key + "_"] = section.pop(key)
            else:
                other = chance.choice([other for other in whole if other != path[0]])
                section[key] = whole[other]
            yield f"{kind} {'.'.join(path)}", path, written(values)
        for value in chance.sample(VALUES, 6):
            values = copy.deepcopy(whole)
            section_of(values, path)[path[-1]] = value
            yield f"{'.'.join(path)}={value!r}", path, written(values)


def damaged():
    """Texts with bytes changed."""
    chance = random.Random(2)
    for number in range(150):
        content = bytearray(WHOLE.encode())
        at = chance.randrange(len(content))
        kind = chance.choice(["flip", "insert", "delete", "cut", "double"])
        if kind == "flip":
            content[at] ^= 1 << chance.randrange(8)
        elif kind == "insert":
            content[at:at] = chance.choice(
                [
                    b"\x00",
                    b"\t",
                    b":",
                    b"{",
                    b"]",
                    b"'",
                    b"\xff",
                    b"&a ",
                    b"!x ",
                    b"- ",
                    b"\n",
                    b"%",
                    b"${",
                ]
            )
        elif kind == "delete":
            del content[at : at + chance.randrange(1, 9)]
        elif kind == "cut":
            del content[at:]
        else:
            content[at:at] = content[at : at + chance.randrange(1, 60)]
        yield f"{kind} {number}", bytes(content)


STRUCTURED, DAMAGED = list(structured()), list(damaged())


def read_and_plan(text):
    """The error of a text that is refused; None for one that can be planned."""
    try:
        job = parse_job(text, "job.yaml")
        estimate(job, plan_run(job, 1437, 2), None)
    except JobError as error:
        return str(error)
    return None


def test_the_whole_job_is_a_job():
    assert read_and_plan(WHOLE) is None
    assert len(STRUCTURED) + len(DAMAGED) >= 300


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("path", "text"), [case[1:] for case in STRUCTURED], ids=[case[0] for case in STRUCTURED]
)
def test_a_changed_key_or_value(path, text):
    refused = read_and_plan(text)
    if refused is not None:
        # The key itself, or the one that it stands in: a section of another kind is told as a whole.
        assert path[-1] in refused or ".".join(path[:-1]) in refused
        assert "Traceback" not in refused


@pytest.mark.timeout(120)
@pytest.mark.parametrize("text", [case[1] for case in DAMAGED], ids=[case[0] for case in DAMAGED])
def test_damaged_bytes(text):
    refused = read_and_plan(text)
    assert refused is None or refused.startswith("job.yaml")


@functools.cache
def all_refused():
    return [text for _, _, text in STRUCTURED if read_and_plan(text) is not None]


def test_most_of_them_are_refused():
    """Else the cases above would show nothing."""
    assert len(STRUCTURED) * 0.6 < len(all_refused()) < len(STRUCTURED)


@pytest.mark.parametrize("number", range(8))
def test_the_doors_leave_with_2_and_one_message(number, tmp_path):
    (tmp_path / "job.yaml").write_text(all_refused()[number * len(all_refused()) // 8])
    done = [
        subprocess.run(
            [sys.executable, "-m", f"hvdlarge.{door}", str(tmp_path / "job.yaml"), *more],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        for door, more in (("train", ["--dry-run"]), ("plan", []))
    ]
    assert [ended.returncode for ended in done] == [2, 2]
    assert done[0].stderr == done[1].stderr
    assert done[0].stderr.count("hvdlarge: error:") == 1
    assert "Traceback" not in done[0].stderr
