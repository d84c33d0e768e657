"""The engine's learning-rate schedules as a torch scheduler, for a loop of one's own.

Formula:  lr of a step = LRSchedule.lr, over the stages begun so far, from epoch samples_seen /
          dataset_size to epoch (samples_seen + samples of the step) / dataset_size
Source:   schedule/lr.py; the stages are those of controller.py, and a test compares the rates of
          both, bit for bit.
Contract: samples are the clock: `step` is called once after each step of the optimizer, as in
          torch, and sets the rate of the step to come.
"""

from __future__ import annotations

from typing import Any

import torch

from hvdlarge.optim.param_groups import set_group_lr
from hvdlarge.schedule.growth import Growth, NoGrowth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.progress import Clock
from hvdlarge.schedule.warmup import StageStart


class LRScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Sets the learning rate of an optimizer by an `LRSchedule`: LEGW's and linear warmup, scaling
    with the batch, and every decay, also while the batch grows.

    Each parameter group gets the rate of the schedule times its `lr_factor`, 1 where it has none;
    the rate with which the optimizer was built does not matter.

    Args:
        optimizer: any torch optimizer.
        schedule: of the rate.
        dataset_size: samples in an epoch.
        epochs: length of the run, which a decay may depend on.
        base_batch: global batch for which the base rate of the schedule was tuned, in samples.
        global_batch: samples per update, over all workers, of the first step; None: `base_batch`.
        growth: how the global batch grows; `global_batch` then says with how many samples the step
            to come is to be taken.

    Raises:
        ValueError: for values that no run can have, or a growth that depends on measurements.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
    >>> scheduler = LRScheduler(optimizer, LRSchedule(0.1, "sqrt"), 800, 2.0, 100, global_batch=400)
    >>> scheduler.get_last_lr(), scheduler.epoch
    ([0.2], 0.0)
    >>> optimizer.step()
    >>> scheduler.step()
    >>> scheduler.epoch
    0.5
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: LRSchedule,
        dataset_size: int,
        epochs: float,
        base_batch: int,
        global_batch: int | None = None,
        growth: Growth | None = None,
    ) -> None:
        first = base_batch if global_batch is None else global_batch
        if base_batch < 1 or first < 1:
            raise ValueError(f"a batch has at least 1 sample, got {min(base_batch, first)}")
        growth = NoGrowth() if growth is None else growth
        if growth.depends_on_measurement:
            raise ValueError(f"{type(growth).__name__} depends on measurements of the engine")
        growth.check_initial(first)
        self._schedule, self._growth = schedule, growth
        self._clock = Clock(dataset_size, epochs)
        self._base_batch, self._first_batch = base_batch, first
        self._samples_seen = self._coming = self._stage_batch = 0
        self._stages: list[StageStart] = []
        super().__init__(optimizer)  # which calls `step` once, for the first step

    @property
    def epoch(self) -> float:
        """The epoch at which the step to come begins."""
        return self._clock.epoch(self._samples_seen)

    @property
    def global_batch(self) -> int:
        """Samples of the step to come, over all workers; the last step of the run may have fewer
        than the ones before.
        """
        return self._coming

    @property
    def finished(self) -> bool:
        """Whether the run has seen all its samples."""
        return self._samples_seen >= self._clock.total_samples

    def step(self, global_batch: int | None = None) -> None:
        """Count the samples of the step that was taken, and set the rate of the one to come.

        Args:
            global_batch: samples of the step to come, over all workers. More than before begin a
                stage with a larger batch; fewer are a step that is cut short, as at the end of a
                data set. None: by `growth`, and cut short by the end of the run.

        Raises:
            ValueError: for a batch below 1, or a growth that gives no number of samples.
        """
        if global_batch is not None and global_batch < 1:
            raise ValueError(f"a batch has at least 1 sample, got {global_batch}")
        self._samples_seen += self._coming
        batch = self._next_batch() if global_batch is None else global_batch
        if batch > self._stage_batch:
            self._stages.append(StageStart(self.epoch, batch / self._base_batch))
            self._stage_batch = batch
        left = self._clock.total_samples - self._samples_seen
        self._coming = min(batch, left) if global_batch is None and left > 0 else batch
        super().step()

    def _next_batch(self) -> int:
        current = self._stage_batch or self._first_batch
        grown = self._growth.next_batch(self._first_batch, current, self.epoch, {})
        # The caller's own batches may be ahead of the growth's
        return max(current, self._growth.checked(grown, self.epoch))

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rates of the step to come, one for each parameter group."""
        end = self._clock.epoch(self._samples_seen + self._coming)
        lr = self._schedule.lr(self._stages, self.epoch, end, self._clock.epochs)
        return [lr * group.get("lr_factor", 1.0) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, as numbers and lists; the schedule itself is not in it."""
        return {
            "samples_seen": self._samples_seen,
            "global_batch": self._coming,
            "stage_batch": self._stage_batch,
            "stages": [list(stage) for stage in self._stages],
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave, and set the rate of the step to come."""
        self._samples_seen = state_dict["samples_seen"]
        self._coming, self._stage_batch = state_dict["global_batch"], state_dict["stage_batch"]
        self._stages = [StageStart(*stage) for stage in state_dict["stages"]]
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            set_group_lr(group, lr)
