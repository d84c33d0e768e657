"""Prints messages for the user, each in one write, flushed at once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def print_status(text: str) -> None:
    """Print a message in one write: a launcher tags each piece that it reads with the rank."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_error(text: str) -> None:
    """Print an error message in one write."""
    sys.stderr.write(f"hvdlarge: error: {text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def only_if(reports: bool) -> Iterator[None]:
    """Let the `with` block print only if this process reports for all; others, which exit with the
    same code, are silent.
    """
    if reports:
        yield
        return
    with (
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
        contextlib.redirect_stderr(devnull),
    ):
        yield
