"""What holds for gradients on every wire, so that a run means the same with and without Horovod."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def fill_missing_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give each trainable parameter that got no gradient a zero one.

    Horovod does this for more than one worker, because a parameter may be used on some workers only. Doing it everywhere
    makes an optimizer treat an unused parameter alike on any number of workers. Needs no other worker.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = parameter.data.new_zeros(parameter.shape)
