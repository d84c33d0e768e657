"""CIFAR-10 and CIFAR-100 from binary files and from Python batches."""

import pickle

import numpy as np
import pytest
import torch
from support.data_files import binary_batch, pickled_batch, write_cifar

from hvdlarge.data.cifar import cifar10, cifar100
from hvdlarge.data.files import DataFileError

READERS = {10: cifar10, 100: cifar100}
RAN = []


def small(folder, classes=10):
    return READERS[classes](str(folder), samples=20, test_samples=10)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("classes", READERS)
def test_both_formats_give_the_same_samples(tmp_path, classes, pickled):
    parts = write_cifar(tmp_path, classes, pickled=pickled)
    for dataset, (pixels, labels) in zip(small(tmp_path, classes), parts, strict=True):
        inputs, targets = dataset.batch(torch.arange(len(dataset)))
        assert inputs.dtype == torch.float32
        assert np.array_equal(inputs, pixels / np.float32(255))
        assert targets.dtype == torch.int64
        assert targets.tolist() == labels.tolist()


def test_the_folder_of_the_files_may_be_named_itself(tmp_path):
    write_cifar(tmp_path)
    assert len(small(tmp_path / "cifar-10-batches-bin")[0]) == 20


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content[:-1], "must hold 12,292 bytes, 4 records of 3,073 bytes, but it holds only 12,291"),
        (lambda content: content + b"\0", "but it holds more"),
        (lambda content: b"", "but it holds only 0"),
        (lambda content: b"\x0a" + content[1:], "the label of sample 0 is 10, but labels are 0 to 9"),
    ],
)  # fmt: skip
def test_a_damaged_binary_file_is_refused(tmp_path, change, problem):
    write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataFileError, match=problem) as error:
        small(tmp_path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named_with_the_places(tmp_path):
    write_cifar(tmp_path, 100)
    (tmp_path / "cifar-100-binary" / "test.bin").unlink()
    with pytest.raises(
        DataFileError, match=r"no file test\.bin \(or test\) in .* or .*/cifar-100-python"
    ):
        small(tmp_path, 100)


PIXELS = np.arange(4 * 3072, dtype=np.uint32).astype(np.uint8).reshape(4, 3072)


class RunsCode:
    def __reduce__(self):
        return RAN.append, (1,)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (pickled_batch(PIXELS, [0, 1, 2, 3])[:-1], "is damaged, or no Python batch of CIFAR-10"),
        (b"", "is damaged, or no Python batch of CIFAR-10"),
        (b"neither", "is damaged, or no Python batch of CIFAR-10"),
        (pickled_batch(PIXELS, [0, 1, 2, 10]), "the label of sample 3 is 10"),
        (pickled_batch(PIXELS, [0, 1, 2]), r"data has the shape \(3, 3072\), not \(4, 3072\)"),
        (pickled_batch(PIXELS[:, :3071], [0, 1, 2, 3]), r"the shape \(4, 3071\)"),
        (pickled_batch(PIXELS[:3], [0, 1, 2, 3]), "do not have the length of their shape"),
        (pickled_batch(PIXELS, [0, 1, 2, 3], classes=100), "a dict with the keys data and labels"),
        (pickled_batch(PIXELS, [0, 1, 2, 3]) + bytes(100_000), "is longer than a batch of 4 "),
        (pickle.dumps({b"data": PIXELS, b"labels": [0]}, protocol=2), r"asks for .*, which no batch of CIFAR does"),
        (pickle.dumps({b"data": RunsCode(), b"labels": [0]}), "asks for "),
        (pickle.dumps({b"data": print, b"labels": [0]}), "asks for builtins.print"),
        (pickle.dumps({"data": [1], "labels": [0]}), "a dict with the keys data and labels"),
    ],
    ids=range(13),
)  # fmt: skip
def test_a_wrong_pickle_is_refused_and_runs_no_code(tmp_path, content, problem):
    write_cifar(tmp_path, pickled=True)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=problem) as error:
        small(tmp_path)
    assert str(path) in str(error.value)
    assert RAN == []


def test_the_official_numbers_of_samples_are_expected(tmp_path):
    write_cifar(tmp_path, 100)
    with pytest.raises(DataFileError, match=r"train\.bin must hold 153,700,000 bytes, 50,000 rec"):
        cifar100(str(tmp_path))
    with pytest.raises(ValueError, match="a multiple of 5"):
        cifar10(str(tmp_path), samples=21)


def test_a_binary_file_is_records_of_label_and_pixels():
    assert len(binary_batch(PIXELS, np.arange(4))) == 4 * 3073
    assert len(binary_batch(PIXELS, np.arange(4), 100)) == 4 * 3074
