"""Decides when to save, and collects the state of a run between two steps.

Saving must not change the weights. A scheduled checkpoint, required by the job, is also written by
an uninterrupted run, so it may all-reduce the running statistics and continue from the sum. One
written for `every_minutes` or a stop may not: there each rank's partial statistics are saved beside
the sum and restored, so that the run continues bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hvdlarge.checkpoint.content import CheckpointContent, RunFacts
from hvdlarge.checkpoint.folder import CheckpointWriter
from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.config.job import Checkpoint
from hvdlarge.models.state import LOSS, MODEL, pack, unpack
from hvdlarge.replica.replica import Replica
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.schedule.progress import Clock, milestones_reached


class CheckpointSaver:
    """Saves the state of a run. Every rank calls `save` together; the other methods are local.

    Args:
        control: gathers the partial running statistics.
        tensors: sums them.
        replica: the replica to save.
        folder: rank 0's folder; on other ranks `NoCheckpoints`.
        clock: of the run.
        cadence: the job's section `checkpoint`.
        rankings: names of results, in order of preference for the choice of the best evaluation,
            and whether a higher value is better.
        facts: recorded in every checkpoint.
        log_offsets: returns the lengths of rank 0's logs, to which a resumed run truncates them.
        can_roll_back: whether rollbacks are possible, so that the last scheduled checkpoint is
            kept.
    """

    def __init__(
        self,
        control: ControlChannel,
        tensors: Collectives,
        replica: Replica,
        folder: CheckpointWriter,
        clock: Clock,
        cadence: Checkpoint,
        rankings: Mapping[str, bool],
        facts: RunFacts,
        log_offsets: Callable[[], Mapping[str, int]],
        can_roll_back: bool = False,
    ) -> None:
        self._control, self._tensors, self._replica = control, tensors, replica
        self._folder = folder
        self._clock = clock
        self._cadence = cadence
        self._rankings = rankings
        self._facts = facts
        self._log_offsets = log_offsets
        self._can_roll_back = can_roll_back
        self._last_save = time.monotonic()

    def wants_save(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed since the last save; False off rank 0."""
        minutes = self._cadence.every_minutes
        return (
            minutes is not None
            and self._control.rank == 0
            and time.monotonic() - self._last_save >= 60 * minutes
        )

    def failed(self) -> bool:
        """Whether the last checkpoint could not be written."""
        return self._folder.failed

    def is_scheduled(self, decision: Decision) -> bool:
        """Whether the job requires a checkpoint after this step; depends on the decision alone."""
        cadence = self._cadence
        if decision.is_last:
            return True
        if cadence.every_steps is not None and (decision.step + 1) % cadence.every_steps == 0:
            return True
        if cadence.epochs is None:
            return False
        after = self._clock.epoch(decision.samples_seen + decision.global_batch)
        return milestones_reached(after, cadence.epochs, None) > milestones_reached(
            decision.epoch, cadence.epochs, None
        )

    def is_best(self, state: TrainState, decision: Decision, results: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far; if so, `state.best` is updated. The same on
        every rank.
        """
        by = next((name for name in self._rankings if name in results), None)
        if by is None:
            return False
        value = results[by] if self._rankings[by] else -results[by]
        if math.isnan(value):  # possible with averaged weights and the current statistics
            return False
        best = state.best
        # After a change of `checkpoint.best` the values cannot be compared: start over
        if best is not None and best["by"] == by and value <= best["value"]:
            return False
        state.best = {"by": by, "value": value, "step": float(decision.step + 1)}
        return True

    def save(
        self,
        progress: RunProgress | None,
        state: TrainState,
        best: bool,
        scheduled: bool,
        wait: bool,
        truncated: bool = False,
    ) -> None:
        """Save the state of the run. Every rank calls this together; only rank 0 writes.

        Args:
            progress: of the run; needed on rank 0 only.
            state: of the run.
            best: whether the last evaluation is the best so far.
            scheduled: whether an uninterrupted run saves here too.
            wait: whether to return only when it is on disk; else training continues meanwhile.
            truncated: whether the end of the run cut the last step short.

        Raises:
            CheckpointWriteError: on rank 0 only; the caller raises it on the others.
        """
        statistics = self._replica.statistics
        snapshot = statistics.snapshot()
        local_stats = [] if scheduled else self._gather(snapshot.local_stats)
        statistics.all_reduce(self._tensors.sum)
        self._replica.carried.share()
        try:
            if self._control.rank == 0:
                assert progress is not None  # rank 0 has the controller
                self._last_save = time.monotonic()
                content = self._content(progress, truncated, state, local_stats)
                also_keep = state.scheduled_step if self._can_roll_back else None
                self._folder.save(content.to_plain(), progress.step, best, wait, also_keep)
        finally:
            if scheduled:
                statistics.to_partial()
            else:
                statistics.restore(snapshot)

    def _content(
        self,
        progress: RunProgress,
        truncated: bool,
        state: TrainState,
        local_stats: Sequence[torch.Tensor],
    ) -> CheckpointContent:
        states = {
            prefix: _copy_to_cpu(module.state_dict())
            for prefix, module in self._replica.modules.items()
        }
        averaged: dict[str, Mapping[str, Any]] = {}
        if (ema := self._replica.ema) is not None:
            averaged = {
                prefix: ema.state_of(module, states[prefix])
                for prefix, module in self._replica.modules.items()
            }
        return CheckpointContent(
            facts=self._facts,
            model=states[MODEL],
            loss=states.get(LOSS, {}),
            optimizer=optimizer_state(self._replica),
            progress=progress,
            truncated=truncated,
            state=state,
            local_stats=tuple(local_stats),
            log_offsets=self._log_offsets(),
            ema=averaged.get(MODEL, {}),
            ema_loss=averaged.get(LOSS, {}),
            carried=_copy_to_cpu(self._replica.carried.named_tensors()),
        )

    def _gather(self, local_stats: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's partial statistics as uint8 tensors; empty if no rank has any."""
        messages = self._control.allgather(local_stats.cpu().contiguous().numpy().tobytes())
        if not any(messages):
            return []
        return [torch.frombuffer(bytearray(message), dtype=torch.uint8) for message in messages]

    def finish(self) -> None:
        """Wait for the checkpoint being written. Raises CheckpointWriteError on rank 0 only."""
        self._folder.finish()


def optimizer_state(replica: Replica) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name: numbers, and tensors copied to the CPU."""
    return {
        replica.names[weight]: {  # type: ignore[index]
            key: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
            for key, value in state.items()
        }
        for weight, state in replica.update.optimizer.state.items()
    }


def _copy_to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of a state_dict; entries that are not tensors are extra state."""
    return {
        name: value.detach().to("cpu", copy=True)
        if isinstance(value, torch.Tensor)
        else unpack(pack({name: value}))[name]
        for name, value in state.items()
    }
