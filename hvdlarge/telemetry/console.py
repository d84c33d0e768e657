"""Prints messages for the user, each in one write, flushed at once."""

from __future__ import annotations

import sys


def print_status(text: str) -> None:
    """Print a message in one write: a launcher tags each piece that it reads with the rank."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_error(text: str) -> None:
    """Print an error message in one write."""
    sys.stderr.write(f"hvdlarge: error: {text}\n")
    sys.stderr.flush()
