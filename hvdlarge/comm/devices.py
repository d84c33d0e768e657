"""Chooses the device of a worker, and checks that no two workers share a GPU."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch

from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.exits import InvalidEnvironmentError


def choose_device(tensors: Collectives) -> torch.device:
    """The GPU with the worker's local rank, modulo the visible ones, or the CPU on a host without.

    Raises:
        InvalidEnvironmentError: if Horovod cannot use the GPUs, or uses NCCL and several are
            visible, but fewer than there are workers on this host.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if not tensors.supports_gpu_tensors:
        raise InvalidEnvironmentError(
            f"this host has {gpus} GPUs, but its Horovod was built without CUDA: rebuild it with "
            "CUDA_HOME set (and HOROVOD_GPU_OPERATIONS=NCCL), or set CUDA_VISIBLE_DEVICES= to "
            "train on the CPU"
        )
    # One visible GPU may mean that the launcher shows each worker its own; `check_gpus` verifies it
    if 1 < gpus < tensors.local_size and tensors.needs_own_gpus:
        raise InvalidEnvironmentError(
            f"{tensors.local_size} workers on a host with {gpus} GPUs: start at most one worker "
            "per GPU"
        )
    device = torch.device("cuda", tensors.local_rank % gpus)
    torch.cuda.set_device(device)
    return device


def check_gpus(device: torch.device, control: ControlChannel, tensors: Collectives) -> list[str]:
    """Check whether workers share a GPU. Every rank calls this together.

    Returns:
        Notes for the user.

    Raises:
        InvalidEnvironmentError: on every rank, if workers share a GPU and all-reduce over NCCL,
            which does not support that.
    """
    uuid = (
        str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
        if device.type == "cuda"
        else ""
    )
    message = f"{socket.gethostname()} {uuid}" if uuid else ""
    gpus = [answer.decode() for answer in control.allgather(message.encode())]
    shared = shared_gpu(gpus)
    if shared is None:
        return []
    ranks = f"ranks {shared[0]} and {shared[1]} have the same GPU ({gpus[shared[0]]})"
    if tensors.needs_own_gpus:
        raise InvalidEnvironmentError(
            f"{ranks}, but NCCL needs one for each worker: start at most one worker per GPU, and "
            "let the launcher make visible to each worker either its own GPU or all of them "
            "(CUDA_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES)"
        )
    return [f"{ranks}; they take turns on it"]


def shared_gpu(gpus: Sequence[str]) -> tuple[int, int] | None:
    """The first two ranks with the same GPU; None if there are none.

    Args:
        gpus: host and UUID of each rank's GPU; empty for a rank without one.

    >>> shared_gpu(["a GPU-1", "a GPU-2", "b GPU-1", "a GPU-2"])
    (1, 3)
    >>> shared_gpu(["", ""]) is None
    True
    """
    for rank, gpu in enumerate(gpus):
        if gpu and gpu in gpus[:rank]:
            return gpus.index(gpu), rank
    return None
