"""MNIST, and other sets of its size and format (Fashion-MNIST, KMNIST), from their IDX files.

Formula:  an IDX file is two zero bytes, the type (8: bytes), the number of dimensions, every
          dimension as a big-endian 32-bit integer, then the values, row by row
Source:   LeCun, Cortes, Burges, "The MNIST database of handwritten digits" (1998): 60,000
          training and 10,000 test images of 28×28 pixels, labels 0 … 9.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from hvdlarge.data.files import DataFileError, find, read, wrong_length
from hvdlarge.data.images import Images

_SIZE = 28
_SUBFOLDERS = ("MNIST/raw",)  # where torchvision keeps the files


def mnist(
    folder: str = "data/mnist", samples: int = 60_000, test_samples: int = 10_000
) -> tuple[Images, Images]:
    """The four IDX files of MNIST, plain or packed by gzip.

    Args:
        folder: with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, or the same with .gz.
        samples: that the training files must hold.
        test_samples: that the test files must hold.

    Returns:
        Training and test set; inputs (n, 1, 28, 28) float32 in [0, 1], targets (n,) int64, 0 … 9.

    Raises:
        DataFileError: for a file that is missing, damaged, too short or too long, or holds another
            number of samples or a label above 9.
    """
    return _part(folder, "train", samples), _part(folder, "t10k", test_samples)


def _part(folder: str, part: str, samples: int) -> Images:
    if samples < 1:
        raise ValueError(f"at least 1 sample is needed, not {samples}")
    images = _find(folder, f"{part}-images", 3)
    pixels = read_idx(images, (samples, _SIZE, _SIZE))
    path = _find(folder, f"{part}-labels", 1)
    labels = read_idx(path, (samples,))
    check_labels(path, labels, 10)
    return Images.of(pixels[:, np.newaxis], labels)


def _find(folder: str, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{mark}idx{dimensions}-ubyte" for mark in "-."]
    return find(folder, [*names, *(f"{name}.gz" for name in names)], _SUBFOLDERS)


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of an IDX file, which must have this shape.

    Raises:
        DataFileError: if it is not such a file, or has another shape or length.
    """
    header = 4 + 4 * len(shape)
    expected = header + math.prod(shape)
    content = read(path, expected)
    magic = bytes([0, 0, 8, len(shape)])
    if not content:
        raise DataFileError(f"{path} is empty: an IDX file of {shape[0]:,} samples is expected")
    if content[:4] != magic:
        raise DataFileError(
            f"{path} does not begin with the bytes {magic.hex(' ')} of an IDX file with bytes of "
            f"{len(shape)} dimensions, but with {content[:4].hex(' ')}"
        )
    if len(content) >= header:
        held = tuple(np.frombuffer(content[4:header], ">u4").tolist())
        if held != shape:
            raise DataFileError(
                f"{path} holds {_in_words(held)}, but {_in_words(shape)} are expected"
            )
    if len(content) != expected:
        raise wrong_length(path, content, expected, _in_words(shape))
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _in_words(shape: tuple[int, ...]) -> str:
    return f"{shape[0]:,} " + (
        f"images of {'×'.join(map(str, shape[1:]))} pixels" if shape[1:] else "labels"
    )


def check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    """Raise DataFileError for a label that is not 0 … classes − 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataFileError(
            f"{path}: the label of sample {wrong[0]:,} is {labels[wrong[0]]}, but labels are 0 to "
            f"{classes - 1} ({len(wrong):,} of {len(labels):,} are wrong)"
        )
