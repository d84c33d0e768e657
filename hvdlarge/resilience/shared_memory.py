"""Explains errors of a full /dev/shm, through which loader processes pass their samples."""

from __future__ import annotations

import errno
import traceback

# Of torch, in a loader process and in the one that waits for it. "shared memory" alone would not
# do: a GPU has some too, of which a compiled kernel may need too much.
_MESSAGES = (
    "</torch_",
    "shared memory object",
    "shared memory(shm)",
    "out of shared memory",
    "killed by signal: Bus error",
)


def is_shared_memory_error(error: BaseException) -> bool:
    """Whether an error means that shared memory ran out.

    >>> is_shared_memory_error(RuntimeError("unable to write to file </torch_7_3>: No space left"))
    True
    >>> is_shared_memory_error(OSError(28, "No space left on device", "/scratch/cache"))
    False
    >>> is_shared_memory_error(FileNotFoundError(2, "No such file", "/dev/shm/cache/train.bin"))
    False
    """
    if isinstance(error, (OSError, RuntimeError)):
        text = str(error)
        if any(sign in text for sign in _MESSAGES):
            return True
        if "/dev/shm/" in text and "No space left" in text:
            return True
    # Semaphores lie there too, and have no name in the error
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, OSError)
        and error.errno == errno.ENOSPC
        and error.filename is None
        and any("multiprocessing" in frame.filename for frame in frames)
    )


def shared_memory_advice(error: BaseException) -> str:
    """What to do about such an error."""
    lines = [line for line in str(error).splitlines() if any(sign in line for sign in _MESSAGES)]
    reason = (lines or [f"{type(error).__name__}: {error}"])[-1].strip()
    return (
        f"the loader processes have no shared memory left ({reason}): `hvdlarge doctor` checks "
        "/dev/shm and says how to enlarge it; data.num_workers: 0 needs none, a lower "
        "data.prefetch_factor less"
    )
