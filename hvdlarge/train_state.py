"""What a run has come to, beside its weights and its position."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """What a checkpoint holds beside weights, optimizer and position."""

    results: dict[str, float] = field(default_factory=dict)  # loss and the last evaluation
    # The best evaluation: by which result, its value and its step
    best: dict[str, Any] | None = None
    skipped: int = 0  # steps left out as not finite
    rolled_back: int = 0
    # After which the job's cadence asked for the last checkpoint: what a rollback goes back to
    scheduled_step: int | None = None
    overflows: int = 0  # of those left out, the ones that only asked for a smaller loss scale
    loss_scale: float | None = None  # the moving part, for fp16
    steps_at_loss_scale: int = 0
    train_seconds: float = 0.0  # of all parts of the run
    # Samples that were found to fit at once, on so many workers
    largest_micro_batch: int | None = None
    workers: int | None = None
