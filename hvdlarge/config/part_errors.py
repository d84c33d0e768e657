"""Errors of the parts that a job names: separate from the engine's own, the user's line first.

Contract: needs no torch, so that errors in a job can be reported at once.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary

from hvdlarge.exits import PartError

_ENGINE = Path(__file__).parents[1]
# The rooms with parts that a job may name: an error below user code in another one is the engine's
_PARTS = [str(_ENGINE / room) for room in ("models", "data", "evaluation")]
_CALLED = ("torch", "horovod", "mpi4py", "numpy", "pydantic", "yaml")  # by the engine itself
_FIRST_LINE = 128  # characters: with what stands before it, at most 200
_HEADING = "Traceback (most recent call last):"
_FRAME = re.compile(r'  File "(.+)", line (\d+), in (.+)')


def describe(error: BaseException) -> str:
    """An error of a part as text: on one line its type, message and line in user code, then the
    traceback without the engine's frames.
    """
    frames, summary = _frames_and_summary(error)
    if isinstance(error, PartError):
        return summary.partition(": ")[2]
    own = own_frames(frames)
    # The whole path and message stand in the traceback
    name = Path(own[-1].filename).name if own else ""
    place = f" ({name}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        summary = f"{type(error).__name__}: {error.msg}"
        place = f" ({Path(error.filename).name}, line {error.lineno})"
    first, length = summary.partition("\n")[0], max(40, _FIRST_LINE - len(place))
    shown = first if len(first) <= length else f"{first[: length - 1]}…"
    return f"{shown}{place}\n{_traceback(error)}"


def first_line(error: BaseException) -> str:
    """The first line of `describe`: for messages of one line."""
    return describe(error).partition("\n")[0]


def origin(error: BaseException) -> str | None:
    """Where an error arose, in words, if that is a part that the job names; None for an error of
    the engine itself.
    """
    if isinstance(error, PartError):
        return error.origin
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return "a loader process"  # which was ended from outside
    frames, _ = _frames_and_summary(error)
    if own := own_frames(frames):
        below = [frame for frame in frames[frames.index(own[-1]) :] if _layer(frame) == "engine"]
        return "your own code" if not below or _is_in(below[-1], _PARTS) else None
    for frame in frames:
        if frame.filename.endswith("torch/nn/modules/module.py"):
            return "the model or the loss"
        if "/torch/autograd/" in frame.filename:
            return "the backward pass"
        if frame.filename == str(_ENGINE / "data/loader.py") and frame.name == "__getitem__":
            return "the data set"
    return None


def own_frames(frames: Sequence[FrameSummary]) -> list[FrameSummary]:
    """The frames of user code below the engine's first; those of installed packages only where
    there are no others.
    """
    layers = [_layer(frame) for frame in frames]
    first = layers.index("engine") + 1 if "engine" in layers else 0
    for layer in ("own", "installed"):
        if own := [frame for frame in frames[first:] if _layer(frame) == layer]:
            return own
    return []


def _layer(frame: FrameSummary) -> str:
    """Whose code a frame is in: engine, called, installed, python or own."""
    modules = [sys.modules.get(name) for name in _CALLED]
    called = [str(Path(module.__file__).parent) for module in modules if module and module.__file__]
    installed, python = (
        [sysconfig.get_path(name) for name in names]
        for names in (("purelib", "platlib"), ("stdlib", "platstdlib"))
    )
    if frame.filename.startswith("<"):
        return "python"
    layers = {"engine": [str(_ENGINE)], "called": called, "installed": installed, "python": python}
    return next((layer for layer, folders in layers.items() if _is_in(frame, folders)), "own")


def _is_in(frame: FrameSummary, folders: Sequence[str]) -> bool:
    return any(frame.filename.startswith(folder + os.sep) for folder in folders)


def _frames_and_summary(error: BaseException) -> tuple[list[FrameSummary], str]:
    """The frames of an error, and its type and message; of one that a loader process raised those
    in the text of its traceback, which torch makes its message.
    """
    text = str(error.args[0]) if error.args else ""
    if not (text.startswith("Caught ") and f"\nOriginal {_HEADING}\n" in text):
        return list(traceback.extract_tb(error.__traceback__)), f"{type(error).__name__}: {error}"
    lines = text.rpartition(f"{_HEADING}\n")[2].splitlines()
    places = [_FRAME.fullmatch(line) for line in lines]
    frames = [FrameSummary(place[1], int(place[2]), place[3]) for place in places if place]
    end = next((n for n, line in enumerate(lines) if not line.startswith(" ")), len(lines))
    return frames, "\n".join(lines[end:]).strip()


def _traceback(error: BaseException) -> str:
    frames, summary = _frames_and_summary(error)
    if error.__traceback__ is None or frames != list(traceback.extract_tb(error.__traceback__)):
        return "".join([f"{_HEADING}\n", *traceback.format_list(_shown(frames)), summary])
    if isinstance(error, SyntaxError) and not own_frames(frames):  # it names its place itself
        return "".join(traceback.format_exception_only(error)).rstrip()
    whole = traceback.TracebackException.from_exception(error)
    link: traceback.TracebackException | None = whole
    while link is not None:
        link.stack = traceback.StackSummary.from_list(_shown(list(link.stack)))
        link = link.__cause__ or link.__context__
    return "".join(whole.format()).rstrip()


def _shown(frames: Sequence[FrameSummary]) -> list[FrameSummary]:
    """The frames from the first of user code on, without the engine's; all where there is none."""
    own = own_frames(frames)
    if not own:
        return list(frames)
    return [frame for frame in frames[frames.index(own[0]) :] if _layer(frame) != "engine"]
