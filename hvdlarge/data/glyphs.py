"""Glyphs: images of 47 classes of characters, drawn from fonts, distorted and noisy.

Formula:  sample i of a part shows class i mod 47 in a random font; its shape is rotated, scaled,
          sheared and shifted at random, its grey levels are random, and noise is added
Source:   the classes are those of EMNIST balanced: Cohen, Afshar, Tapson, van Schaik, "EMNIST:
          an extension of MNIST to handwritten letters" (2017): letters whose capital and
          lower-case forms look alike are one class.
Contract: every sample is a function of (seed, part, i) and the font files. Random numbers are
          SplitMix64, pixels are integers, and the six coefficients of a sample's transform are
          single operations of IEEE doubles, rounded: nothing depends on the CPU, or on numpy's or
          torch's release.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import warnings
from pathlib import Path

import numpy as np

from hvdlarge.data import seeds
from hvdlarge.data.files import DataFileError, cache_folder, write_sums
from hvdlarge.data.images import Images
from hvdlarge.data.npy import PARTS, Mapped, npy
from hvdlarge.data.outlines import digest, draw, font_files

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
_RECIPE = 1  # raised with every change of what is drawn
_FEWEST, _MOST = 8, 256  # pixels of a side
_CHUNK_PIXELS = 1 << 18  # drawn at once: the intermediate results stay in the CPU's cache
_BITS = 8  # of a coordinate's fraction


def glyphs(
    samples: int = 60_000,
    test_samples: int = 10_000,
    size: int = 28,
    seed: int = 0,
    cache: str | None = None,
) -> tuple[Mapped | Images, Mapped | Images]:
    """Images of characters in the fonts that matplotlib ships.

    They are drawn once and kept as `.npy` files. Files that are damaged are drawn anew, with a
    warning; where they cannot be written, the images stay in memory, with a warning.

    Args:
        samples: of the training set.
        test_samples: of the test set.
        size: height and width, 8 … 256 pixels.
        seed: of everything random, whatever the job's seed is.
        cache: folder for the files; by default hvdlarge in $XDG_CACHE_HOME, or in ~/.cache.

    Returns:
        Training and test set; inputs (n, 1, size, size) float32 in [0, 1], targets (n,) int64, the
        place in `CLASSES`.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed; names the extra to install.
        ValueError: for sizes out of range.
    """
    if min(samples, test_samples) < 1 or not _FEWEST <= size <= _MOST:
        raise ValueError(
            f"glyphs need at least 1 sample and {_FEWEST} to {_MOST} pixels, not "
            f"{samples, test_samples, size}"
        )
    files = font_files()
    recipe = f"{_RECIPE} {samples} {test_samples} {size} {seed} {digest(files)}"
    name = f"glyphs-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    folder = cache_folder(cache) / name
    if folder.exists():
        try:
            return _mapped(folder)
        except DataFileError as error:
            warnings.warn(f"glyphs are drawn anew: {error}", stacklevel=2)
    masters = _masters(files, size)
    train = draw_samples(masters, seed, 0, samples, size)
    test = draw_samples(masters, seed, 1, test_samples, size)
    try:
        _store(folder, (train, test))
        return _mapped(folder)
    except (OSError, DataFileError) as error:
        reason = getattr(error, "strerror", None) or error
        warnings.warn(
            f"glyphs stay in memory, since {folder} cannot be written: {reason}",
            stacklevel=2,
        )
        return Images.of(*train), Images.of(*test)


def _mapped(folder: Path) -> tuple[Mapped, Mapped]:
    train, test = npy(str(folder), verify=True)
    assert test is not None  # `_store` writes both
    return train, test


def _store(folder: Path, parts: tuple[tuple[np.ndarray, np.ndarray], ...]) -> None:
    """Write the files of a set; the folder is complete or absent, whoever else writes it."""
    temporary = folder.with_name(f"{folder.name}.{os.uname().nodename}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        names = []
        for part, (pixels, labels) in zip(PARTS, parts, strict=True):
            for name, array in (("inputs", pixels), ("targets", labels)):
                np.save(temporary / f"{part}_{name}.npy", array)
                names.append(f"{part}_{name}.npy")
        write_sums(temporary, names)
        if folder.exists():
            with contextlib.suppress(DataFileError):
                _mapped(folder)
                return  # just written by another process, with the same bytes
            damaged = temporary.with_suffix(".replaced")
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                os.rename(folder, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # no other process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _masters(files: list[Path], size: int) -> np.ndarray:
    """Every class in every font, uint8, shape (fonts · classes, side, side), side = 2 · size but
    at most 128.
    """
    side = min(2 * size, 128)
    return np.concatenate([draw(file, CLASSES, side) for file in files])


def draw_samples(
    masters: np.ndarray, seed: int, part: int, samples: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples 0 … `samples` − 1 of a part.

    Args:
        masters: the characters, shape (fonts · 47, side, side), with empty margins.
        seed: of everything random.
        part: 0 for training, 1 for the test.
        samples: to draw.
        size: height and width.

    Returns:
        Pixels, uint8, shape (samples, 1, size, size), and labels, int64, shape (samples,).
    """
    # The four pixels between which a point lies, in one word: one look-up in place of four
    side = masters.shape[1]
    wide = np.pad(masters, ((0, 0), (0, 1), (0, 1))).astype(np.uint32)
    quads = wide[:, :-1, :-1] | wide[:, :-1, 1:] << 8 | wide[:, 1:, :-1] << 16
    quads = (quads | wide[:, 1:, 1:] << 24).reshape(-1)
    pixels = np.empty((samples, 1, size, size), dtype=np.uint8)
    step = max(1, _CHUNK_PIXELS // size**2)
    for start in range(0, samples, step):
        numbers = np.arange(start, min(start + step, samples))
        keys = [seeds.keys(seed, seeds.DATA, part, numbers, purpose) for purpose in range(3)]
        glyph = _fields(keys[0], 1)[:, 0] * (len(masters) // len(CLASSES)) >> 16
        glyph = glyph * len(CLASSES) + numbers % len(CLASSES)
        coverage = _sampled(quads, glyph, _transforms(keys[1], side, size), side, size)
        pixels[start : start + len(numbers), 0] = _shaded(coverage, keys[0], keys[2])
    return pixels, np.arange(samples, dtype=np.int64) % len(CLASSES)


def _fields(keys: np.ndarray, streams: int) -> np.ndarray:
    """Random integers 0 … 65535, int64, shape (n, 4 · streams)."""
    words = [seeds.mix(keys + np.uint64(stream)) for stream in range(streams)]
    parts = [
        word >> np.uint64(shift) & np.uint64(0xFFFF) for word in words for shift in (0, 16, 32, 48)
    ]
    return np.stack(parts, axis=1).astype(np.int64)


def _transforms(keys: np.ndarray, side: int, size: int) -> np.ndarray:
    """For each sample the affine map from a pixel to a point of its master, as integers of `_BITS`
    bits fraction, shape (n, 6): u = a·x + b·y + c and v = d·x + e·y + f.
    """
    unit = (_fields(keys, 2)[:, :7] - 32768) / 32768  # in [−1, 1)
    half_angle = unit[:, 0] * 0.16  # tangent of half the rotation, up to 18 degrees
    scale = 1 - unit[:, 1] * 0.25
    aspect = 1 + unit[:, 2] * 0.15
    shear = unit[:, 3] * 0.3
    square = half_angle * half_angle
    cosine, sine = (1 - square) / (1 + square), (half_angle + half_angle) / (1 + square)
    zoom = side / size / scale
    wide, high = zoom / aspect, zoom * aspect
    a, b = wide * cosine, wide * (shear * cosine - sine)
    d, e = high * sine, high * (shear * sine + cosine)
    # The image's middle, moved at random, shows the master's middle
    middle = (size - 1) / 2
    x, y = middle + unit[:, 4] * (size * 0.1), middle + unit[:, 5] * (size * 0.1)
    c = (side - 1) / 2 - a * x - b * y
    f = (side - 1) / 2 - d * x - e * y
    return np.rint(np.stack([a, b, c, d, e, f], axis=1) * 2**16).astype(np.int32)


def _sampled(
    quads: np.ndarray, glyph: np.ndarray, transforms: np.ndarray, side: int, size: int
) -> np.ndarray:
    """Masters at the points of the transforms, between their pixels by linear interpolation: int32
    0 … 255, shape (n, size, size).
    """
    grid = np.arange(size, dtype=np.int32)

    def coordinate(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        along_x = row[:, 0, None, None] * grid
        along_y = (row[:, 1, None] * grid + row[:, 2, None])[:, :, None]
        fixed = (along_x + along_y) >> (16 - _BITS)
        np.clip(fixed, 0, (side - 1) << _BITS, out=fixed)  # the margins are empty
        return fixed >> _BITS, fixed & (2**_BITS - 1)

    (u, right), (v, down) = coordinate(transforms[:, :3]), coordinate(transforms[:, 3:])
    place = v * side
    place += u
    place += (glyph * side**2).astype(np.int32)[:, None, None]
    four = quads.take(place).view(np.int32)
    top = (four & 255) * (256 - right) + (four >> 8 & 255) * right
    bottom = (four >> 16 & 255) * (256 - right) + (four >> 24 & 255) * right
    return (top * (256 - down) + bottom * down) >> 16


def _shaded(coverage: np.ndarray, keys: np.ndarray, noise_keys: np.ndarray) -> np.ndarray:
    """Images with random grey levels and noise: uint8, shape (n, size, size)."""
    count, size, _ = coverage.shape
    fields = _fields(keys, 1)
    contrast = 48 + (fields[:, 1] * 160 >> 16)
    dark = fields[:, 2] * (256 - contrast) >> 16
    inverted = (fields[:, 3] & 1).astype(bool)
    ground = np.where(inverted, dark + contrast, dark).astype(np.int32)
    ink = np.where(inverted, -contrast, contrast).astype(np.int32)
    level = 8 + (fields[:, 3] >> 1) % 57  # of the noise; its standard deviation is 0.41 of it
    # Two random bytes per pixel: their sum has a triangular distribution around 255
    words = -(-(size * size) // 4)
    counters = np.arange(words, dtype=np.uint64)
    bits = seeds.mix(noise_keys[:, None] + counters).astype("<u8", copy=False).view("<u2")
    bits = bits[:, : size * size].reshape(count, size, size).astype(np.int32)
    noise = (bits & 255) + (bits >> 8) - 255
    values = coverage * ink[:, None, None]
    values += noise * level.astype(np.int32)[:, None, None]
    values >>= 8
    values += ground[:, None, None]
    return np.clip(values, 0, 255, out=values).astype(np.uint8)
