"""The benchmark of a step: which jobs its bare loop can follow."""

import json

import pytest
import torch

from hvdlarge.bench.__main__ import main
from hvdlarge.data.digits import digits

JOB = """
name: benched
epochs: 1
data: {name: digits}
model: {name: mlp, args: {hidden: [4]}}
batch: {base: 8, micro: 4}
lr: {base: 0.1}
"""
WEIGHTED = "loss={name: cross_entropy, args: {ignore_index: 3}}"


class Named(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return dict(zip(("samples", "label"), self.pairs[index], strict=True))


def named():
    return tuple(map(Named, digits()))


DICTS = "data={name: 'test_step:named', targets: label}"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A function that runs the benchmark in this process, and returns exit code and variants."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    (tmp_path / "job.yaml").write_text(JOB)
    threads = torch.get_num_threads()

    def run(*arguments):
        command = ["step", "job.yaml", "--rounds", "1", "--steps", "1", "--json", "found.json"]
        code = main([*command, *arguments])
        return code, list(
            json.loads((tmp_path / "found.json").read_text())["variants"]
        ) if code == 0 else []

    yield run
    torch.set_num_threads(threads)


def test_step_of_a_job_that_the_bare_loop_can_follow(bench):
    assert bench() == (0, ["engine", "control", "bare loop", "one worker alone"])


@pytest.mark.parametrize("change", [WEIGHTED, DICTS, "reduction=exact"])
def test_step_of_a_job_that_the_bare_loop_cannot_follow_is_refused(bench, capsys, change):
    assert bench(change) == (2, [])
    assert "the bare loop takes samples that are pairs of tensors" in capsys.readouterr().err


@pytest.mark.parametrize("change", [WEIGHTED, DICTS])
def test_step_of_the_engine_alone_is_timed_for_any_job(bench, change):
    assert bench(change, "--only", "engine") == (0, ["engine"])


def test_step_of_an_unknown_variant_is_refused(bench, capsys):
    assert bench("--only", "enigne") == (2, [])
    assert "the variants are engine, control, bare loop" in capsys.readouterr().err
