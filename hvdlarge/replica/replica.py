"""The model replica of one worker: model, loss, optimizer, statistics and precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hvdlarge.comm.interfaces import DistributedOptimizer
from hvdlarge.models.state import Modules
from hvdlarge.optim.precision import LossScaler, Precision
from hvdlarge.reduction.batch_norm import RunningStatistics
from hvdlarge.replica.ema import WeightAverage


@dataclass(frozen=True)
class Replica:
    """The model replica of one worker."""

    model: torch.nn.Module
    # A mean over the samples of a micro-batch; a module's parameters are trained too
    loss: Callable[[Any, Any], torch.Tensor]
    modules: Modules  # both, the loss where it is a module
    update: DistributedOptimizer
    statistics: RunningStatistics
    precision: Precision
    loss_scaler: LossScaler
    clip_norm: float | None  # of all mean gradients together
    # Moves a micro-batch's inputs or targets, and gives floats the type of the weights
    to_device: Callable[[Any], Any]
    names: dict[torch.nn.Parameter, str]  # of the trainable parameters, in the model's order
    seed: int
    rank: int
    # A parameter without a gradient on some workers counts as having a gradient of zero there
    zero_if_missing: bool = False
    ema: WeightAverage | None = None  # of the trainable parameters

    def set_mode(self, training: bool) -> None:
        """Put all of it into training or evaluation mode."""
        for module in self.modules.values():
            module.train(training)
