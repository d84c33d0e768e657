"""What a user is told when memory runs out on a rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hvdlarge.exits import OutOfMemory

_WORDS = (
    "can't allocate memory",  # torch's, on a CPU
    "not enough memory",
    "CUDA error: out of memory",  # outside torch's own store of memory
    "[CUDA]: out of memory",
    "_STATUS_ALLOC_FAILED",
)


@contextlib.contextmanager
def explain_out_of_memory(where: str, advice: str) -> Iterator[None]:
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


def oom_hint(micro_batch: int, global_batch: int) -> str:
    """What would take less memory than micro-batches of so many samples."""
    if micro_batch == 1:
        return (
            "a micro-batch has one sample already: use a larger device, fewer bits (precision: "
            "bf16) or a smaller model"
        )
    lower = f"set batch.micro lower, e.g. to {micro_batch // 2}"
    return f"{lower}; the global batch of {global_batch:,} stays, in more accumulation steps"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory was left, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
