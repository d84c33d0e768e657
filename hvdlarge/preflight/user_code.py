"""Errors of user code, as messages for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvdlarge.exits import JobError, RunExit
from hvdlarge.resilience.out_of_memory import is_out_of_memory
from hvdlarge.resilience.user_errors import describe


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
