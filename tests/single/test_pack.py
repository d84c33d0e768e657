"""`hvdlarge pack`: any data set as `.npy` files, also after an interruption."""

import json
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch
from support.data_files import write_mnist
from torch.utils.data import Dataset, Subset

from hvdlarge import pack
from hvdlarge.config.job import Data
from hvdlarge.data import packing
from hvdlarge.data.digits import digits
from hvdlarge.data.files import check_sums
from hvdlarge.data.mnist import mnist
from hvdlarge.data.npy import npy
from hvdlarge.data.packing import Source
from hvdlarge.data.samples import SampleForm
from hvdlarge.training import build

REST = "model: {name: mlp}\nbatch: {base: 8, micro: 8}\nlr: {base: 0.1}\nepochs: 1\n"


class Noisy(Dataset):
    """Samples with random draws; sample `bad` has another shape."""

    def __init__(self, size=50, bad=None, stop=None, lost=None):
        self.size, self.bad, self.stop, self.lost, self.reads = size, bad, stop, lost, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads += 1
        if index == self.stop:
            raise KeyboardInterrupt
        if index == self.lost:
            raise FileExistsError(f"an error of the set at {index}")
        values = torch.randn(3 + (index == self.bad)) + random.random()
        return values.numpy() + np.float32(index), index % 7


def noisy(bad=None, size=50, lost=None):
    return Noisy(size, bad, lost=lost), Noisy(size=9)


def as_dicts():
    return [{"x": 1.0, "y": 2}] * 5, None


def alone():
    return [torch.zeros(2)] * 5, None


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(packing, "_PIECE_BYTES", 4 * 20)  # four samples of Noisy each


def job(folder, data):
    path = folder / "job.yaml"
    path.write_text(f"name: packed\ndata: {data}\n{REST}")
    return str(path)


def everything(dataset):
    """All samples, each by itself."""
    return [dataset[index] for index in range(len(dataset))]


def assert_same(dataset, expected):
    assert len(dataset) == len(expected)
    for sample, other in zip(everything(dataset), everything(expected), strict=True):
        for value, other_value in zip(sample, other, strict=True):
            assert value.dtype == other_value.dtype
            assert torch.equal(value, other_value)


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_a_packed_set_gives_the_same_samples(tmp_path, name, capsys):
    arguments = {"folder": str(tmp_path), "samples": 20, "test_samples": 10}
    write_mnist(tmp_path)
    data = {"name": name, "args": arguments if name == "mnist" else {}}
    expected = mnist(**arguments) if name == "mnist" else digits()
    out = tmp_path / "out"
    assert pack.main([job(tmp_path, json.dumps(data)), str(out)]) == 0
    shown = capsys.readouterr().out
    assert "test   10 of 10 samples, 100%" in shown or "test   360 of 360" in shown
    section = json.loads(shown.splitlines()[-1].partition("args: ")[2][:-1])
    for packed, original in zip(npy(**section), expected, strict=True):
        assert_same(packed, original)
    stored = np.load(out / "train_inputs.npy", mmap_mode="r")
    assert stored.dtype == (np.uint8 if name == "mnist" else np.float32)
    assert set(check_sums(out)) == {
        f"{part}_{field}.npy" for part in ("train", "test") for field in ("inputs", "targets")
    } | {"packed.json"}
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, check=False).returncode == 0
    assert not list(out.glob("*.partial")) + list(out.glob("*.jsonl"))


def test_random_draws_depend_on_the_sample_alone(tmp_path, small_pieces):
    name = "single.test_pack:noisy"
    for out, workers in ((tmp_path / "here", 0), (tmp_path / "processes", 2)):
        section = json.dumps({"name": name, "num_workers": workers})
        assert pack.main([job(tmp_path, section), str(out)]) == 0
    for file in (tmp_path / "here").glob("*.npy"):
        assert file.read_bytes() == (tmp_path / "processes" / file.name).read_bytes()
    (test_set, _), (again, _) = (npy(str(tmp_path / place)) for place in ("here", "processes"))
    assert torch.equal(test_set.inputs, again.inputs)
    assert len({tuple(row.tolist()) for row in test_set.inputs}) == 50


