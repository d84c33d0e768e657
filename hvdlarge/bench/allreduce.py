"""Measures the time of an all-reduce by number and size of messages."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from hvdlarge.bench.interleave import Timing, run_interleaved, stopwatch
from hvdlarge.comm.cost_model import AllreduceTimes
from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.optim.torch_optimizers import SGD

# Horovod looks for gradients once in a cycle, a millisecond unless set otherwise. What comes right
# after the last look waits for all of it, and a sum that takes less hides in that wait: so the
# gradients of repeated sums come at different times of the cycle.
_REPEATS = 8
_PAUSE_SECONDS = 0.002
_MESSAGES = 64  # at once


def measure_allreduce(
    tensors: Collectives,
    control: ControlChannel,
    device: torch.device,
    sizes: list[int],
    rounds: int,
) -> dict[str, list[float]]:
    """Time sums of float32 gradients over all ranks, on the way that those of a step take. Every
    rank calls this together.

    Args:
        tensors: the collectives to measure.
        control: for a barrier before each measurement, and for a message without Horovod.
        device: of the tensors.
        sizes: in bytes, multiples of 4.
        rounds: measurements of each.

    Returns:
        Seconds on this rank, one for each round, by `1 × 4 bytes`, which is a step with one
        gradient of one number, and so on: one for each size, and one of `_MESSAGES` gradients at
        once; `control`, a message of 8 bytes without Horovod.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    cases = [*((1, size) for size in sizes), (_MESSAGES, 4)]
    works = {
        f"{count} × {size:,} bytes": _gradients(tensors, count, size, device)
        for count, size in cases
    }
    works["control"] = lambda: control.start_max([0.0])()
    variants = {name: _repeated(control, work, synchronize) for name, work in works.items()}
    run_interleaved(variants, 1)  # warm-up: allocates buffers and opens connections
    return run_interleaved(variants, rounds)


def times_of(seconds: dict[str, list[float]], workers: int, sizes: list[int]) -> AllreduceTimes:
    """The medians of what `measure_allreduce` returned, for a fit."""
    medians = {name: Timing.of(values).median for name, values in seconds.items()}
    return AllreduceTimes(
        workers=workers,
        one=medians["1 × 4 bytes"],
        many=medians[f"{_MESSAGES} × 4 bytes"],
        messages=_MESSAGES,
        control=medians["control"],
        by_size={size: medians[f"1 × {size:,} bytes"] for size in sizes},
    )


def _gradients(
    tensors: Collectives, count: int, size: int, device: torch.device
) -> Callable[[], object]:
    """A step with `count` gradients of `size` bytes each, without computing or using them."""
    weights = [torch.nn.Parameter(torch.zeros(size // 4, device=device)) for _ in range(count)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    named = [(f"bench.{count}.{size}.{number}", weight) for number, weight in enumerate(weights)]
    update = tensors.distributed_optimizer(SGD(weights, lr=0.0), named)

    def step() -> None:
        update.zero_grad(range(0), 1)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        update.synchronize()

    return step


def _repeated(
    control: ControlChannel, work: Callable[[], object], synchronize: Callable[[], object]
) -> Callable[[], float]:
    timed = stopwatch(work, synchronize)
    cycle = float(os.environ.get("HOROVOD_CYCLE_TIME", 1)) / 1e3

    def measure() -> float:
        seconds = 0.0
        for number in range(_REPEATS):
            control.barrier()
            time.sleep(_PAUSE_SECONDS + cycle * number / _REPEATS)
            seconds += timed()
        return seconds / _REPEATS

    return measure
