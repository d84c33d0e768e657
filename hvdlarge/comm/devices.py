"""Which device a worker computes on, and whether each has a GPU of its own."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch

from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.exits import InvalidEnvironmentError


def choose_device(tensors: Collectives) -> torch.device:
    """The GPU of this worker's number on its host, or the CPU of a host without GPUs.

    Raises:
        InvalidEnvironmentError: if Horovod cannot use the GPUs, or there are fewer of them than
            workers on this host.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if not tensors.carries_gpu_tensors:
        raise InvalidEnvironmentError(
            f"this host has {gpus} GPUs, but its Horovod was built without CUDA: build it again "
            "with CUDA_HOME set (and "
            "HOROVOD_GPU_OPERATIONS=NCCL), or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    # A launcher that gives each worker a GPU of its own shows it that one alone; whether it did,
    # `check_gpus` finds out.
    if 1 < gpus < tensors.local_size and tensors.needs_own_gpus:
        raise InvalidEnvironmentError(
            f"{tensors.local_size} workers on a host with {gpus} GPUs: start at most one worker "
            "for each GPU"
        )
    device = torch.device("cuda", tensors.local_rank % gpus)
    torch.cuda.set_device(device)
    return device


def check_gpus(device: torch.device, control: ControlChannel, tensors: Collectives) -> list[str]:
    """See whether each worker has a GPU of its own; what the user may not expect. Every rank calls
    this together.

    Raises:
        InvalidEnvironmentError: on every rank, if workers share a GPU and their sums go over
            NCCL, which cannot serve that.
    """
    own = (
        str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
        if device.type == "cuda"
        else ""
    )
    places = [
        message.decode()
        for message in control.allgather(f"{socket.gethostname()} {own}".encode() if own else b"")
    ]
    shared = shared_gpu(places)
    if shared is None:
        return []
    ranks = f"ranks {shared[0]} and {shared[1]} have the same GPU ({places[shared[0]]})"
    if tensors.needs_own_gpus:
        raise InvalidEnvironmentError(
            f"{ranks}, and NCCL needs one for each worker: start at most one worker for each GPU, "
            "and let the launcher show each "
            "worker its own one, or all of them to all (CUDA_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES)"
        )
    return [f"{ranks}; they take turns on it"]


def shared_gpu(places: Sequence[str]) -> tuple[int, int] | None:
    """The first two ranks with the same GPU; None if each has its own.

    Args:
        places: host and identity of each rank's GPU; empty for a rank without one.

    >>> shared_gpu(["a GPU-1", "a GPU-2", "b GPU-1", "a GPU-2"])
    (1, 3)
    >>> shared_gpu(["", ""]) is None
    True
    """
    for rank, place in enumerate(places):
        if place and place in places[:rank]:
            return places.index(place), rank
    return None
