"""Writes the result of a run, whole or not at all.

A checkpoint is a dict of tensors and builtins, so that `torch.load(weights_only=True)` accepts it; its `model` is the plain
state_dict of the model. It is written aside, flushed to disk and renamed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from hvdlarge.exits import CannotSave


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path`. Rank 0 only.

    Raises:
        CannotSave: if it cannot be written; what was there before is left alone.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise CannotSave(f"{path} could not be written ({error}); {free:,} bytes are free there") from None
