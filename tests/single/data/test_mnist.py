"""MNIST from IDX files."""

import gzip

import numpy as np
import pytest
import torch
from support.data_files import write_idx, write_mnist

from hvdlarge.config import registry
from hvdlarge.data.files import DataFileError
from hvdlarge.data.mnist import mnist
from hvdlarge.exits import JobError


def small(folder):
    return mnist(str(folder), samples=20, test_samples=10)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["", "MNIST/raw"])
def test_both_parts_are_read(tmp_path, packed, place):
    parts = write_mnist(tmp_path / place, packed=packed)
    for dataset, (pixels, labels) in zip(small(tmp_path), parts, strict=True):
        indices = torch.tensor([3, 0, 9])
        inputs, targets = dataset.batch(indices)
        assert inputs.shape == (3, 1, 28, 28)
        assert inputs.dtype == torch.float32
        assert np.array_equal(inputs[:, 0], pixels[indices] / np.float32(255))
        assert targets.dtype == torch.int64
        assert targets.tolist() == labels[indices].tolist()
        assert torch.equal(dataset[3][0], inputs[0])
        assert dataset[3][1] == targets[0]
        assert dataset.as_bytes()[3][0].dtype == torch.uint8


def test_names_with_a_dot_are_found(tmp_path):
    write_mnist(tmp_path)
    for file in list(tmp_path.iterdir()):
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    assert len(small(tmp_path)[0]) == 20


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


def stop_in_the_header(path):
    path.write_bytes(path.read_bytes()[:7])


def other_magic(path):
    path.write_bytes(b"\0\0\x0d" + path.read_bytes()[3:])


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut, r"must hold [\d,]+ bytes, \d+ (images|labels).*, but it holds only [\d,]+"),
        (lengthen, r"must hold [\d,]+ bytes, .*, but it holds more"),
        (stop_in_the_header, "but it holds only 7"),
        (empty, r"is empty: an IDX file of \d+ samples is expected"),
        (other_magic, "does not begin with the bytes 00 00 08 0[13] .*but with 00 00 0d 0[13]"),
        (lambda path: path.unlink(), r"there is no file .* \(or .*\.gz\) in "),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, name, damage, problem):
    write_mnist(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(DataFileError, match=problem) as error:
        small(tmp_path)
    assert name in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    write_mnist(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    changed = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]  # its checksum
    for content in (whole[:-20], changed, b"no gzip", b"\x1f\x8b" + whole[5:]):
        path.write_bytes(content)
        with pytest.raises(DataFileError, match=r"train-images-idx3-ubyte\.gz cannot be read: "):
            small(tmp_path)
    path.write_bytes(gzip.compress(gzip.decompress(whole) + bytes(1 << 20)))
    with pytest.raises(DataFileError, match=r"gz must hold 15,696 bytes, .*, but it holds more"):
        small(tmp_path)


def test_other_numbers_of_samples_and_sizes_are_refused(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(DataFileError, match="holds 20 images .*, but 60,000 images of 28×28"):
        mnist(str(tmp_path))
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((20, 28, 27), np.uint8))
    with pytest.raises(DataFileError, match="holds 20 images of 28×27 pixels"):
        small(tmp_path)


def test_a_wrong_label_is_named(tmp_path):
    write_mnist(tmp_path)
    labels = np.zeros(10, np.uint8)
    labels[[4, 7]] = 10, 255
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels)
    with pytest.raises(
        DataFileError, match=r"label of sample 4 is 10, but labels are 0 to 9 \(2 of 10"
    ):
        small(tmp_path)


def test_a_missing_folder_is_an_error_of_the_job(tmp_path):
    arguments = {"folder": str(tmp_path / "nowhere")}
    with pytest.raises(JobError, match=r"data\.name: mnist: there is no folder .*nowhere: train-"):
        registry.instantiate("data.name", "mnist", arguments, registry.DATA_SETS)
