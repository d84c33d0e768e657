"""Errors of user code as text, with the user's own line."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch


def describe(error: BaseException) -> str:
    """An error of user code as text: type, message, its line in user code, and the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))] or frames
    place = f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
    full = "".join(traceback.format_exception(error)).rstrip()
    return f"{type(error).__name__}: {error}{place}\n{full}"
