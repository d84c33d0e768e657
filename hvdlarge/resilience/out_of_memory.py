"""Explains out-of-memory errors: what ran out of memory, and what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hvdlarge.exits import OutOfMemory, is_out_of_memory


@contextlib.contextmanager
def explain_out_of_memory(where: str, advice: str) -> Iterator[None]:
    """Replace out-of-memory errors in the `with` block by one that names what to change.

    Args:
        where: what the block does, with its sizes.
        advice: what would need less memory.

    Raises:
        OutOfMemory: instead of torch's or Python's own error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(f"out of memory in {where}: {advice} ({reason})") from None


def oom_hint(micro_batch: int, global_batch: int) -> str:
    """Advice on what needs less memory than micro-batches of `micro_batch` samples."""
    if micro_batch == 1:
        return (
            "a micro-batch has one sample already: use a device with more memory, precision: bf16 "
            "or a smaller model"
        )
    return (
        f"set batch.micro lower, e.g. to {micro_batch // 2}; the global batch of {global_batch:,} "
        "stays the same, with more accumulation steps"
    )