def run(dataset, folder, origin="origin"):
    reports = []
    parts = {
        "train": Source(dataset, SampleForm(), seed=3),
        "test": Source(Noisy(9), SampleForm(), 3),
    }
    packing.pack(parts, folder, {"data": origin}, lambda *report: reports.append(report))
    return reports


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("stop", [1, 4, 23, 49])
def test_an_interrupted_run_continues(tmp_path, small_pieces, stop):
    run(Noisy(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Noisy(stop=stop), tmp_path / "cut")
    again = Noisy()
    assert run(again, tmp_path / "cut")[0] == ("train", stop // 4 * 4, 50)
    assert again.reads == 1 + 50 - stop // 4 * 4  # the first sample gives the form
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def append(path, content):
    path.write_bytes(path.read_bytes() + content)


def flip(path):
    content = bytearray(path.read_bytes())
    content[128 + 12 * 5] ^= 1  # of sample 5
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda folder: flip(folder / "train_inputs.npy.partial"), 4),
        (lambda folder: (folder / "train_targets.npy.partial").unlink(), 0),
        (lambda folder: (folder / "train_packing.jsonl").unlink(), 0),
        (lambda folder: append(folder / "train_packing.jsonl", b'["torn'), 20),
        (lambda folder: append(folder / "train_inputs.npy.partial", bytes(7)), 20),
    ],
)
def test_pieces_that_changed_since_are_written_again(tmp_path, small_pieces, change, kept):
    run(Noisy(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Noisy(stop=22), tmp_path / "cut")
    change(tmp_path / "cut")
    assert run(Noisy(), tmp_path / "cut")[0] == ("train", kept, 50)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_another_origin_starts_again(tmp_path, small_pieces):
    with pytest.raises(KeyboardInterrupt):
        run(Noisy(stop=22), tmp_path)
    assert run(Noisy(), tmp_path, "another")[0] == ("train", 0, 50)


def test_a_run_that_was_interrupted_while_the_files_got_their_names_is_finished(
    tmp_path, small_pieces, monkeypatch
):
    run(Noisy(), tmp_path / "whole")
    real, calls = packing.os.replace, []

    def stop_at_the_third(source, target):
        calls.append(source)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(packing.os, "replace", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(Noisy(), tmp_path / "cut")
    assert (tmp_path / "cut" / "train_inputs.npy").exists()
    assert run(Noisy(), tmp_path / "cut")[0] == ("train", 50, 50)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_same_command_again_verifies_and_another_job_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    command = [job(tmp_path, "{name: 'single.test_pack:noisy'}"), str(out)]
    assert pack.main(command) == 0
    assert pack.main(command) == 0
    assert "5 files are as they were written" in capsys.readouterr().out
    assert pack.main(["--verify", str(out)]) == 0
    assert pack.main([*command, "seed=1"]) == 2
    assert "holds another data set: name another folder" in capsys.readouterr().err
    flip(out / "train_inputs.npy")
    assert pack.main(["--verify", str(out)]) == 2
    assert "train_inputs.npy is damaged" in capsys.readouterr().err
    (out / "SHA256SUMS").unlink()
    assert pack.main(command) == 2
    assert "train_inputs.npy exists already: name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("{name: 'single.test_pack:noisy', args: {bad: 1}}", "samples cannot be stacked"),
        ("{name: 'single.test_pack:noisy', args: {bad: 48, size: 49}}", "samples 48 to 48"),
        ("{name: 'single.test_pack:noisy', args: {lost: 20}}", "a sample cannot be read: FileExistsError: an error of the set at 20 (test_pack.py, line "),
        ("{name: 'single.test_pack:as_dicts'}", "only pairs of one input and one target"),
        ("{name: 'single.test_pack:as_dicts', targets: y}", "only pairs of one input and one"),
        ("{name: 'single.test_pack:alone'}", "only pairs of one input and one target"),
        ("{name: mnist, args: {folder: nowhere}}", "there is no folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_an_error_of_the_job(
    tmp_path, small_pieces, capsys, data, problem
):
    assert pack.main([job(tmp_path, data), str(tmp_path / "out")]) == 2
    assert problem in capsys.readouterr().err


def with_token(token):
    return [(torch.zeros(2), 1)] * 5, None


def test_a_secret_of_the_environment_is_in_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    data = "{name: 'single.test_pack:with_token', args: {token: '${TOKEN}'}}"
    assert pack.main([job(tmp_path, data), str(tmp_path / "out")]) == 0
    assert "sha256" in (tmp_path / "out/packed.json").read_text()
    for file in (tmp_path / "out").iterdir():
        assert b"s3cret" not in file.read_bytes()


def test_a_wrong_command_line(tmp_path, capsys):
    assert pack.main([job(tmp_path, "{name: digits}")]) == 2
    assert "name a job file and a folder" in capsys.readouterr().err


def test_a_full_disk_is_reported_and_the_same_command_continues(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert pack.main([job(tmp_path, "{name: digits}"), str(tmp_path / "out" / "in")]) == 74
    assert "could not be written" in capsys.readouterr().err


def test_a_packed_set_trains_as_the_original(tmp_path):
    out = tmp_path / "out"
    assert pack.main([job(tmp_path, "{name: digits}"), str(out)]) == 0
    packed = build.load_data(Data(name="npy", args={"folder": str(out)}), 0)
    part = Subset(packed[0], [5, 2])
    assert torch.equal(part[0][0], digits()[0][5][0])
    shutil.rmtree(out)
    assert torch.equal(part[1][0], digits()[0][2][0])  # mapped files outlive their names
