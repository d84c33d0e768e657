"""Files that hold weights and nothing of a run: `.safetensors`, and what `torch.save` writes.

Contract: reading runs no code of the file, and a file that is damaged or cut short is an error.
          Writing is complete or absent: the file gets its name once it is on the disk.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hvdlarge.exits import CheckpointWriteError, JobError

SAFETENSORS = ".safetensors"
_NEEDED = "needs safetensors: pip install 'hvdlarge[safetensors]'"
_SHOWN = 5


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors of a file, on the CPU, and the extra state that a state_dict may hold, by name.

    Args:
        path: of a .safetensors file, a state_dict, or a checkpoint: a mapping whose `model` is a
            state_dict.

    Raises:
        JobError: if there is no such file, it cannot be read, or it holds something else.
    """
    try:
        with path.open("rb"):
            pass
        read = _read_safetensors if path.suffix == SAFETENSORS else _read_torch
        return read(path)
    except FileNotFoundError:
        raise JobError(
            f"there is no such file on the host of rank 0\n  {path.absolute()}"
        ) from None
    except IsADirectoryError:
        raise JobError(
            "it is a folder: name a file, such as checkpoints/best.pt of a run folder"
        ) from None
    except OSError as error:
        raise JobError(f"it cannot be read: {error.strerror or error}") from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise JobError(f"to read {SAFETENSORS} {_NEEDED}") from None
    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise JobError(
            f"it is damaged, cut short, or no safetensors file\n  {_short(error)}"
        ) from None


def _read_torch(path: Path) -> dict[str, Any]:
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise JobError(f"it is damaged: the checksum of {damaged} in it is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except JobError:
        raise
    except pickle.UnpicklingError as error:
        if is_zip:
            raise JobError(
                "it holds more than tensors and builtins: write its state_dict anew with "
                f"torch.save\n  {_short(error)}"
            ) from None
        raise JobError("it is damaged, cut short, or no file of torch.save") from None
    # torch raises a dozen kinds of exception for damaged files, KeyError among them
    except Exception as error:
        raise JobError(
            f"it is damaged, cut short, or no file of torch.save\n  {_short(error)}"
        ) from None
    return _state_dict(content)


def _state_dict(content: Any) -> dict[str, Any]:
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise JobError(f"it holds a {type(content).__name__} and no state_dict")
    if unnamed := [name for name in content if not isinstance(name, str)]:
        raise JobError(f"it holds no state_dict: {unnamed[0]!r} is not a name of a tensor")
    others = [
        str(name)
        for name, value in content.items()
        if not (isinstance(value, torch.Tensor) or str(name).endswith("_extra_state"))
    ]
    if others or not content:
        shown = ", ".join(others[:_SHOWN]) or "nothing"
        raise JobError(
            "it holds no state_dict: write the state_dict alone, or as `model` of a mapping\n"
            f"  it holds {shown}"
        )
    return dict(content)


def write_weights(path: Path, state: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write a state_dict, atomically.

    Args:
        path: a name that ends with .safetensors or .pt; a .pt file holds a mapping of `model`, the
            state_dict, and `metadata`.
        state: tensors on the CPU and, for a .pt file only, extra state.
        metadata: strings that are kept with them.

    Raises:
        JobError: if the format cannot hold the state, or safetensors is not installed.
        CheckpointWriteError: if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    write = _safetensors_writer(state, metadata) if path.suffix == SAFETENSORS else None
    try:
        if write is not None:
            write(temporary)
        else:
            torch.save({"model": dict(state), "metadata": dict(metadata)}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # safetensors and torch raise errors of their own for a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointWriteError.of(
            str(path), path.parent, error, "the checkpoint is untouched"
        ) from None


def _safetensors_writer(state: Mapping[str, Any], metadata: Mapping[str, str]) -> Any:
    """A function of the path that writes the file."""
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        raise JobError(f"to write {SAFETENSORS} {_NEEDED}; or name a .pt file") from None
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.dtype == torch.complex128:
            kind = value.dtype if isinstance(value, torch.Tensor) else "extra state"
            raise JobError(f"{SAFETENSORS} cannot hold {name!r}, which is {kind}: name a .pt file")
    # The format refuses tensors that share memory, as tied weights may
    own = {name: value.detach().contiguous().clone() for name, value in state.items()}
    return lambda path: save_file(own, path, metadata=dict(metadata))


def _short(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0][:100]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
