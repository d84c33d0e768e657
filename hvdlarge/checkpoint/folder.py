"""Checkpoint files: written atomically, listed with their SHA-256, verified before they are loaded.

A checkpoint is a dict of tensors and builtins, so `torch.load(weights_only=True)` accepts it and it
cannot run code; its `model` is a plain state_dict. It is written to a temporary file, flushed to
disk, renamed and listed in SHA256SUMS (the format of `sha256sum -c`); only then are older ones
removed. Before a checkpoint is replaced by one of the same name, its entry leaves the list; until
the new entry is written, the checksums inside the file are verified instead. So the folder holds a
complete checkpoint at every moment, and if the newest is damaged, the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from hvdlarge.exits import CheckpointError, CheckpointWriteError

FORMAT = 1
_NAME = re.compile(r"step_(\d{9,})\.pt")
_LIST = "SHA256SUMS"


class CheckpointWriter(Protocol):
    """The interface through which a saver writes."""

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `finish` raises its error."""
        ...

    def save(
        self,
        content: dict[str, Any],
        step: int,
        best: bool,
        wait: bool,
        also_keep: int | None = None,
    ) -> None:
        """Write a checkpoint; see `CheckpointFolder.save`."""
        ...

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; see `CheckpointFolder.finish`."""
        ...


class NoCheckpoints:
    """Writes nothing: for ranks other than 0, and for benchmarks."""

    failed = False

    def save(
        self,
        content: dict[str, Any],
        step: int,
        best: bool,
        wait: bool,
        also_keep: int | None = None,
    ) -> None:
        """Write nothing."""

    def finish(self) -> None:
        """Return at once."""


class CheckpointFolder:
    """The checkpoints of one run. Rank 0 only.

    Args:
        folder: their directory, created with the first of them.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._writer: threading.Thread | None = None
        self._failure: CheckpointWriteError | None = None
        self._damaged: set[str] = set()  # file names that `newest_good` skipped

    # --- writing

    def save(
        self,
        content: dict[str, Any],
        step: int,
        best: bool,
        wait: bool,
        also_keep: int | None = None,
    ) -> None:
        """Write a checkpoint, in a thread.

        Args:
            content: builtins, and tensors on the CPU that nothing else modifies.
            step: steps taken.
            best: whether to link it as best.pt too.
            wait: whether to return only when it is on disk; else training continues meanwhile.
            also_keep: the step of a checkpoint to keep in addition to the newest ones.

        Raises:
            CheckpointWriteError: if this one (with `wait`) or the previous one could not be
                written; existing checkpoints are untouched.
        """
        self.finish()
        self._writer = threading.Thread(
            target=self._write, args=(content, step, best, also_keep), name="checkpoint"
        )
        self._writer.start()
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            CheckpointWriteError: if it could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `finish` raises its error."""
        return self._failure is not None

    def _write(self, content: dict[str, Any], step: int, best: bool, also_keep: int | None) -> None:
        name = f"step_{step:09d}.pt"
        path = self.folder / name
        temporary = self.folder / f".{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.part"):  # of a writer that was killed
                leftover.unlink()
            with temporary.open("wb") as file:
                torch.save({"format": FORMAT, **content}, file)
                file.flush()
                os.fsync(file.fileno())
            digest = file_sha256(temporary)
            self._remove_from_list({name})  # its checksum is that of the file replaced next
            os.replace(temporary, path)
            self._damaged.discard(name)
            self._link("last.pt", path)
            if best:
                self._link("best.pt", path)
            self._write_list({**self.listed(), name: digest})
            self._remove_old(step, also_keep)
        except BaseException as error:  # of any kind: it would be lost with this thread
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._failure = CheckpointWriteError.of(
                f"the checkpoint {path}", self.folder, error, "the last good one is untouched"
            )

    def _link(self, name: str, path: Path) -> None:
        """Make `name` a hard link to the file, atomically."""
        temporary = self.folder / f".{name}.part"
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, self.folder / name)

    def _write_list(self, digests: dict[str, str]) -> None:
        temporary = self.folder / f".{_LIST}.part"
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{digests[name]}  {name}\n" for name in sorted(digests))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / _LIST)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _remove_from_list(self, names: set[str]) -> None:
        digests = self.listed()
        if names & digests.keys():
            self._write_list({name: digests[name] for name in digests if name not in names})

    def _remove_old(self, step: int, also_keep: int | None) -> None:
        """Remove checkpoints up to `step`, except the newest `keep` undamaged ones and `also_keep`.

        Those above `step` are all damaged and are left alone.
        """
        up_to_step = [path for path in self.newest_first() if _step_of(path) <= step]
        newest = [path for path in up_to_step if path.name not in self._damaged][: self._keep]
        self._remove(
            [path for path in up_to_step if path not in newest and _step_of(path) != also_keep]
        )

    def remove_above(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a rollback has discarded."""
        self._remove([path for path in self.newest_first() if _step_of(path) > step])

    def _remove(self, paths: list[Path]) -> None:
        self._remove_from_list({path.name for path in paths})
        for path in paths:
            path.unlink(missing_ok=True)

    # --- reading

    def newest_first(self) -> list[Path]:
        """The checkpoints in descending order of step, without the links last.pt and best.pt."""
        paths = [path for path in self.folder.glob("step_*.pt") if _NAME.fullmatch(path.name)]
        return sorted(paths, key=_step_of, reverse=True)

    def listed(self) -> dict[str, str]:
        """SHA-256 by file name; empty if the list is missing or unreadable."""
        try:
            lines = (self.folder / _LIST).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        pairs = (line.split("  ", 1) for line in lines)
        return {pair[1]: pair[0] for pair in pairs if len(pair) == 2 and _NAME.fullmatch(pair[1])}

    def newest_good(
        self, up_to: int | None = None
    ) -> tuple[Path, dict[str, Any], list[str]] | None:
        """The newest checkpoint that can be read.

        Args:
            up_to: ignore checkpoints of later steps; None: consider all.

        Returns:
            Its path, its content, and the problem of each newer one that was skipped; None if there
            are no checkpoints.

        Raises:
            CheckpointError: if there are checkpoints but none can be read.
        """
        problems: list[str] = []
        for path, content, problem in self._read_all(up_to):
            if content is not None:
                return path, content, problems
            problems.append(problem)
            self._damaged.add(path.name)
        if problems:
            raise CheckpointError(
                "\n".join(
                    [
                        "no checkpoint of this run can be read:",
                        *(f"  {problem}" for problem in problems),
                    ]
                )
            )
        return None

    def read(self, name: str) -> dict[str, Any]:
        """Verify and load one checkpoint.

        Args:
            name: of the file; a link such as best.pt is verified by the SHA-256 of the checkpoint
                that it links to while that is kept, and then by the checksums inside the file.

        Raises:
            CheckpointError: as `read_checkpoint`.
        """
        path, listed = self.folder / name, self.listed()
        digest = listed.get(name)
        if digest is None and path.is_file():
            own = file_sha256(path)
            digest = own if own in listed.values() else None
        return read_checkpoint(path, digest)

    def _read_all(self, up_to: int | None) -> Iterator[tuple[Path, dict[str, Any] | None, str]]:
        listed = self.listed()
        for path in self.newest_first():
            if up_to is not None and _step_of(path) > up_to:
                continue
            try:
                yield path, read_checkpoint(path, listed.get(path.name)), ""
            except CheckpointError as error:
                yield path, None, str(error)


def read_checkpoint(path: Path, sha256: str | None) -> dict[str, Any]:
    """Verify and load a checkpoint onto the CPU.

    Args:
        path: the file.
        sha256: from the list; None if the file is not listed (the run was killed just after the
            rename, or the list is lost): then the checksums inside the file are verified.

    Raises:
        CheckpointError: if the file is damaged, not a checkpoint, or of another format.
    """
    try:
        if sha256 is not None:
            if file_sha256(path) != sha256:
                raise CheckpointError(f"{path}: damaged: its SHA-256 differs from that in {_LIST}")
        else:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path}: damaged: the checksum of {damaged} in it is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    # torch raises a dozen kinds of exception for damaged files, KeyError among them
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})"
        ) from None
    if not (isinstance(content, dict) and isinstance(content.get("model"), dict)):
        raise CheckpointError(f"{path}: not a checkpoint of this engine")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: its format is {content.get('format')!r}, this version reads {FORMAT}"
        )
    return content


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
