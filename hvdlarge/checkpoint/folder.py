"""Checkpoints: written whole or not at all, listed with their SHA-256, verified before anything in
them is read.

A checkpoint is a dict of tensors and builtins, so that `torch.load(weights_only=True)` accepts it
and none can run code; its `model` is the plain state_dict. It is written aside, flushed to disk,
renamed, then listed in SHA256SUMS (which `sha256sum -c` reads), and only then older ones are
removed. One that is written again under its name leaves the list before: until it is listed anew,
the checksums inside the file stand for it. So at every moment the folder holds a complete one, and
a damaged newest one falls back to the one before.
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
    """What a saver asks of a folder."""

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `finish` says why."""
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
    """Writes nothing: for the ranks that do not write, and for measurements."""

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
        """Nothing to wait for."""


class CheckpointFolder:
    """The checkpoints of one run. Rank 0 only.

    Args:
        folder: where they are; made when the first one is written.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._writer: threading.Thread | None = None
        self._failure: CheckpointWriteError | None = None
        self._damaged: set[str] = set()  # names of those that `newest_good` passed over

    # --- writing

    def save(
        self,
        content: dict[str, Any],
        step: int,
        best: bool,
        wait: bool,
        also_keep: int | None = None,
    ) -> None:
        """Write a checkpoint; with `wait` False its writing goes on beside the training.

        Args:
            content: tensors on the CPU that nobody changes any more, and builtins.
            step: steps taken.
            best: whether it is the best so far, and shall also be best.pt.
            wait: return when it is on disk.
            also_keep: the step of one that is kept though newer ones are enough.

        Raises:
            CheckpointWriteError: if it, or the one before it, cannot be written; what was there
                before is left alone.
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
        """Whether a checkpoint could not be written; `finish` says why."""
        return self._failure is not None

    def _write(self, content: dict[str, Any], step: int, best: bool, also_keep: int | None) -> None:
        name = f"step_{step:09d}.pt"
        path = self.folder / name
        aside = self.folder / f".{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*.part"):  # of a writer that was killed
                left.unlink()
            with aside.open("wb") as file:
                torch.save({"format": FORMAT, **content}, file)
                file.flush()
                os.fsync(file.fileno())
            digest = _sha256(aside)
            self._unlist({name})  # what is listed there is the sum of the one that goes now
            os.replace(aside, path)
            self._damaged.discard(name)
            self._point("last.pt", path)
            if best:
                self._point("best.pt", path)
            self._list({**self.listed(), name: digest})
            self._remove_old(step, also_keep)
        except BaseException as error:  # whatever it is: nobody else hears of what a thread raises
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            self._failure = CheckpointWriteError.of(
                f"the checkpoint {path}", self.folder, error, "the last good one is untouched"
            )

    def _point(self, name: str, path: Path) -> None:
        """Let `name` be another name of the file, without a moment in which it is missing."""
        aside = self.folder / f".{name}.part"
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, aside)
        os.replace(aside, self.folder / name)

    def _list(self, digests: dict[str, str]) -> None:
        aside = self.folder / f".{_LIST}.part"
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(f"{digests[name]}  {name}\n" for name in sorted(digests))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.folder / _LIST)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _unlist(self, names: set[str]) -> None:
        digests = self.listed()
        if names & digests.keys():
            self._list({name: digests[name] for name in digests if name not in names})

    def _remove_old(self, step: int, also_keep: int | None) -> None:
        """Keep the newest up to `step`, and that of `also_keep`.

        Damaged ones are not counted; all above `step` are damaged, and are left alone.
        """
        behind = [path for path in self.newest_first() if _step_of(path) <= step]
        kept = [path for path in behind if path.name not in self._damaged][: self._keep]
        self._remove([path for path in behind if path not in kept and _step_of(path) != also_keep])

    def remove_above(self, step: int) -> None:
        """Remove those of a way on which the run does not go any more."""
        self._remove([path for path in self.newest_first() if _step_of(path) > step])

    def _remove(self, paths: list[Path]) -> None:
        self._unlist({path.name for path in paths})
        for path in paths:
            path.unlink(missing_ok=True)

    # --- reading

    def newest_first(self) -> list[Path]:
        """The checkpoints by step, last.pt and best.pt (other names of some of them) left out."""
        found = [path for path in self.folder.glob("step_*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of, reverse=True)

    def listed(self) -> dict[str, str]:
        """SHA-256 by file name; empty where the list is missing or not readable."""
        try:
            lines = (self.folder / _LIST).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        pairs = (line.split("  ", 1) for line in lines)
        return {pair[1]: pair[0] for pair in pairs if len(pair) == 2 and _NAME.fullmatch(pair[1])}

    def newest_good(
        self, up_to: int | None = None
    ) -> tuple[Path, dict[str, Any], list[str]] | None:
        """The newest checkpoint that is whole: its path, its content, and what is wrong with those
        passed over.

        Args:
            up_to: a step; those above are not looked at.

        Returns:
            None where there is no such checkpoint at all.

        Raises:
            CheckpointError: if there are some and none is whole.
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
                        "no checkpoint of this run is whole:",
                        *(f"  {problem}" for problem in problems),
                    ]
                )
            )
        return None

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
    """The content of a checkpoint, on the CPU.

    Args:
        path: the file.
        sha256: what it is listed with; None if it is not listed (it was renamed just before the run
            was killed, or the list is lost): then the checksums inside the file are checked.

    Raises:
        CheckpointError: if it is not whole, not a checkpoint, or of another format.
    """
    try:
        if sha256 is not None:
            if _sha256(path) != sha256:
                raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one in {_LIST}")
        else:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise CheckpointError(
                    f"{path}: damaged: the checksum of its part {broken} is wrong"
                )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    # torch answers damage with a dozen kinds of exception, KeyError among them
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
