"""Errors of user code, as messages for the user."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hvdlarge.exits import JobError, RunExit, is_out_of_memory


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn errors of user code in the `with` block into JobError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunExit) or is_out_of_memory(error):
            raise
        raise JobError(
            f"model.name: {what} does not go through model and loss: {describe(error)}"
        ) from None


@contextmanager
def reading_samples(what: str) -> Iterator[None]:
    """Turn errors in the `with` block, which reads the first samples of `what`, into JobError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunExit) or is_out_of_memory(error):
            raise
        raise JobError(
            f"data.name: the first samples of the {what} cannot be read: {describe(error)}"
        ) from None


def describe(error: BaseException) -> str:
    """An error of user code as text: type, message, its line in user code, and the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))] or frames
    place = f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
    full = "".join(traceback.format_exception(error)).rstrip()
    return f"{type(error).__name__}: {error}{place}\n{full}"
