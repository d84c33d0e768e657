"""Writes a data set to `.npy` files, piece by piece, so that an interrupted run continues where it
was.

Contract: the files get their names when all of them are complete and have been read back and
          compared with the digests of what was written. A piece written earlier counts only if its
          bytes still have the digest that was recorded for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hvdlarge.data.files import write_sums
from hvdlarge.data.image_folder import ImageFolder
from hvdlarge.data.images import Images
from hvdlarge.data.loader import LoadedMicroBatch, MicroBatchDataset, make_dataloader
from hvdlarge.data.npy import Mapped
from hvdlarge.data.samples import SampleError, SampleForm
from hvdlarge.exits import PartError, is_out_of_memory
from hvdlarge.schedule.batch import MicroBatch

PROGRESS = "packing.jsonl"
ORIGIN = "packed.json"
_PIECE_BYTES = 8 << 20
_FIELDS = ("inputs", "targets")
_HAS_BYTES: tuple[type, ...] = (Images, ImageFolder, Mapped)


class UnreadableSample(SampleError):
    """The data set's own code raised an error, which is the cause of this one."""


class Source(NamedTuple):
    """A data set to be packed, and how it is read."""

    dataset: Any
    form: SampleForm
    seed: int  # random draws of sample i are keyed by it
    num_workers: int = 0  # loader processes
    prefetch_factor: int = 2


