"""The model replica of one worker: model and loss, optimizer and running statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hvdlarge.comm.interfaces import DistributedOptimizer
from hvdlarge.models.state import Modules
from hvdlarge.optim.precision import LossScaler
from hvdlarge.reduction.batch_norm import RunningStatistics
from hvdlarge.replica.carried import CarriedState, NoCarriedState
from hvdlarge.replica.ema import WeightAverage
from hvdlarge.replica.objective import Objective, SampleMean, WeightedMean


@dataclass(frozen=True)
class Replica:
    """The model replica of one worker."""

    objective: (
        Objective  # model and loss; the parameters of a loss that is a module are trained too
    )
    averaging: SampleMean | WeightedMean  # of the losses of a step's micro-batches
    update: DistributedOptimizer
    statistics: RunningStatistics
    loss_scaler: LossScaler
    clip_norm: float | None  # of all mean gradients together
    names: dict[torch.nn.Parameter, str]  # of the trainable parameters, in the model's order
    seed: int
    rank: int
    # A parameter without a gradient on some workers counts as having a gradient of zero there
    zero_if_missing: bool = False
    ema: WeightAverage | None = None  # of the trainable parameters
    carried: CarriedState = field(default_factory=NoCarriedState)  # from one sample to the next

    @property
    def modules(self) -> Modules:
        """The model, and the loss if it is a module, by the prefix of their names."""
        return self.objective.modules
