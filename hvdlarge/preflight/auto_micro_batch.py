"""`batch.micro: auto` on GPUs: finds the largest micro-batch that fits in memory on every worker.

On CPUs nothing is searched; the samples of a step are split evenly over the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.comm.rank_checks import raise_on_all_ranks
from hvdlarge.data.batches import repeat
from hvdlarge.data.loader import LoadedMicroBatch
from hvdlarge.exits import OutOfMemory, is_out_of_memory
from hvdlarge.models.state import (
    Modules,
    named_buffers,
    named_modules,
    named_parameters,
)
from hvdlarge.preflight.trial import eager, restored
from hvdlarge.preflight.user_code import reading_samples, user_code
from hvdlarge.replica.objective import Objective
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.plan import Plan

# Memory reserved for the optimizer state (two copies of the weights for LAMB and Adam) and for the
# all-reduced gradients, in copies of the weights.
_RESERVED_COPIES = 3
# GPU memory reserved for allocations outside torch's caching allocator, such as the buffers that
# NCCL and Horovod allocate at the first all-reduce: 1/20 of the GPU, at least 1 GiB.
_RESERVED_PART, _RESERVED_MIN_BYTES = 20, 2**30


def with_largest_micro_batch(
    plan: Plan,
    objective: Objective,
    first_sample: Callable[[], LoadedMicroBatch],
    control: ControlChannel,
    averages: bool = False,
) -> Plan:
    """The plan with the largest micro-batch that fits on every worker's GPU. Every rank calls this
    together.

    Args:
        plan: of the run.
        objective: model and loss, on the device.
        first_sample: reads a sample, which is repeated to fill the micro-batches that are tried.
        control: the channel between the ranks.
        averages: whether the run also keeps an average of the weights.

    Raises:
        OutOfMemory: if a single sample does not fit on some rank.
        JobError: on every rank, for a sample that cannot be read, or an error of the model or the
            loss that is not about memory.
    """
    largest_share = max(-(-stage.global_batch // plan.world_size) for stage in plan.stages)

    def find_largest() -> int:
        with reading_samples("training set"):
            _, inputs, targets = first_sample()

        def samples(size: int) -> tuple[Any, Any]:
            return repeat(inputs, size), repeat(targets, size)

        with user_code("a micro-batch of copies of the first sample"):
            copies = _RESERVED_COPIES + averages
            return largest_micro_batch(objective, samples, largest_share, copies)

    local_largest = raise_on_all_ranks(control, find_largest)
    largest = min(int(message) for message in control.allgather(b"%d" % local_largest))
    if largest == 0:
        raise OutOfMemory(
            "out of memory: a micro-batch of one sample does not fit on every GPU; use fewer bits "
            "(precision: bf16) or a smaller model"
        )
    device = objective.precision.device
    if device.type == "cuda":  # exclude the search from the run's peak
        torch.cuda.reset_peak_memory_stats(device)
    return replace(plan, largest_micro_batch=largest)


def keep_micro_batches(plan: Plan, state: TrainState) -> tuple[Plan, list[str]]:
    """Keep the micro-batch size when a run resumes on as many workers as before, if it still fits.

    Args:
        plan: with the size found at this start.
        state: of the run; the size in it is updated for the next start.

    Returns:
        The plan to follow, and notes for the user.
    """
    largest, notes = plan.largest_micro_batch, []
    if largest is None:
        return plan, []
    before = state.largest_micro_batch if state.workers == plan.world_size else None
    if before is not None and largest < before:
        notes.append(
            f"batch.micro: auto is {largest:,} now, not {before:,}, which no longer fits: batch "
            "statistics and dropout change with it"
        )
    elif before is not None:
        largest = before
    state.largest_micro_batch, state.workers = largest, plan.world_size
    return replace(plan, largest_micro_batch=largest), notes


def largest_micro_batch(
    objective: Objective,
    samples: Callable[[int], tuple[Any, Any]],
    most: int,
    reserved_copies: int = _RESERVED_COPIES,
) -> int:
    """The largest micro-batch whose forward and backward pass fit in this worker's memory.

    Buffers, module modes and torch's random generators are restored; gradients are cleared.

    Args:
        objective: model and loss, on the device, without the hooks of a distributed optimizer.
        samples: number of samples -> inputs and targets, as loaded.
        most: upper limit, in samples.
        reserved_copies: copies of the weights for which room is left.

    Returns:
        Samples, 1 … `most`, at most a sixteenth below the largest size that fits; 0 if one sample
        does not fit.

    Raises:
        RuntimeError: an error of the model or the loss that is not about memory.
    """
    modules, device = objective.modules, objective.precision.device
    weights = [weight for _, weight in named_parameters(modules) if weight.requires_grad]
    is_gpu = device.type == "cuda"

    def fits(size: int) -> bool:
        try:
            _reserved = _reserve(weights, device, reserved_copies)
            objective(*samples(size)).value.backward()
            if is_gpu:
                torch.cuda.synchronize(device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) and size <= 2:
                raise
            # Large sizes may also fail for other reasons, such as no kernel or 32-bit indices
            return False
        finally:
            for weight in weights:
                weight.grad = None
        return True

    def fits_alone(size: int) -> bool:
        result = fits(size)
        if is_gpu:
            torch.cuda.empty_cache()  # cached blocks of one size may not fit the next
        return result

    with _preserved(modules, [device] if is_gpu else []):
        return largest_that_fits(fits_alone, most)


def _reserve(
    weights: list[torch.nn.Parameter], device: torch.device, copies: int
) -> list[torch.Tensor]:
    """Allocate what a run needs beside its forward and backward passes."""
    reserved = [torch.empty_like(weight) for weight in weights for _ in range(copies)]
    if device.type == "cuda":
        size = max(torch.cuda.mem_get_info(device)[1] // _RESERVED_PART, _RESERVED_MIN_BYTES)
        reserved.append(torch.empty(size, dtype=torch.uint8, device=device))
    return reserved


@contextmanager
def _preserved(modules: Modules, gpus: list[torch.device]) -> Iterator[None]:
    """Training mode, uncompiled; restores modes, all buffers and torch's random generators."""
    modes = [(module, module.training) for _, module in named_modules(modules)]
    buffers = [buffer for _, buffer in named_buffers(modules)]
    for module in modules.values():
        module.train()
    with torch.random.fork_rng(devices=gpus), eager(), restored(modules, buffers):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest size from 1 to `most` that fits, by doubling and bisection.

    Args:
        fits: whether a size fits; must be monotonic.
        most: largest size to try.

    Returns:
        A size that fits, at most a sixteenth below the largest that does; 0 if 1 does not fit.

    >>> largest_that_fits(lambda size: size <= 100, 1000)
    100
    >>> largest_that_fits(lambda size: size <= 100, 64)
    64
    """
    good, bad = 0, most + 1
    size = min(2, most)  # not 1, for which batch normalisation may raise
    while bad - good > max(1, good // 16):
        if fits(size):
            good = size
        else:
            bad = size
        size = min(2 * good, most) if bad > most else (good + bad) // 2
    return good
