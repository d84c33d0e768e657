"""Errors of user code, as messages for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvdlarge.config.part_errors import describe
from hvdlarge.exits import InvalidEnvironmentError, JobError, PartError, RunExit, is_out_of_memory
from hvdlarge.resilience.shared_memory import is_shared_memory_error, shared_memory_advice


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn errors of user code in the `with` block into JobError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunExit) or is_out_of_memory(error):
            raise
        if isinstance(error, PartError):
            raise JobError(describe(error)) from None
        # torch's own message speaks of a function that the user has not called
        limited = (
            ", where `reduction: exact` or `deterministic: true` excludes other algorithms"
            if "does not have a deterministic implementation" in str(error)
            else ""
        )
        raise JobError(
            f"model.name: {what} fails in the model or the loss{limited}: {describe(error)}"
        ) from None


@contextmanager
def reading_samples(what: str) -> Iterator[None]:
    """Turn errors in the `with` block, which reads the first samples of `what`, into JobError, and
    shared memory that runs out into InvalidEnvironmentError.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RunExit) or is_out_of_memory(error):
            raise
        if is_shared_memory_error(error):
            raise InvalidEnvironmentError(shared_memory_advice(error)) from None
        raise JobError(
            f"data.name: the first samples of the {what} cannot be read: {describe(error)}"
        ) from None
