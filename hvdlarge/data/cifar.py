"""CIFAR-10 and CIFAR-100 from their binary files, or from their Python batches.

Formula:  a binary record is one label byte (CIFAR-100: two, coarse and fine), then 3 × 32 × 32
          pixels: all of red, all of green, all of blue, each row by row. A Python batch is a
          pickled dict of the same pixels, an array of shape (n, 3072), and the labels
Source:   Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009): 50,000
          training and 10,000 test images.
Contract: no code of a pickle runs, not even numpy's: its arrays become plain tuples, and any other
          class is an error.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdlarge.data.files import DataFileError, find, read, wrong_length
from hvdlarge.data.images import Images
from hvdlarge.data.mnist import check_labels

_PIXELS = 3 * 32 * 32
_EXTRA_BYTES = 256  # per image of a Python batch: its label and file name


def cifar10(
    folder: str = "data/cifar10", samples: int = 50_000, test_samples: int = 10_000
) -> tuple[Images, Images]:
    """CIFAR-10, from data_batch_1.bin … data_batch_5.bin and test_batch.bin, or from the Python
    batches of these names without .bin.

    Args:
        folder: that holds the files, or cifar-10-batches-bin or cifar-10-batches-py with them.
        samples: that the five training files must hold, each a fifth of them.
        test_samples: that the test file must hold.

    Returns:
        Training and test set; inputs (n, 3, 32, 32) float32 in [0, 1], targets (n,) int64, 0 … 9.

    Raises:
        DataFileError: for a file that is missing, damaged, too short or too long, or holds a label
            above 9.
    """
    if samples % 5:
        raise ValueError(f"samples is {samples}: it must be a multiple of 5, the training files")
    places = ("cifar-10-batches-bin", "cifar-10-batches-py")
    train = [
        _read(folder, f"data_batch_{number}", places, samples // 5, 10) for number in range(1, 6)
    ]
    return _set(train), _set([_read(folder, "test_batch", places, test_samples, 10)])


def cifar100(
    folder: str = "data/cifar100", samples: int = 50_000, test_samples: int = 10_000
) -> tuple[Images, Images]:
    """CIFAR-100 with its fine labels, from train.bin and test.bin, or from the Python batches train
    and test.

    Args:
        folder: that holds the files, or cifar-100-binary or cifar-100-python with them.
        samples: that the training file must hold.
        test_samples: that the test file must hold.

    Returns:
        Training and test set; inputs (n, 3, 32, 32) float32 in [0, 1], targets (n,) int64, 0 … 99.

    Raises:
        DataFileError: as `cifar10`.
    """
    places = ("cifar-100-binary", "cifar-100-python")
    train = _read(folder, "train", places, samples, 100)
    return _set([train]), _set([_read(folder, "test", places, test_samples, 100)])


def _set(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Images:
    pixels = np.concatenate([pixels for pixels, _ in parts])
    return Images.of(pixels, np.concatenate([labels for _, labels in parts]))


def _read(
    folder: str, stem: str, places: Sequence[str], samples: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, shape (n, 3, 32, 32), and labels, shape (n,), of one file."""
    if samples < 1:
        raise ValueError(f"at least 1 sample per file is needed, not {samples}")
    path = find(folder, [f"{stem}.bin", stem], places)
    reader = _read_binary if path.suffix == ".bin" else _read_pickle
    pixels, labels = reader(path, samples, classes)
    check_labels(path, labels, classes)
    return pixels.reshape(samples, 3, 32, 32), labels


def _read_binary(path: Path, samples: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    label_bytes = 2 if classes == 100 else 1
    record = label_bytes + _PIXELS
    content = read(path, samples * record)
    if len(content) != samples * record:
        raise wrong_length(
            path, content, samples * record, f"{samples:,} records of {record:,} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(samples, record)
    return records[:, label_bytes:], records[:, label_bytes - 1]


def _read_pickle(path: Path, samples: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    limit = samples * (_PIXELS + _EXTRA_BYTES) + (1 << 16)
    content = read(path, limit)
    if len(content) > limit:
        raise DataFileError(f"{path} is longer than a batch of {samples:,} images can be")
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except DataFileError as error:
        raise DataFileError(f"{path}: {error}") from None
    except Exception as error:  # pickle raises nearly anything for damaged files
        reason = str(error) or type(error).__name__
        raise DataFileError(
            f"{path} is damaged, or no Python batch of CIFAR-{classes}: {reason}"
        ) from None
    key = b"labels" if classes == 10 else b"fine_labels"
    if not isinstance(batch, dict) or not {b"data", key} <= batch.keys():
        raise DataFileError(f"{path} must be a dict with the keys data and {key.decode()}")
    pixels, labels = _pixels(path, batch[b"data"], samples), batch[key]
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataFileError(f"{path}: {key.decode()} must be a list of integers")
    if len(labels) != samples:
        raise DataFileError(f"{path} holds {len(labels):,} labels, but {samples:,} are expected")
    return pixels, np.array(labels)


def _pixels(path: Path, array: Any, samples: int) -> np.ndarray:
    shape, dtype, fortran_order, values = getattr(array, "state", (None,) * 4)
    if getattr(dtype, "name", None) not in (b"u1", "u1") or fortran_order:
        raise DataFileError(f"{path}: data must be an array of bytes, row by row")
    if shape != (samples, _PIXELS):
        raise DataFileError(f"{path}: data has the shape {shape}, not ({samples}, {_PIXELS})")
    if not isinstance(values, bytes) or len(values) != samples * _PIXELS:
        raise DataFileError(f"{path} is damaged: its data do not have the length of their shape")
    return np.frombuffer(values, np.uint8)


class _Array:
    """What a pickle says of an array: shape, dtype, whether its order is Fortran's, values."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = (None,) * 4

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, *self_state = state  # after numpy's version of the format
        self.state = tuple(self_state) if len(self_state) == 4 else self.state


class _Dtype:
    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, which bytes do not have."""


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    """Knows only the classes that the official batches name, and stand-ins for these."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise DataFileError(
                f"it asks for {module}.{name}, which no batch of CIFAR does: it is not read"
            )
        return _STAND_INS[module, name]
