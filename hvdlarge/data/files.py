"""Finds and reads the files of a data set, and says what is wrong with one that is not as it must
be.

Contract: every error names the file and what was expected there.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

SUMS = "SHA256SUMS"
_BLOCK = 1 << 22


class DataFileError(ValueError):
    """A file of a data set is missing, or is not what it must be."""


def find(folder: str | Path, names: Sequence[str], subfolders: Sequence[str] = ()) -> Path:
    """The first of some files that exists in a folder, or in one of its subfolders.

    Args:
        folder: as the job names it; `~` is the home folder.
        names: of the file, the official one first.
        subfolders: where else to look, relative to the folder.

    Raises:
        DataFileError: if there is none; says which were looked for, and where.
    """
    top = Path(folder).expanduser()
    places = [top, *(top / subfolder for subfolder in subfolders)]
    for place in places:
        for name in names:
            if (place / name).is_file():
                return place / name
    if not top.is_dir():
        raise DataFileError(f"there is no folder {top.absolute()}: {names[0]} is expected in it")
    also = f" (or {', '.join(names[1:])})" if names[1:] else ""
    raise DataFileError(
        f"there is no file {names[0]}{also} in {' or '.join(str(p.absolute()) for p in places)}"
    )


def read(path: Path, limit: int) -> bytes:
    """The bytes of a file, unpacked if its name ends with .gz; of a longer file, `limit` + 1.

    Raises:
        DataFileError: if it cannot be read or unpacked.
    """
    try:
        with _open(path) as file:
            return file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataFileError(f"{path} cannot be read: {reason}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def cache_folder(named: str | None) -> Path:
    """The folder for what can be made again: the named one, or the user's."""
    if named is not None:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "hvdlarge"


def wrong_length(path: Path, content: bytes, expected: int, of: str) -> DataFileError:
    """The error for a file that is shorter or longer than it must be.

    Args:
        path: of the file.
        content: as `read` gives it with the limit `expected`.
        expected: bytes.
        of: what so many bytes are, in words.
    """
    held = f"only {len(content):,}" if len(content) < expected else "more"
    return DataFileError(f"{path} must hold {expected:,} bytes, {of}, but it holds {held}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write SHA256SUMS, which `sha256sum -c` reads too; it is complete or absent."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
    temporary = folder / f"{SUMS}.{os.getpid()}.partial"
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, folder / SUMS)


def check_sums(folder: Path) -> list[str]:
    """Compare the files of a folder with its SHA256SUMS; returns their names.

    Raises:
        DataFileError: if SHA256SUMS is missing or damaged, or a file is missing or has another
            digest.
    """
    listed = find(folder, [SUMS])
    lines = read(listed, _BLOCK).decode("utf-8", "replace").splitlines()
    names = []
    for line in lines:
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or "/" in name:
            raise DataFileError(f"{listed} is damaged: 'SHA-256  file' is expected in each line")
        try:
            found = sha256(folder / name)
        except OSError as error:
            raise DataFileError(f"{folder / name} cannot be read: {error.strerror}") from None
        if found != digest:
            raise DataFileError(
                f"{folder / name} is damaged: its SHA-256 is not the one in {listed}"
            )
        names.append(name)
    if not names:
        raise DataFileError(f"{listed} is empty")
    return names