class _Array:
    """One `.npy` file while it is written."""

    def __init__(self, folder: Path, name: str, rows: int, sample: np.ndarray) -> None:
        self.path = folder / f"{name}.npy"
        self.partial = folder / f"{name}.npy.partial"
        self.dtype, self.sample_shape = sample.dtype, sample.shape
        if self.path.exists():  # interrupted while the files got their names
            os.replace(self.path, self.partial)
        self._file = self.partial.open("r+b" if self.partial.exists() else "w+b")
        header = {
            "descr": np.lib.format.dtype_to_descr(sample.dtype),
            "fortran_order": False,
            "shape": (rows, *sample.shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
        self._start = self._file.tell()
        self._row_bytes = sample.nbytes

    def form(self) -> list[Any]:
        """Dtype and shape of a sample, for the record."""
        return [str(self.dtype), list(self.sample_shape)]

    def digest(self, piece: MicroBatch) -> str:
        """The SHA-256 of a piece in the file."""
        self._file.seek(self._start + piece.start * self._row_bytes)
        return hashlib.sha256(self._file.read(piece.size * self._row_bytes)).hexdigest()

    def cut(self, rows: int) -> None:
        """Keep the first rows."""
        self._file.truncate(self._start + rows * self._row_bytes)
        self._file.seek(0, os.SEEK_END)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.data)
        self._file.flush()

    def sync(self) -> None:
        """Wait until the disk has it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def pack(
    parts: Mapping[str, Source],
    folder: Path,
    origin: Mapping[str, Any],
    report: Callable[[str, int, int], None],
) -> list[str]:
    """Write data sets to a folder, or continue to.

    Args:
        parts: the data sets, by the beginning of their files' names: train, and test or nothing.
        folder: to write to; made if it does not exist.
        origin: what identifies the data sets; an interrupted run with another one starts again.
        report: called with the part, the samples written so far, and all samples.

    Returns:
        The names of the files, which are in SHA256SUMS.

    Raises:
        SampleError: if a sample cannot be read, is not a pair of two tensors, or differs from the
            first one in shape or dtype.
        FileExistsError: if the folder holds other files of these names.
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        finished = folder / f"{part}_inputs.npy"
        if finished.exists() and not (folder / f"{part}_{PROGRESS}").exists():
            raise FileExistsError(f"{finished} exists already")
    arrays: list[_Array] = []
    for part, source in parts.items():
        arrays += _pack_part(part, source, folder, origin, report)
    for array in arrays:
        os.replace(array.partial, array.path)
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    names = [*(array.path.name for array in arrays), ORIGIN]
    write_sums(folder, names)
    for part in parts:
        (folder / f"{part}_{PROGRESS}").unlink()
    return names


def _pack_part(
    part: str,
    source: Source,
    folder: Path,
    origin: Mapping[str, Any],
    report: Callable[[str, int, int], None],
) -> list[_Array]:
    samples = len(source.dataset)
    source = source._replace(dataset=_stored_form(source.dataset))
    first = next(_read(source, [MicroBatch(0, 0, 1)]))
    rows = max(1, _PIECE_BYTES // max(1, sum(values.nbytes for values in first)))
    pieces = [
        MicroBatch(number, start, min(start + rows, samples))
        for number, start in enumerate(range(0, samples, rows))
    ]
    arrays: list[_Array] = []
    try:
        for field, values in zip(_FIELDS, first, strict=True):
            arrays.append(_Array(folder, f"{part}_{field}", samples, values[0]))
        header = json.dumps([origin, samples, rows, [array.form() for array in arrays]])
        log = _Log(folder / f"{part}_{PROGRESS}", header)
        done = _intact(pieces, log.digests, arrays)
        log.cut(done)
        for array in arrays:
            array.cut(pieces[done - 1].stop if done else 0)
        report(part, pieces[done - 1].stop if done else 0, samples)
        for piece, read in zip(pieces[done:], _read(source, pieces[done:]), strict=True):
            _check_form(part, piece, read, arrays)
            for array, values in zip(arrays, read, strict=True):
                array.append(values)
            log.add([hashlib.sha256(values.data).hexdigest() for values in read])
            report(part, piece.stop, samples)
        for array in arrays:
            array.sync()
        if _intact(pieces, log.digests, arrays) != len(pieces):
            raise OSError(f"{folder}: what was written there reads back differently")
    finally:
        for array in arrays:
            array.close()
    return arrays


def _stored_form(dataset: Any) -> Any:
    """The data set whose inputs are the bytes of images, where it makes numbers of these."""
    return dataset.as_bytes() if type(dataset) in _HAS_BYTES else dataset


def _read(source: Source, pieces: list[MicroBatch]) -> Iterator[list[np.ndarray]]:
    """Inputs and targets of pieces of a data set, in order."""
    dataset = MicroBatchDataset(source.dataset, source.seed, shuffled=False, form=source.form)
    # Not in this process if there are others: what a set opens when it is read may not be sent
    workers = min(source.num_workers, len(pieces))
    for loaded in _reported(make_dataloader(dataset, pieces, workers, source.prefetch_factor)):
        pair = (loaded.inputs, loaded.targets)
        if wrong := [v for v in pair if not isinstance(v, torch.Tensor) or v.ndim < 1]:
            raise SampleError(
                "only pairs of one input and one target, a tensor or a number each, can be packed; "
                f"a batch has a {type(wrong[0]).__name__}"
            )
        if unknown := [v.dtype for v in pair if v.dtype == torch.bfloat16]:
            raise SampleError(f"numpy has no {unknown[0]}: it cannot be packed")
        yield [np.ascontiguousarray(values.cpu().numpy()) for values in pair]


def _reported(loader: Iterable[LoadedMicroBatch]) -> Iterator[LoadedMicroBatch]:
    """What a loader gives; errors of the data set as UnreadableSample, since those of the files
    that are written may be of the same class.
    """
    batches = iter(loader)
    while True:
        try:
            loaded = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if isinstance(error, PartError) or is_out_of_memory(error):
                raise
            raise UnreadableSample(f"a sample cannot be read: {error}") from error
        yield loaded


def _check_form(
    part: str, piece: MicroBatch, values: list[np.ndarray], arrays: list[_Array]
) -> None:
    for field, array, expected in zip(_FIELDS, values, arrays, strict=True):
        held = (array.dtype, array.shape[1:], len(array))
        wanted = (expected.dtype, expected.sample_shape, piece.size)
        if held != wanted:
            raise SampleError(
                f"the {part} {field} of samples {piece.start:,} to {piece.stop - 1:,} are "
                f"{held[2]:,} of {held[0]} and the shape {held[1]}; {wanted[2]:,} of {wanted[0]} "
                f"and the shape {wanted[1]}, as the first sample has it, are expected"
            )


def _intact(pieces: list[MicroBatch], digests: list[list[str]], arrays: list[_Array]) -> int:
    """How many pieces, from the first on, have their recorded digests."""
    for number, (piece, recorded) in enumerate(zip(pieces, digests, strict=False)):
        if [array.digest(piece) for array in arrays] != recorded:
            return number
    return min(len(pieces), len(digests))


class _Log:
    """The digests of the pieces written so far, one line each."""

    def __init__(self, path: Path, header: str) -> None:
        self._path = path
        self._header = header
        self.digests: list[list[str]] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines[:1] == [header]:
            with contextlib.suppress(ValueError):  # the last line may be incomplete
                for line in lines[1:]:
                    self.digests.append(json.loads(line))

    def cut(self, count: int) -> None:
        """Keep the first `count` pieces."""
        self.digests = self.digests[:count]
        lines = [self._header, *map(json.dumps, self.digests)]
        self._path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def add(self, digests: list[str]) -> None:
        """Record the digests of one more piece."""
        self.digests.append(digests)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(digests) + "\n")
