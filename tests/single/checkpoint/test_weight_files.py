"""Files of weights: what can be read, what is refused, and that writing is complete or absent."""

import errno
import os
import random
import sys

import pytest
import torch

from hvdlarge.checkpoint.weight_files import read_weights, write_weights
from hvdlarge.exits import CheckpointWriteError, JobError

STATE = {
    "a.weight": torch.arange(600.0).reshape(20, 30),
    "a.count": torch.tensor(3),
    "b.weight": torch.ones(4, dtype=torch.float64),
}


class Custom:
    pass


@pytest.fixture(params=[".pt", ".safetensors"])
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors")
    return tmp_path / f"weights{request.param}"


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], value) and one[name].dtype == value.dtype
        for name, value in other.items()
    )


def test_what_is_written_is_read_back(path):
    write_weights(path, STATE, {"job": "x", "step": "7"})
    assert same(read_weights(path), STATE)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tensors_that_share_memory_are_written_apart(path):
    shared = {"a": STATE["a.weight"], "b": STATE["a.weight"], "c": STATE["a.weight"].T}
    write_weights(path, shared, {})
    assert same(read_weights(path), shared)


def test_metadata_stand_beside_the_tensors(tmp_path):
    write_weights(tmp_path / "w.pt", STATE, {"job": "x"})
    assert torch.load(tmp_path / "w.pt", weights_only=True)["metadata"] == {"job": "x"}
    safetensors = pytest.importorskip("safetensors")
    write_weights(tmp_path / "w.safetensors", STATE, {"job": "x"})
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"job": "x"}


def test_a_file_that_is_cut_short_is_refused(path):
    write_weights(path, STATE, {})
    whole = path.read_bytes()
    for length in (0, 1, 7, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(JobError, match="damaged, cut short"):
            read_weights(path)


def test_a_damaged_torch_file_is_refused(tmp_path):
    path, draw = tmp_path / "w.pt", random.Random(1)
    write_weights(path, STATE, {})
    whole = path.read_bytes()
    start = whole.index(STATE["a.weight"].numpy().tobytes())
    for _ in range(20):
        place = start + draw.randrange(2400)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(JobError, match="damaged"):
            read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "it holds a Tensor and no state_dict"),
        ({"epoch": 3, "state_dict": STATE}, "it holds no state_dict.*\n.*epoch, state_dict"),
        ({}, "it holds no state_dict"),
        (dict(enumerate(STATE.values())), "it holds no state_dict: 0 is not a name"),
        ({"a": Custom()}, "more than tensors and builtins"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(JobError, match=message):
        read_weights(tmp_path / "w.pt")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(JobError, match="there is no such file on the host of rank 0"):
        read_weights(tmp_path / "w.pt")
    with pytest.raises(JobError, match="it is a folder"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["w.safetensors"])
def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch, name):
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(JobError, match=r"pip install 'hvdlarge\[safetensors\]'"):
        read_weights(tmp_path / name)
    with pytest.raises(JobError, match=r"hvdlarge\[safetensors\].*\.pt"):
        write_weights(tmp_path / name, STATE, {})


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.complex128), {"calls": 3}])
def test_what_safetensors_cannot_hold_is_named(tmp_path, value):
    pytest.importorskip("safetensors")
    with pytest.raises(JobError, match="cannot hold 'odd'.*name a .pt file"):
        write_weights(tmp_path / "w.safetensors", STATE | {"odd": value}, {})
    write_weights(tmp_path / "w.pt", STATE | {"odd": value}, {})


def test_a_full_disk_leaves_what_was_there(path, monkeypatch):
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointWriteError, match="No space left on device.*bytes are free"):
        write_weights(path, STATE, {})
    assert path.read_bytes() == b"before"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
