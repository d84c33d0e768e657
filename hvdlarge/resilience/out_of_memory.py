"""What is said when memory runs out on a rank, and how the largest micro-batch that fits on a GPU
is found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hvdlarge.exits import OutOfMemory
from hvdlarge.models.state import named_buffers, named_modules, named_parameters, trained_modules
from hvdlarge.optim.precision import Precision

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


# Of the size of the weights: kept free for the optimizer's state (two of them for LAMB and Adam)
# and the sum over workers.
_KEPT_FREE = 3
# Of a GPU: for what does not come out of torch's store, such as NCCL's and Horovod's buffers, which
# come with the first sum.
_PART_KEPT_FREE, _LEAST_KEPT_FREE = 20, 2**30


def largest_micro_batch(
    model: torch.nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    arithmetic: Precision,
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
        arithmetic: of this worker.
        samples: gives so many samples' inputs and targets, on the device.
        most: never tried beyond.

    Returns:
        From 1 to `most`, to within a sixteenth of it; 0 if not even one sample fits.
    """
    modules = trained_modules(model, loss)
    weights = [weight for _, weight in named_parameters(modules) if weight.requires_grad]
    buffers = [(buffer, buffer.clone()) for _, buffer in named_buffers(modules)]
    is_gpu = arithmetic.device.type == "cuda"

    def fits(size: int) -> bool:
        try:
            _kept_free = [torch.empty_like(weight) for weight in weights for _ in range(_KEPT_FREE)]
            if is_gpu:
                part = torch.cuda.mem_get_info(arithmetic.device)[1] // _PART_KEPT_FREE
                _kept_free.append(
                    torch.empty(
                        max(part, _LEAST_KEPT_FREE), dtype=torch.uint8, device=arithmetic.device
                    )
                )
            inputs, targets = samples(size)
            with arithmetic.autocast():
                value = loss(model(inputs), targets)
            value.backward()
            if is_gpu:
                torch.cuda.synchronize(arithmetic.device)
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

    def tried(size: int) -> bool:
        answer = fits(size)
        if is_gpu:
            torch.cuda.empty_cache()  # what was cut for one size does not always serve another
        return answer

    modes = [(module, module.training) for _, module in named_modules(modules)]
    for whole in modules.values():
        whole.train()
    gpus = [arithmetic.device] if is_gpu else []
    # Compiling each size takes minutes
    with torch.random.fork_rng(devices=gpus), torch.compiler.set_stance("force_eager"):
        try:
            return largest_that_fits(tried, most)
        finally:
            for module, mode in modes:
                module.training = mode
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
