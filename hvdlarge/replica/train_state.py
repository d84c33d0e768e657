"""The state of a run besides weights, optimizer state and progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Results and counters, saved in checkpoints and the same on every rank, but for the time."""

    results: dict[str, float] = field(default_factory=dict)  # loss and the last evaluation
    # The best evaluation: the name of the result ("by"), "value" (higher is better) and "step"
    best: dict[str, Any] | None = None
    # Steps without an update: because of non-finite gradients, overflows included, or without loss
    skipped: int = 0
    without_loss: int = 0  # of these, steps in which no target counts
    rolled_back: int = 0  # rollbacks
    scheduled_step: int | None = None  # of the last scheduled checkpoint, the target of a rollback
    overflows: int = 0  # steps skipped only to lower the loss scale
    loss_scale: float | None = None  # the dynamic part, for fp16
    steps_at_loss_scale: int = 0
    train_seconds: float = 0.0  # of all starts of the run, by rank 0's clock; saved by rank 0
    # Averages of the gradient noise (telemetry/gradient_noise.py); None before it was measured
    gradient_square: float | None = None
    gradient_variance: float | None = None
    noise_measurements: int = 0  # in these averages
    # With micro: auto, the samples that fit into memory on every one of `workers` workers
    largest_micro_batch: int | None = None
    workers: int | None = None
