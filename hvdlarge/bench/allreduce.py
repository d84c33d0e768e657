"""Measures the time of an all-reduce by message size."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdlarge.bench.interleave import run_interleaved, stopwatch
from hvdlarge.comm.interfaces import Collectives, ControlChannel

_REPEATS = 5  # back to back, to average over the phase of Horovod's cycle


def measure_allreduce(
    tensors: Collectives,
    control: ControlChannel,
    device: torch.device,
    sizes: list[int],
    rounds: int,
) -> dict[int, list[float]]:
    """Time the sum of a float32 tensor over all ranks. Every rank calls this together.

    Args:
        tensors: the collectives to measure.
        control: for a barrier before each measurement.
        device: of the tensors.
        sizes: in bytes, multiples of 4.
        rounds: measurements of each size.

    Returns:
        Seconds on this rank by size, one for each round.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    variants = {
        str(size): _variant(tensors, control, torch.ones(size // 4, device=device), synchronize)
        for size in sizes
    }
    run_interleaved(variants, 1)  # warm-up: allocates buffers and opens connections
    return {int(size): seconds for size, seconds in run_interleaved(variants, rounds).items()}


def _variant(
    tensors: Collectives,
    control: ControlChannel,
    values: torch.Tensor,
    synchronize: Callable[[], object],
) -> Callable[[], float]:
    timed = stopwatch(
        lambda: [tensors.sum(values, f"bench.{values.numel()}") for _ in range(_REPEATS)],
        synchronize,
    )

    def measure() -> float:
        control.barrier()
        return timed() / _REPEATS

    return measure
