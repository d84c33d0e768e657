"""When and what is saved: the state of a run between two steps, from which it goes on as if it had
never stopped.

A checkpoint that the job's cadence asks for is part of the run: an undisturbed run writes it too,
so gathering and scattering the running statistics there changes nothing between the two. One that a
clock or a stop asks for is not: there every rank's part is kept beside the sum and put back, so
that the last bits stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hvdlarge.checkpoint.content import CheckpointContent, RunFacts
from hvdlarge.checkpoint.folder import CheckpointWriter
from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.config.job import Checkpoint
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
        folder: rank 0's; on the other ranks one that writes nothing.
        clock: of the run.
        cadence: the job's section.
        rankings: the results that may decide on the best evaluation, the first that is there before
            the others, and whether a higher value of each is better.
        facts: what every checkpoint carries.
        log_offsets: where rank 0's logs end, so that a resumed run can cut off what came after.
        goes_back: whether the run may go back to the last checkpoint of its cadence, which is kept
            then.
    """

    def __init__(
        self,
        control: ControlChannel,
        tensors: Collectives,
        learner: Replica,
        folder: CheckpointWriter,
        clock: Clock,
        cadence: Checkpoint,
        rankings: Mapping[str, bool],
        facts: RunFacts,
        log_offsets: Callable[[], Mapping[str, int]],
        goes_back: bool = False,
    ) -> None:
        self._control, self._tensors, self._learner = control, tensors, learner
        self._folder = folder
        self._clock = clock
        self._cadence = cadence
        self._rankings = rankings
        self._facts = facts
        self._log_offsets = log_offsets
        self._goes_back = goes_back
        self._last_save = time.monotonic()

    def wants_save(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint; the other ranks' never do."""
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
        """Whether the job's cadence asks for a checkpoint after this step; a function of the
        decision alone.
        """
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
        progress: RunProgress | None,
        state: TrainState,
        best: bool,
        scheduled: bool,
        wait: bool,
        truncated: bool = False,
    ) -> None:
        """Save the state of the run. Every rank calls this together; only rank 0 writes.

        Args:
            progress: where the run stands; needed on rank 0 alone.
            state: what else the checkpoint holds.
            best: whether it is the best so far.
            scheduled: whether an undisturbed run saves here too.
            wait: return when it is on disk; else the writing goes on beside the training.
            truncated: whether the last step was cut short by the end of the run.

        Raises:
            CheckpointWriteError: on rank 0 alone; the caller raises it on the others.
        """
        statistics = self._learner.statistics
        snapshot = statistics.snapshot()
        # Where an undisturbed run saves too, the sum stands for all parts
        parts = [] if scheduled else self._gather(snapshot.local_stats)
        statistics.all_reduce(self._tensors.sum)
        try:
            if self._control.rank == 0:
                assert progress is not None  # rank 0 has the controller
                self._last_save = time.monotonic()
                content = self._content(progress, truncated, state, parts)
                also_keep = state.scheduled_step if self._goes_back else None
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
        parts: Sequence[torch.Tensor],
    ) -> CheckpointContent:
        loss = self._learner.loss
        return CheckpointContent(
            facts=self._facts,
            model=_copied(self._learner.model.state_dict()),
            loss=_copied(loss.state_dict()) if isinstance(loss, torch.nn.Module) else {},
            optimizer=optimizer_state(self._learner),
            progress=progress,
            truncated=truncated,
            state=state,
            local_stats=tuple(parts),
            log_offsets=self._log_offsets(),
        )

    def _gather(self, local_stats: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's part, as tensors of bytes: a checkpoint holds nothing that
        torch.load(weights_only=True) does not know. Empty where no rank has any.
        """
        parts = self._control.allgather(local_stats.cpu().contiguous().numpy().tobytes())
        if not any(parts):
            return []
        return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]

    def finish(self) -> None:
        """Wait for what is being written. Raises CheckpointWriteError on rank 0 alone."""
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
