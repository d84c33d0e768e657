"""The controller: rank 0 decides every step, and every worker receives the same bytes.

`Controller` is the state machine that turns a job's schedules into decisions; it lives on rank 0
and needs neither torch nor MPI. `DecisionFeed` is what every rank holds: it receives decisions over
the control channel, some steps ahead, so that workers can load data across a growth or an epoch's
end without a bubble. No rank recomputes a decision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.schedule.decision import DECISION_BYTES, Decision
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.schedule.warmup import StageStart


class Controller:
    """Decides one step after the other, from a position to the last sample of the run."""

    def __init__(self, plan: Plan, position: RunProgress | None = None) -> None:
        position = position or RunProgress()
        self._plan = plan
        self._step = position.step
        self._samples_seen = position.samples_seen
        self._stages = list(position.stages)
        self._stage_batch = position.stage_batch
        self._lr_factor = position.lr_factor

    def decide(self) -> Decision | None:
        """The next step's decision; None when the run is complete."""
        plan, clock = self._plan, self._plan.clock
        left = clock.total_samples - self._samples_seen
        if left == 0:
            return None
        epoch = clock.epoch(self._samples_seen)
        stage_batch = plan.growth.global_batch(plan.initial_batch, epoch)
        if stage_batch != self._stage_batch:
            self._stages.append(StageStart(epoch, stage_batch / plan.base_batch))
            self._stage_batch = stage_batch
        global_batch = min(stage_batch, left)
        end = clock.epoch(self._samples_seen + global_batch)
        decision = Decision(
            step=self._step,
            samples_seen=self._samples_seen,
            epoch=epoch,
            stage=len(self._stages) - 1,
            stage_batch=stage_batch,
            global_batch=global_batch,
            micro_batch=plan.micro_batch_of(global_batch),
            lr=plan.rate.lr(self._stages, epoch, end, clock.epochs) * self._lr_factor,
            is_last=global_batch == left,
        )
        self._step += 1
        self._samples_seen += global_batch
        return decision

    def position_after(self, followed: Decision) -> RunProgress:
        """Where the run stands once `followed`, a decision given earlier, has been acted on."""
        return RunProgress(
            step=followed.step + 1,
            samples_seen=followed.samples_seen + followed.global_batch,
            stages=tuple(self._stages[: followed.stage + 1]),
            stage_batch=followed.stage_batch,
            lr_factor=self._lr_factor,
        )

    def final_position(self) -> RunProgress:
        """Where the run stands when everything that was decided has been followed."""
        return RunProgress(
            self._step, self._samples_seen, tuple(self._stages), self._stage_batch, self._lr_factor
        )


class DecisionFeed:
    """Decisions as they reach a worker, `ahead` steps before they are acted on.

    Args:
        control: the channel between the ranks.
        controller: on rank 0; None elsewhere.
        ahead: decisions in hand beyond the current one.
        announce: told of every decision as soon as it is known, in order (the loader starts
            fetching).
    """

    def __init__(
        self,
        control: ControlChannel,
        controller: Controller | None,
        ahead: int,
        announce: Callable[[Decision], None],
    ) -> None:
        if (control.rank == 0) != (controller is not None):
            raise ValueError("rank 0, and only rank 0, has a controller")
        self._control = control
        self._controller = controller
        self._ahead = ahead
        self._announce = announce
        self._known: deque[Decision] = deque()
        self._complete = False

    def next(self) -> Decision | None:
        """The decision of the coming step; None when the run is complete. Every rank calls this
        together.
        """
        while not self._complete and len(self._known) <= self._ahead:
            self._receive()
        if not self._known:
            return None
        return self._known.popleft()

    def progress_after(self, followed: Decision) -> RunProgress | None:
        """Where the run stands once `followed` has been acted on, on rank 0; None elsewhere."""
        return None if self._controller is None else self._controller.position_after(followed)

    def final_progress(self) -> RunProgress:
        """Where the run stands when every decision has been acted on. Rank 0 alone."""
        assert self._controller is not None  # rank 0 has it
        return self._controller.final_position()

    def _receive(self) -> None:
        record = None
        if self._controller is not None:
            decided = self._controller.decide()
            # The last decision says so, and nothing is asked for after it
            assert decided is not None
            record = decided.to_bytes()
        decision = Decision.from_bytes(self._control.broadcast(record, DECISION_BYTES))
        self._complete = decision.is_last
        self._known.append(decision)
        self._announce(decision)
