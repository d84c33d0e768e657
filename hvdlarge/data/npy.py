"""Data sets in numpy's own files, memory-mapped: they may be larger than memory, and the processes
of a host share what they have read.

A folder holds train_inputs.npy and train_targets.npy, and may hold test_inputs.npy and
test_targets.npy; `hvdlarge pack` writes them from any data set.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hvdlarge.data.files import SUMS, DataFileError, check_sums, find
from hvdlarge.data.images import scaled
from hvdlarge.data.in_memory import InMemory, rows

PARTS = ("train", "test")


class Mapped(InMemory):
    """A data set of two memory-mapped files; other processes that it is sent to map them anew.

    Args:
        inputs: path of an array of shape (n, …).
        targets: path of an array of shape (n, …).
        scale_bytes: whether inputs of bytes become float32, divided by 255.

    Raises:
        DataFileError: for a file that is damaged, too short or too long, empty, or holds no
            numbers; and if the lengths differ.
    """

    def __init__(self, inputs: Path, targets: Path, scale_bytes: bool = True) -> None:
        self._arguments = (inputs, targets, scale_bytes)
        mapped = [map_file(path) for path in (inputs, targets)]
        if len(mapped[0]) != len(mapped[1]):
            raise DataFileError(
                f"{inputs} holds {len(mapped[0]):,} samples, but {targets} {len(mapped[1]):,}"
            )
        super().__init__(*mapped)
        self._scales = scale_bytes and self.inputs.dtype == torch.uint8
        # What torch's losses take as class indices
        self._widens = not (self.targets.is_floating_point() or self.targets.is_complex()) and (
            self.targets.dtype not in (torch.int64, torch.bool)
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.inputs[index].clone(), self.targets[index].clone()
        return scaled(inputs) if self._scales else inputs, self._indices(targets)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the samples `indices`, shape (n,)."""
        targets = self._indices(rows(self.targets, indices))
        if self._scales:
            return scaled(torch.index_select(self.inputs, 0, indices)), targets
        return rows(self.inputs, indices), targets

    def as_bytes(self) -> InMemory:
        """The same samples with their inputs as the file holds them."""
        return Mapped(*self._arguments[:2], scale_bytes=False)

    def _indices(self, targets: torch.Tensor) -> torch.Tensor:
        return targets.long() if self._widens else targets

    def __reduce__(self) -> tuple[Callable[..., Mapped], tuple[Path, Path, bool]]:
        return Mapped, self._arguments


def npy(
    folder: str, scale_bytes: bool = True, verify: bool = False
) -> tuple[Mapped, Mapped | None]:
    """The `.npy` files of a folder, memory-mapped.

    Args:
        folder: with train_inputs.npy and train_targets.npy, and, where there is a test set,
            test_inputs.npy and test_targets.npy.
        scale_bytes: whether inputs of bytes, the pixels of images, become float32 in [0, 1].
        verify: read all files first and compare them with the folder's SHA256SUMS.

    Returns:
        Training set and test set, or None in its place; integer targets become int64.

    Raises:
        DataFileError: as `Mapped`; for a missing file; and for one that `verify` finds damaged.
    """
    top = Path(folder).expanduser()
    if verify and (missing := {f.name for f in top.glob("*.npy")} - set(check_sums(top))):
        raise DataFileError(f"{top / SUMS} lacks {', '.join(sorted(missing))}")
    train, test = (
        [find(top, [f"{part}_{name}.npy"]) for name in ("inputs", "targets")]
        if part == "train" or any(top.glob(f"{part}_*.npy"))
        else []
        for part in PARTS
    )
    training_set = Mapped(train[0], train[1], scale_bytes)
    return training_set, Mapped(test[0], test[1], scale_bytes) if test else None


def map_file(path: Path) -> torch.Tensor:
    """The array of a `.npy` file as a tensor, which is read from the disk as it is used.

    Raises:
        DataFileError: as `Mapped`.
    """
    try:
        # Copy-on-write: torch has no read-only tensors, and the file stays as it is
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        held = f"{path.stat().st_size:,} bytes" if path.is_file() else "nothing"
        raise DataFileError(
            f"{path} is no complete .npy file of numbers ({held}): {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(array, np.memmap):
        raise DataFileError(f"{path} is no .npy file, but an archive of them")
    expected = array.offset + array.nbytes
    if (size := path.stat().st_size) != expected:
        raise DataFileError(
            f"{path} must hold {expected:,} bytes, as its header says, but it holds {size:,}"
        )
    if array.ndim == 0 or array.size == 0:
        raise DataFileError(f"{path} is empty: its shape is {array.shape}")
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        raise DataFileError(
            f"{path} holds {array.dtype}, for which torch has few operations: int32 or int64 are "
            "expected"
        )
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):
        raise DataFileError(
            f"{path} holds {array.dtype}, which torch does not support: numbers in the byte order "
            "of this machine are expected"
        ) from None
