"""Images in folders, one sub-folder per class, decoded by Pillow.

Contract: the number of samples is settled when the set is made, and its order is that of the sorted
          names of classes and files, on every rank. Images that cannot be decoded are named.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hvdlarge.data.files import DataFileError, cache_folder
from hvdlarge.data.images import scaled
from hvdlarge.exits import PartError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_CHOICES = ("stop", "refuse", "skip")
_SHOWN = 3


class UndecodableImage(PartError):
    """An image of the data set cannot be decoded."""

    origin = "the data set"


class ImageFolder(Dataset):
    """Images of files, all resized and cropped to one size when they are read.

    Args:
        files: of the images.
        targets: their classes, shape (n,), int64.
        size: height and width of the samples.
        resize: length of the shorter side before the middle is cropped.
        scale_bytes: whether samples are float32 in [0, 1] or bytes.

    Samples are pairs: RGB of shape (3, size, size), and the class as an integer.
    """

    def __init__(
        self,
        files: Sequence[Path],
        targets: np.ndarray,
        size: int,
        resize: int,
        scale_bytes: bool = True,
    ) -> None:
        # An array: a list of a million paths would be copied into every loader process
        self._files = np.array([str(file) for file in files], dtype=np.str_)
        self.targets = targets
        self._size, self._resize, self._scales = size, resize, scale_bytes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = str(self._files[index])
        try:
            pixels = torch.from_numpy(decode(path, self._size, self._resize))
        except _decoding_errors() as error:
            if not _is_damaged(error):
                raise
            raise UndecodableImage(
                f"{path} cannot be decoded: {_reason(error)} (undecodable: skip in data.args "
                "leaves such images out)"
            ) from None
        return scaled(pixels) if self._scales else pixels, int(self.targets[index])

    def as_bytes(self) -> ImageFolder:
        """The same samples with their bytes as inputs."""
        other = ImageFolder([], self.targets, self._size, self._resize, scale_bytes=False)
        other._files = self._files
        return other


def image_folder(
    folder: str,
    size: int = 224,
    resize: int | None = None,
    train: str = "train",
    test: str | None = "val",
    undecodable: str = "stop",
    cache: str | None = None,
) -> tuple[ImageFolder, ImageFolder | None]:
    """The images below a folder: `train`/CLASS/FILE and `test`/CLASS/FILE.

    A class's index is its place in the sorted names of the sub-folders of `train`. Files are those
    whose names end as images' do; hidden ones are left out.

    Args:
        folder: that holds both parts.
        size: height and width of the samples, cropped from the middle.
        resize: length of the shorter side before that; by default size · 8 / 7, as 256 for 224.
        train: sub-folder of the training set.
        test: sub-folder of the test set; None: there is none.
        undecodable: what happens with images that cannot be decoded. "stop": the first one that is
            read ends the run. "refuse" and "skip" decode all images first, and keep what they found
            in the cache: then "refuse" ends the run before it begins, and "skip" leaves such images
            out, with a warning.
        cache: folder for what was found; by default hvdlarge in $XDG_CACHE_HOME, or in ~/.cache.

    Returns:
        Training and test set; inputs (3, size, size) float32 in [0, 1], targets integers.

    Raises:
        ModuleNotFoundError: if Pillow is not installed; names the extra to install.
        DataFileError: for a folder that is missing or holds no images, a class of the test set
            that has no training images, and images that are refused.
        ValueError: for a size below 1 or an unknown choice.
    """
    _require_pillow()
    resize = round(size * 8 / 7) if resize is None else resize
    if not 1 <= size <= resize:
        raise ValueError(f"size must be at least 1 and resize at least size, not {size, resize}")
    if undecodable not in _CHOICES:
        raise ValueError(f"undecodable is one of {', '.join(_CHOICES)}, not {undecodable!r}")
    top = Path(folder).expanduser()
    classes = _sub_folders(top / train)
    sets = []
    for part in (train, test):
        if part is None:
            continue
        files, targets = list_images(top / part, classes)
        if undecodable != "stop":
            wrong = _undecodable(files, size, resize, cache_folder(cache))
            _report(top / part, files, wrong, undecodable)
            kept = np.setdiff1d(np.arange(len(files)), wrong)
            files, targets = [files[index] for index in kept], targets[kept]
        sets.append(ImageFolder(files, targets, size, resize))
    return sets[0], sets[1] if len(sets) == 2 else None


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "image_folder needs Pillow, which is not installed: pip install 'hvdlarge[images]'"
        ) from None


def _sub_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataFileError(
            f"there is no folder {folder.absolute()}: it must hold a folder of images per class"
        )
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataFileError(f"{folder} holds no folders: one per class is expected")
    return names


def list_images(folder: Path, classes: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """The image files of a part, sorted by class and name, and their classes, shape (n,), int64.

    Raises:
        DataFileError: if there are none, or a sub-folder is none of the classes.
    """
    files: list[Path] = []
    targets: list[int] = []
    indices = {name: index for index, name in enumerate(classes)}
    for name in _sub_folders(folder):
        if name not in indices:
            raise DataFileError(
                f"{folder / name} is none of the {len(classes)} classes, the folders of the "
                "training set"
            )
        with os.scandir(folder / name) as entries:
            found = sorted(e.name for e in entries if _is_image(e.name) and e.is_file())
        files += [folder / name / file for file in found]
        targets += [indices[name]] * len(found)
    if not files:
        raise DataFileError(
            f"{folder} holds no images: files named *{', *'.join(_SUFFIXES)} are expected in its "
            "sub-folders"
        )
    return files, np.array(targets, dtype=np.int64)


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def decode(path: str | Path, size: int, resize: int) -> np.ndarray:
    """An image whose shorter side is resized to `resize`, and whose middle is cropped.

    Returns:
        uint8, shape (3, size, size); grey images, and those with a palette or transparency, become
        RGB.

    Raises:
        one of `_decoding_errors()`: if it cannot be decoded.
    """
    from PIL import Image

    with Image.open(path) as image:
        picture = image.convert("RGB")
    shorter = min(picture.size)
    width, height = (max(size, round(side * resize / shorter)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    picture = picture.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _decoding_errors() -> tuple[type[Exception], ...]:
    from PIL import Image

    # What Pillow's decoders raise for damaged files
    return (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        IndexError,
        EOFError,
        OverflowError,
        Image.DecompressionBombError,
    )


def _is_damaged(error: Exception) -> bool:
    """Whether a file's content is the cause, and not the system: its errors have a number."""
    return getattr(error, "errno", None) is None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _undecodable(files: list[Path], size: int, resize: int, cache: Path) -> list[int]:
    """Positions of the files that cannot be decoded; looked up in the cache if the same files, by
    name, size and time, were decoded before.
    """
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.absolute()} {status.st_size} {status.st_mtime_ns}\n".encode())
    record = cache / f"decoded-{digest.hexdigest()[:32]}.json"
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if all(type(place) is int and 0 <= place < len(files) for place in known):
            return known
    except (OSError, ValueError, TypeError):
        pass

    def fails(file: Path) -> bool:
        try:
            decode(file, size, resize)
        except _decoding_errors() as error:
            if not _is_damaged(error):
                raise
            return True
        return False

    with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
        wrong = [place for place, bad in enumerate(pool.map(fails, files)) if bad]
    _keep(record, wrong)
    return wrong


def _keep(record: Path, wrong: Any) -> None:
    temporary = record.with_suffix(f".{os.uname().nodename}.{os.getpid()}.partial")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(wrong), encoding="utf-8")
        os.replace(temporary, record)
    except OSError as error:
        warnings.warn(
            f"{record} cannot be written ({error.strerror}): the images will be decoded again",
            stacklevel=2,
        )


def _report(folder: Path, files: list[Path], wrong: list[int], undecodable: str) -> None:
    if not wrong:
        return
    names = ", ".join(str(files[place]) for place in wrong[:_SHOWN])
    more = f" and {len(wrong) - _SHOWN:,} more" if len(wrong) > _SHOWN else ""
    message = (
        f"{len(wrong):,} of the {len(files):,} images in {folder} cannot be decoded: {names}{more}"
    )
    if undecodable == "refuse":
        raise DataFileError(message)
    if len(wrong) == len(files):
        raise DataFileError(f"{message}: nothing is left")
    warnings.warn(f"{message}; they are left out", stacklevel=2)
