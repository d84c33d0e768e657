"""A full /dev/shm is distinguished from other errors, and leads to the doctor."""

import errno
import traceback

import pytest

from hvdlarge.resilience.shared_memory import is_shared_memory_error, shared_memory_advice

IN_A_LOADER_PROCESS = """Caught RuntimeError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 349, in _worker_loop
RuntimeError: unable to write to file </torch_71_2590_0>: No space left on device (28)
"""


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory."), True),
        (RuntimeError(IN_A_LOADER_PROCESS), True),
        (RuntimeError("unable to open shared memory object </torch_7_9> in read-write mode: Too many open files (24)"), True),
        (OSError(errno.ENOSPC, "No space left on device", "/dev/shm/psm_1"), True),
        (OSError(errno.ENOSPC, "No space left on device", "/scratch/cache"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of shared memory"), False),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: Success (0)"), True),
        (RuntimeError("OutOfResources: out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes or `num_stages` may help."), False),
        (RuntimeError("No valid triton configs. OutOfMemoryError: out of resource: triton_mm Required: 262144 Hardware limit:232448 shared memory"), False),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), False),
    ],
)  # fmt: skip
def test_errors_of_shared_memory_are_told_by_their_text(error, is_one):
    assert is_shared_memory_error(error) == is_one


def test_a_semaphore_without_room_is_one_too(monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    frame = traceback.FrameSummary("/usr/lib/python3/multiprocessing/synchronize.py", 1, "f")
    monkeypatch.setattr(traceback, "extract_tb", lambda _: [frame])
    assert is_shared_memory_error(error)


def test_the_advice_names_the_cause_the_doctor_and_what_needs_less():
    advice = shared_memory_advice(RuntimeError(IN_A_LOADER_PROCESS))
    assert "(RuntimeError: unable to write to file </torch_71_2590_0>: No space left" in advice
    assert "`hvdlarge doctor` checks /dev/shm" in advice
    assert "data.num_workers: 0" in advice
