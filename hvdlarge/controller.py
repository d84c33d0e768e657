"""The controller: rank 0 decides every step, and every worker receives the same bytes.

`Controller` is the state machine that turns a job's schedules into decisions; it lives on rank 0
and needs neither torch nor MPI. `DecisionFeed` is what every rank holds: it receives decisions over
the control channel, some steps ahead, so that workers can load data across a growth or an epoch's
end without a bubble. No rank recomputes a decision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.config.own_parts import is_own
from hvdlarge.config.part_errors import describe
from hvdlarge.exits import PartError
from hvdlarge.schedule.decision import DECISION_BYTES, Decision
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.schedule.section import Policy
from hvdlarge.schedule.warmup import StageStart


class PolicyError(PartError):
    """An own schedule policy raised in the run, or gave what it must not. Not a RunExit, since rank
    0 alone asks it.
    """

    origin = "a schedule policy of your own"


@contextmanager
def _naming_own(*policies: Policy) -> Iterator[None]:
    """Errors in the `with` block, in which policies are asked, name those of the user's own."""
    try:
        yield
    except Exception as error:
        own = [policy.policy for policy in policies if is_own(policy.policy)]
        if not own:
            raise
        raise PolicyError(f"{' or '.join(own)}: {describe(error)}") from error


class Controller:
    """Decides one step after the other, from where a run stands to its last sample.

    Where the growth depends on measurements, `observe` is called after each step that was taken.
    What a decision may use of that, `schedule.growth.Growth` says.
    """

    def __init__(self, plan: Plan, progress: RunProgress | None = None) -> None:
        progress = progress or RunProgress()
        self._plan = plan
        self._step = progress.step
        self._samples_seen = progress.samples_seen
        self._stages = list(progress.stages)
        self._stage_batch = progress.stage_batch
        self._lr_factor = progress.lr_factor
        self._steps_taken = progress.step
        self._measured: Mapping[str, float] = progress.measured

    def decide(self) -> Decision | None:
        """The next step's decision; None when the run is complete.

        Raises:
            RuntimeError: if it depends on steps that have not been observed yet.
            ValueError: if the growth makes the batch smaller.
            PolicyError: in place of any error of an own policy.
        """
        plan, clock = self._plan, self._plan.clock
        left = clock.total_samples - self._samples_seen
        if left <= 0:
            return None
        epoch = clock.epoch(self._samples_seen)
        stage_batch = self._batch_at(epoch)
        if stage_batch != self._stage_batch:
            self._stages.append(StageStart(epoch, stage_batch / plan.base_batch))
            self._stage_batch = stage_batch
        global_batch = min(stage_batch, left)
        end = clock.epoch(self._samples_seen + global_batch)
        schedule = plan.lr_schedule
        with _naming_own(schedule.warmup, schedule.decay):
            lr = schedule.lr(self._stages, epoch, end, clock.epochs)
        decision = Decision(
            step=self._step,
            samples_seen=self._samples_seen,
            epoch=epoch,
            stage=len(self._stages) - 1,
            stage_batch=stage_batch,
            global_batch=global_batch,
            micro_batch=plan.micro_batch_of(global_batch),
            lr=lr * self._lr_factor,
            is_last=global_batch == left,
        )
        self._step += 1
        self._samples_seen += global_batch
        return decision

    def _batch_at(self, epoch: float) -> int:
        """The batch of the step that begins at `epoch`."""
        growth, initial = self._plan.growth, self._plan.initial_batch
        current = self._stage_batch or initial
        if growth.depends_on_measurement:
            before = self._plan.clock.epoch(self._samples_seen - self._stage_batch)
            with _naming_own(growth):
                if not self._stages or not growth.acts_between(before, epoch):
                    return current
            if self._steps_taken < self._step:
                raise RuntimeError(
                    f"step {self._step} depends on what is measured in step {self._step - 1}, and "
                    f"{self._steps_taken} steps were observed"
                )
        with _naming_own(growth):
            return growth.checked_next_batch(initial, current, epoch, self._measured)

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        """Record that a step was taken, and what was measured in it.

        Args:
            step: the one after the last that was observed.
            measured: by name; the same for any number of workers. Empty for a step that was
                skipped: what was measured before stays.
        """
        if step != self._steps_taken:
            raise ValueError(f"step {step} is observed, step {self._steps_taken} was expected")
        self._steps_taken += 1
        self._measured = dict(measured) or self._measured

    def progress_after(self, followed: Decision) -> RunProgress:
        """Where the run stands once `followed`, a decision given earlier, has been acted on and, if
        the growth depends on it, observed as the last step so far.
        """
        return RunProgress(
            step=followed.step + 1,
            samples_seen=followed.samples_seen + followed.global_batch,
            stages=tuple(self._stages[: followed.stage + 1]),
            stage_batch=followed.stage_batch,
            lr_factor=self._lr_factor,
            measured=self._measured,
        )

    def final_progress(self) -> RunProgress:
        """Where the run stands when everything that was decided has been followed."""
        return RunProgress(
            self._step,
            self._samples_seen,
            tuple(self._stages),
            self._stage_batch,
            self._lr_factor,
            self._measured,
        )


class DecisionFeed:
    """Decisions as they reach a worker, up to `ahead` steps before they are acted on.

    Args:
        control: the channel between the ranks.
        controller: on rank 0; None elsewhere.
        ahead: decisions in hand beyond the current one.
        on_decision: called with every decision as soon as it is known, in order (the loader starts
            fetching).
        waits_after: see `Plan.waits_after`; None where no decision waits.
    """

    def __init__(
        self,
        control: ControlChannel,
        controller: Controller | None,
        ahead: int,
        on_decision: Callable[[Decision], None],
        waits_after: Callable[[Decision], bool] | None = None,
    ) -> None:
        if (control.rank == 0) != (controller is not None):
            raise ValueError("rank 0, and only rank 0, has a controller")
        self._control = control
        self._controller = controller
        self._ahead = ahead
        self._on_decision = on_decision
        self._waits_after = waits_after
        self._known: deque[Decision] = deque()
        self._complete = False

    def next(self) -> Decision | None:
        """The decision of the coming step; None when the run is complete. Every rank calls this
        together, when the step before has been taken.
        """
        while not self._complete and len(self._known) <= self._ahead and not self._waits():
            self._receive()
        if not self._known:
            return None
        return self._known.popleft()

    def progress_after(self, followed: Decision) -> RunProgress | None:
        """Where the run stands once `followed` has been acted on, on rank 0; None elsewhere."""
        return None if self._controller is None else self._controller.progress_after(followed)

    def final_progress(self) -> RunProgress:
        """Where the run stands when every decision has been acted on. Rank 0 alone."""
        assert self._controller is not None  # rank 0 has it
        return self._controller.final_progress()

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        """Give the controller what was measured in a step; see `Controller.observe`. Does nothing
        but on rank 0.
        """
        if self._controller is not None:
            self._controller.observe(step, measured)

    def _waits(self) -> bool:
        """Whether the next decision depends on a step that is still to be taken."""
        return (
            bool(self._known)
            and self._waits_after is not None
            and self._waits_after(self._known[-1])
        )

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
        self._on_decision(decision)
