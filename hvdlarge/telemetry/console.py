"""Prints for the user: each text at once and in one piece."""

from __future__ import annotations

import sys


def print_status(text: str) -> None:
    """Print for the user, at once, and in one piece: a launcher tags every piece that it reads with
    the rank.
    """
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_error(text: str) -> None:
    """Print an error for the user, at once and in one piece."""
    sys.stderr.write(f"hvdlarge: error: {text}\n")
    sys.stderr.flush()
