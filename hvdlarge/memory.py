"""What is said when memory runs out on a rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hvdlarge.exits import OutOfMemory

_TORCH_ON_A_CPU = ("can't allocate memory", "not enough memory")


@contextlib.contextmanager
def told_what_to_change(where: str, advice: str) -> Iterator[None]:
    """Replace an error of a memory that ran out by one for the user.

    Args:
        where: the work of the `with` block, and its sizes.
        advice: what would make it fit.

    Raises:
        OutOfMemory: in the place of torch's or Python's own error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(f"out of memory in {where}: {advice} ({reason})") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory was left, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_ON_A_CPU)
