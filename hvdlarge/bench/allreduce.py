"""How long an allreduce of each size takes on the workers that are there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdlarge.bench.interleave import run_interleaved, stopwatch
from hvdlarge.comm.interfaces import Collectives, ControlChannel

_REPEATS = 5  # in a row, so that Horovod's cycle is met at every phase


def measure_allreduce(
    tensors: Collectives,
    control: ControlChannel,
    device: torch.device,
    sizes: list[int],
    rounds: int,
) -> dict[int, list[float]]:
    """Seconds of a sum of float32 over all workers. Every rank calls this together.

    Args:
        tensors: what is measured.
        control: brings the ranks together before each measurement.
        device: where the tensors are.
        sizes: bytes, multiples of 4.
        rounds: measurements of each size.
    """
    settle = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    turns = {
        str(size): _turn(tensors, control, torch.ones(size // 4, device=device), settle)
        for size in sizes
    }
    run_interleaved(turns, 1)  # buffers and connections are made
    return {int(size): seconds for size, seconds in run_interleaved(turns, rounds).items()}


def _turn(
    tensors: Collectives,
    control: ControlChannel,
    values: torch.Tensor,
    settle: Callable[[], object],
) -> Callable[[], float]:
    watch = stopwatch(
        lambda: [tensors.sum(values, f"bench.{values.numel()}") for _ in range(_REPEATS)], settle
    )

    def turn() -> float:
        control.barrier()
        return watch() / _REPEATS

    return turn
