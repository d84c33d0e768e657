"""When and what is saved: the state of a run between two steps, from which it goes on as if it had
never stopped.

A checkpoint that the job's cadence asks for is part of the run: an undisturbed run writes it too,
so gathering and scattering the running statistics there changes nothing between the two. One that a
clock or a stop asks for is not: there every rank's part is kept beside the sum and put back, so
that the last bits stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hvdlarge.checkpoint.folder import CheckpointFolder
from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.models.state import pack, unpack
from hvdlarge.replica import Replica
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.schedule.progress import Clock, milestones_reached
from hvdlarge.train_state import TrainState


class CheckpointSaver:
    """Writes checkpoints when they are due. All methods but `wants_save` and `failed` are called by
    every rank together.

    Args:
        control: the channel on which parts of the running statistics are collected.
        tensors: the collectives with which they are summed.
        learner: what is saved.
        folder: on rank 0; None elsewhere.
        clock: of the run.
        every_epochs: cadence, or None.
        every_steps: cadence, or None.
        every_minutes: cadence of rank 0's clock, or None.
        rankings: the results that may decide on the best evaluation, the first that is there before
            the others, and whether a higher value of each is better.
        facts: what every checkpoint carries: the job, the data, versions.
        log_offsets: where rank 0's logs end, so that a resumed run can cut off what came after.
        goes_back: whether the run may go back to the last checkpoint of its cadence, which is kept
            then.
    """

    def __init__(
        self,
        control: ControlChannel,
        tensors: Collectives,
        learner: Replica,
        folder: CheckpointFolder | None,
        clock: Clock,
        every_epochs: float | None,
        every_steps: int | None,
        every_minutes: float | None,
        rankings: Mapping[str, bool],
        facts: dict[str, Any],
        log_offsets: Callable[[], dict[str, int]],
        goes_back: bool = False,
    ) -> None:
        self._control, self._tensors, self._learner = control, tensors, learner
        self._folder = folder
        self._clock = clock
        self._every_epochs, self._every_steps = every_epochs, every_steps
        self._every_seconds = None if every_minutes is None else 60 * every_minutes
        self._rankings = rankings
        self._facts = facts
        self._log_offsets = log_offsets
        self._goes_back = goes_back
        self._last_save = time.monotonic()

    def wants_save(self) -> bool:
        """Whether this rank's clock asks for a checkpoint; rank 0's alone counts."""
        return (
            self._folder is not None
            and self._every_seconds is not None
            and time.monotonic() - self._last_save >= self._every_seconds
        )

    def failed(self) -> bool:
        """Whether rank 0 could not write the last checkpoint."""
        return self._folder is not None and self._folder.failed

    def is_scheduled(self, decision: Decision) -> bool:
        """Whether the job's cadence asks for a checkpoint after this step; a function of the
        decision alone.
        """
        if decision.is_last:
            return True
        if self._every_steps is not None and (decision.step + 1) % self._every_steps == 0:
            return True
        if self._every_epochs is None:
            return False
        after = self._clock.epoch(decision.samples_seen + decision.global_batch)
        return milestones_reached(after, self._every_epochs, None) > milestones_reached(
            decision.epoch, self._every_epochs, None
        )

    def is_best(self, state: TrainState, decision: Decision, results: Mapping[str, float]) -> bool:
        """Take an evaluation into account; whether it is the best so far. The same on every
        rank.
        """
        by = next((name for name in self._rankings if name in results), None)
        if by is None:
            return False
        value = results[by] if self._rankings[by] else -results[by]
        best = state.best
        # Where a resume goes by another result, the best so far says nothing: it is begun anew.
        if best is not None and best.get("by", by) == by and value <= best["value"]:
            return False
        state.best = {"by": by, "value": value, "step": float(decision.step + 1)}
        return True

    def save(
        self,
        position: RunProgress | None,
        truncated: bool,
        state: TrainState,
        best: bool,
        scheduled: bool,
        wait: bool,
    ) -> None:
        """Save the state of the run. Every rank calls this together; only rank 0 writes.

        Args:
            position: where the run stands, on rank 0; None elsewhere.
            truncated: whether the last step was cut short by the end of the run.
            state: what else the checkpoint holds.
            best: whether it is the best so far.
            scheduled: whether an undisturbed run saves here too.
            wait: return when it is on disk; else the writing goes on beside the training.

        Raises:
            CheckpointWriteError: on rank 0 alone; the caller tells the others.
        """
        statistics = self._learner.statistics
        kept = statistics.snapshot()
        parts = (
            []
            if scheduled
            else _as_tensors(
                self._control.allgather(kept.local_stats.cpu().contiguous().numpy().tobytes())
            )
        )
        statistics.all_reduce(self._tensors.sum)
        try:
            if self._folder is not None:
                assert position is not None  # rank 0 has the controller
                self._last_save = time.monotonic()
                self._folder.save(
                    self._content(position, truncated, state, parts),
                    position.step,
                    best,
                    wait,
                    state.scheduled_step if self._goes_back else None,
                )
        finally:
            if scheduled:
                statistics.to_partial()
            else:
                statistics.restore(kept)

    def _content(
        self, position: RunProgress, truncated: bool, state: TrainState, parts: list[torch.Tensor]
    ) -> dict[str, Any]:
        """What a checkpoint holds; `parts` are the ranks' running statistics, where they are kept
        beside the sum.
        """
        model, loss = self._learner.model, self._learner.loss
        return {
            **self._facts,
            "model": _copied(model.state_dict()),
            "loss": _copied(loss.state_dict()) if isinstance(loss, torch.nn.Module) else {},
            "optimizer": optimizer_state(self._learner),
            "world_size": self._control.size,
            "position": position.to_plain(),
            "truncated": truncated,
            "state": {**vars(state), "results": dict(state.results)},
            "statistics": {"world_size": self._control.size, "parts": parts},
            "logs": self._log_offsets(),
        }

    def finish(self) -> None:
        """Wait for what is being written. Raises CheckpointWriteError on rank 0 alone."""
        if self._folder is not None:
            self._folder.finish()


def optimizer_state(learner: Replica) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name: tensors, copied to the CPU, and numbers."""
    return {
        learner.names[weight]: {  # type: ignore[index]
            key: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
            for key, value in state.items()
        }
        for weight, state in learner.update.optimizer.state.items()
    }


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict that nobody changes any more; an entry that is no tensor is extra state."""
    return {
        name: value.detach().cpu().clone()
        if isinstance(value, torch.Tensor)
        else unpack(pack({name: value}))[name]
        for name, value in state.items()
    }


def _as_tensors(messages: list[bytes]) -> list[torch.Tensor]:
    """Bytes as tensors: a checkpoint holds nothing that torch.load(weights_only=True) does not
    know, and bytes are among that.
    """
    return (
        [torch.frombuffer(bytearray(message), dtype=torch.uint8) for message in messages]
        if any(messages)
        else []
    )
