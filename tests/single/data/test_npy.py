"""Data sets in memory-mapped `.npy` files."""

import pickle

import numpy as np
import pytest
import torch

from hvdlarge.config import registry
from hvdlarge.data.files import DataFileError, write_sums
from hvdlarge.data.in_memory import reads_batches
from hvdlarge.data.npy import map_file, npy
from hvdlarge.exits import JobError


def write(folder, part="train", samples=10, inputs="u1", targets="i8"):
    rng = np.random.default_rng(0)
    labels = np.arange(samples).astype(targets)
    arrays = rng.integers(100, size=(samples, 3, 4)).astype(inputs), labels
    for name, array in zip(("inputs", "targets"), arrays, strict=True):
        np.save(folder / f"{part}_{name}.npy", array)
    return arrays


def test_bytes_become_fractions_unless_the_job_keeps_them(tmp_path):
    inputs, targets = write(tmp_path)
    train, test = npy(str(tmp_path))
    assert test is None
    indices = torch.tensor([9, 0, 3])
    batch = train.batch(indices)
    assert np.array_equal(batch[0], inputs[indices] / np.float32(255))
    assert np.array_equal(batch[1], targets[indices])
    assert torch.equal(train[3][0], batch[0][2])
    kept, _ = npy(str(tmp_path), scale_bytes=False)
    assert np.array_equal(kept.batch(indices)[0], inputs[indices])
    assert reads_batches(kept)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "f4", "f8", "?"])
def test_integer_targets_become_int64_and_others_stay(tmp_path, dtype):
    inputs, targets = write(tmp_path, inputs="f8", targets=dtype)
    train, _ = npy(str(tmp_path))
    values, read = train.batch(torch.tensor([1, 5]))
    assert np.array_equal(values, inputs[[1, 5]])
    assert read.dtype == train[5][1].dtype
    assert read.dtype == (torch.int64 if dtype[0] in "ui" else train.targets.dtype)
    assert np.array_equal(read, targets[[1, 5]])


def test_what_a_user_changes_in_a_sample_stays_out_of_the_file_and_the_set(tmp_path):
    inputs, _ = write(tmp_path, inputs="f4")
    train, _ = npy(str(tmp_path))
    train[2][0].zero_()
    train.batch(torch.tensor([2]))[0].zero_()
    assert np.array_equal(train[2][0], inputs[2])
    assert np.array_equal(np.load(tmp_path / "train_inputs.npy"), inputs)


def test_another_process_gets_the_paths_and_not_the_values(tmp_path):
    write(tmp_path, samples=10_000)
    train, _ = npy(str(tmp_path))
    sent = pickle.dumps(train)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).batch(torch.tensor([7]))[0], train[7][0].unsqueeze(0))


def test_a_test_set_is_whole_or_absent(tmp_path):
    write(tmp_path)
    write(tmp_path, "test", samples=4)
    assert len(npy(str(tmp_path))[1]) == 4
    (tmp_path / "test_targets.npy").unlink()
    with pytest.raises(DataFileError, match=r"there is no file test_targets\.npy in "):
        npy(str(tmp_path))


WHOLE = 128 + 10 * 12


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content[:-1], f"no complete .npy file of numbers .{WHOLE - 1} bytes"),
        (lambda content: content[:20], "no complete .npy file of numbers .20 bytes"),
        (lambda content: content + b"\0", f"must hold {WHOLE} bytes, as its header says, but it holds {WHOLE + 1}"),
        (lambda content: b"", "no complete .npy file of numbers .0 bytes"),
        (lambda content: b"PK" + content[2:], "no complete .npy file"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path, change, problem):
    write(tmp_path)
    path = tmp_path / "train_inputs.npy"
    assert path.stat().st_size == WHOLE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataFileError, match=problem) as error:
        npy(str(tmp_path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((0, 3)), "is empty"),
        (np.float32(1), "is empty"),
        (np.array(["a"]), "holds <U1, which torch does not support"),
        (np.zeros(3, "u2"), "holds uint16, .*: int32 or int64 are expected"),
        (np.zeros(3, ">f4"), "holds >f4, which torch does not support"),
        (np.array([None]), "no complete .npy file of numbers"),
    ],
)
def test_an_array_that_is_no_data_set_is_refused(tmp_path, array, problem):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataFileError, match=problem):
        map_file(tmp_path / "a.npy")


def test_an_archive_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(DataFileError, match="archive"):
        map_file((tmp_path / "a.npz").rename(tmp_path / "a.npy"))


def test_other_lengths_are_an_error_of_the_job(tmp_path):
    write(tmp_path)
    np.save(tmp_path / "train_targets.npy", np.arange(9))
    with pytest.raises(JobError, match=r"data.name: npy: .* 10 samples, but .*targets\.npy 9"):
        registry.instantiate("data.name", "npy", {"folder": str(tmp_path)}, registry.DATA_SETS)


def test_verify_reads_every_file(tmp_path):
    write(tmp_path)
    with pytest.raises(DataFileError, match="no file SHA256SUMS"):
        npy(str(tmp_path), verify=True)
    write_sums(tmp_path, ["train_inputs.npy"])
    with pytest.raises(DataFileError, match=r"SHA256SUMS lacks train_targets\.npy"):
        npy(str(tmp_path), verify=True)
    write_sums(tmp_path, ["train_inputs.npy", "train_targets.npy"])
    npy(str(tmp_path), verify=True)
    content = bytearray((tmp_path / "train_inputs.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "train_inputs.npy").write_bytes(content)
    npy(str(tmp_path))
    with pytest.raises(DataFileError, match=r"train_inputs\.npy is damaged: its SHA-256"):
        npy(str(tmp_path), verify=True)
