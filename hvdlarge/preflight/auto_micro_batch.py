"""`batch.micro: auto` on GPUs: how many samples fit at once, tried out before the first step.

One idea in one file: the trial on this worker's GPU, the least of all workers, and what becomes of
it where a run goes on. On a CPU nothing is tried; a step is then shared evenly over the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.comm.rank_checks import raise_on_all_ranks
from hvdlarge.config.job import Data
from hvdlarge.config.planning import stages_of
from hvdlarge.data.batches import repeat, to_device
from hvdlarge.data.in_memory import reads_batches
from hvdlarge.data.loader import MicroBatchDataset, make_dataloader
from hvdlarge.exits import OutOfMemory
from hvdlarge.models.state import (
    Modules,
    named_buffers,
    named_modules,
    named_parameters,
    trained_modules,
)
from hvdlarge.optim.precision import Precision
from hvdlarge.resilience.out_of_memory import is_out_of_memory
from hvdlarge.schedule.batch import MicroBatch
from hvdlarge.schedule.plan import Plan
from hvdlarge.train_state import TrainState

# Of the size of the weights: kept free for the optimizer's state (two of them for LAMB and Adam)
# and the sum over workers.
_KEPT_FREE = 3
# Of a GPU: for what does not come out of torch's store, such as NCCL's and Horovod's buffers, which
# come with the first sum.
_PART_KEPT_FREE, _LEAST_KEPT_FREE = 20, 2**30


def with_largest_micro_batch(
    plan: Plan,
    model: torch.nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    precision: Precision,
    training_set: Any,
    data: Data,
    channels_last: bool,
    control: ControlChannel,
) -> Plan:
    """The plan with as many samples at once as fit on every worker's GPU, tried out with the set's
    first one. Every rank calls this together.

    Raises:
        OutOfMemory: on every rank, if not even one sample fits somewhere.
    """
    share = max(-(-stage.global_batch // plan.world_size) for stage in stages_of(plan))

    def try_out() -> int:
        # From a loader process where there are some: a set that opens its files late must not do so
        # in this one.
        processes = 0 if reads_batches(training_set) else min(1, data.num_workers)
        fetch = MicroBatchDataset(training_set, 0, shuffled=False)
        _, *sample = next(
            iter(make_dataloader(fetch, [MicroBatch(0, 0, 1)], processes, data.prefetch_factor))
        )
        inputs, targets = (
            to_device(part, precision.device, precision.weights, channels_last) for part in sample
        )

        def samples(size: int) -> tuple[Any, Any]:
            return repeat(inputs, size), repeat(targets, size)

        return largest_micro_batch(model, loss, precision, samples, share)

    local_largest = raise_on_all_ranks(control, try_out)
    largest = min(int(answer) for answer in control.allgather(b"%d" % local_largest))
    if largest == 0:
        raise OutOfMemory(
            "out of memory: not even one sample fits on every GPU; use fewer bits (precision: "
            "bf16) or a smaller model"
        )
    if precision.device.type == "cuda":  # what the trial took is not what the run needs
        torch.cuda.reset_peak_memory_stats(precision.device)
    return replace(plan, largest_micro_batch=largest)


def keep_micro_batches(plan: Plan, state: TrainState) -> tuple[Plan, list[str]]:
    """On as many workers as before, cut steps as before an interruption, if that still fits.

    Args:
        plan: with what was tried out at this start.
        state: of the run; remembers the size for the next start.

    Returns:
        The plan to follow, and notes for the user.
    """
    largest, notes = plan.largest_micro_batch, []
    if largest is None:
        return plan, []
    before = state.largest_micro_batch if state.workers == plan.world_size else None
    if before is not None and largest < before:
        notes.append(
            f"only {largest:,} samples fit at once now, not {before:,}: batch statistics and "
            "dropout follow that"
        )
    elif before is not None:
        largest = before
    state.largest_micro_batch, state.workers = largest, plan.world_size
    return replace(plan, largest_micro_batch=largest), notes


def largest_micro_batch(
    model: torch.nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    precision: Precision,
    samples: Callable[[int], tuple[Any, Any]],
    most: int,
) -> int:
    """How many samples a forward and backward pass can take at once on this worker's device, by
    trying it out.

    Leaves nothing behind: no gradient, no change of a buffer, of a module's mode or of torch's
    random generators.

    Args:
        model: on the device, not yet joined with other workers.
        loss: a mean over samples.
        precision: of this worker.
        samples: gives so many samples' inputs and targets, on the device.
        most: never tried beyond.

    Returns:
        From 1 to `most`, to within a sixteenth of it; 0 if not even one sample fits.
    """
    modules = trained_modules(model, loss)
    weights = [weight for _, weight in named_parameters(modules) if weight.requires_grad]
    is_gpu = precision.device.type == "cuda"

    def fits(size: int) -> bool:
        try:
            _kept_free = _reserve(weights, precision.device)
            inputs, targets = samples(size)
            with precision.autocast():
                value = loss(model(inputs), targets)
            value.backward()
            if is_gpu:
                torch.cuda.synchronize(precision.device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) and size <= 2:
                raise
            # A larger size also fails where a library has no way for it, or cannot number its
            # values
            return False
        finally:
            for weight in weights:
                weight.grad = None
        return True

    def fits_alone(size: int) -> bool:
        answer = fits(size)
        if is_gpu:
            torch.cuda.empty_cache()  # what was cut for one size does not always serve another
        return answer

    with _unchanged(modules, [precision.device] if is_gpu else []):
        return largest_that_fits(fits_alone, most)


def _reserve(weights: list[torch.nn.Parameter], device: torch.device) -> list[torch.Tensor]:
    """Memory that a run needs beside its passes."""
    reserved = [torch.empty_like(weight) for weight in weights for _ in range(_KEPT_FREE)]
    if device.type == "cuda":
        size = max(torch.cuda.mem_get_info(device)[1] // _PART_KEPT_FREE, _LEAST_KEPT_FREE)
        reserved.append(torch.empty(size, dtype=torch.uint8, device=device))
    return reserved


@contextmanager
def _unchanged(modules: Modules, gpus: list[torch.device]) -> Iterator[None]:
    """Train uncompiled for a while; modes, buffers and torch's random generators are put back."""
    modes = [(module, module.training) for _, module in named_modules(modules)]
    buffers = [(buffer, buffer.clone()) for _, buffer in named_buffers(modules)]
    for module in modules.values():
        module.train()
    # Compiling each size takes minutes
    with torch.random.fork_rng(devices=gpus), torch.compiler.set_stance("force_eager"):
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest size from 1 to `most` that fits, to within a sixteenth of it; 0 if not even one
    does.

    Args:
        fits: tries a size out; what fits once also fits when it is smaller.
        most: never tried beyond.

    >>> largest_that_fits(lambda size: size <= 100, 1000)
    100
    >>> largest_that_fits(lambda size: size <= 100, 64)
    64
    """
    good, bad = 0, most + 1
    size = min(2, most)  # not 1: batch normalisation may refuse it
    while bad - good > max(1, good // 16):
        if fits(size):
            good = size
        else:
            bad = size
        size = min(2 * good, most) if bad > most else (good + bad) // 2
        if good == most:
            break
    return good
