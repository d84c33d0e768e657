"""The controller: rank 0 decides every step, and every worker receives the same bytes.

`Controller` is the state machine that turns a job's schedules into decisions; it lives on rank 0 and needs neither torch nor
MPI. `DecisionFeed` is what every rank holds: it receives decisions over the control wire, some steps ahead, so that workers
can load data across a growth or an epoch's end without a bubble. No rank recomputes a decision.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hvdlarge.comm.world import ControlWire
from hvdlarge.data.layout import BatchLayout
from hvdlarge.schedule.decision import DECISION_BYTES, Decision
from hvdlarge.schedule.growth import Growth
from hvdlarge.schedule.progress import Clock
from hvdlarge.schedule.rate import RateSchedule
from hvdlarge.schedule.warmup import StageStart


@dataclass(frozen=True)
class Plan:
    """What the controller follows: the schedules of a job and the size of its world."""

    clock: Clock
    base_batch: int  # samples; where k = 1
    initial_batch: int  # samples, of the first stage
    micro_batch: int | None  # samples; None: each step is shared evenly over the workers
    growth: Growth
    rate: RateSchedule
    world_size: int  # workers
    largest_micro_batch: int | None = None  # samples that fit at once on every worker; None: as many as there are

    def micro_batch_of(self, global_batch: int) -> int:
        """Samples of one forward/backward pass in a step of `global_batch` samples."""
        if self.micro_batch is not None:
            return self.micro_batch
        share = -(-global_batch // self.world_size)
        passes = 1 if self.largest_micro_batch is None else -(-share // self.largest_micro_batch)
        return -(-share // passes)

    def fingerprint(self) -> str:
        """What stands for the schedule: 16 hexadecimal digits, the same for the same decisions whatever the number of workers."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("world_size", "largest_micro_batch")}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    def layout(self, decision: Decision) -> BatchLayout:
        """How a decided step is dealt to the workers."""
        return BatchLayout(decision.global_batch, decision.micro_batch, self.world_size)


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps: all that the controller needs to go on from there.

    What was decided ahead of it is no part of it: every decision is a function of the plan and of this, and the plan may change
    at a resume (a run may become longer or shorter, and with it what its last step is).
    """

    step: int = 0  # steps taken
    samples_seen: int = 0  # samples
    stages: tuple[StageStart, ...] = ()  # begun so far
    stage_batch: int = 0  # samples per update of the last of them
    lr_factor: float = 1.0  # what rollbacks have made of the rate

    def to_plain(self) -> dict[str, Any]:
        """As builtins, for a checkpoint."""
        return {
            **{name: getattr(self, name) for name in ("step", "samples_seen", "stage_batch", "lr_factor")},
            "stages": [[stage.epoch, stage.batch_factor] for stage in self.stages],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Position:
        """The position that `to_plain` wrote down."""
        return cls(
            **{name: plain[name] for name in ("step", "samples_seen", "stage_batch", "lr_factor")},
            stages=tuple(StageStart(*stage) for stage in plain["stages"]),
        )


class Controller:
    """Decides one step after the other, from a position to the last sample of the run."""

    def __init__(self, plan: Plan, position: Position | None = None) -> None:
        position = position or Position()
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

    def position_after(self, followed: Decision) -> Position:
        """Where the run stands once `followed`, a decision given earlier, has been acted on."""
        return Position(
            step=followed.step + 1,
            samples_seen=followed.samples_seen + followed.global_batch,
            stages=tuple(self._stages[: followed.stage + 1]),
            stage_batch=followed.stage_batch,
            lr_factor=self._lr_factor,
        )

    def final_position(self) -> Position:
        """Where the run stands when everything that was decided has been followed."""
        return Position(self._step, self._samples_seen, tuple(self._stages), self._stage_batch, self._lr_factor)


class DecisionFeed:
    """Decisions as they reach a worker, `ahead` steps before they are acted on.

    Args:
        control: the wire.
        controller: on rank 0; None elsewhere.
        ahead: decisions in hand beyond the current one.
        announce: told of every decision as soon as it is known, in order (the loader starts fetching).
    """

    def __init__(
        self,
        control: ControlWire,
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
        """The decision of the coming step; None when the run is complete. Every rank calls this together."""
        while not self._complete and len(self._known) <= self._ahead:
            self._receive()
        if not self._known:
            return None
        return self._known.popleft()

    def _receive(self) -> None:
        record = None
        if self._controller is not None:
            decided = self._controller.decide()
            assert decided is not None  # the last decision says so, and nothing is asked for behind it
            record = decided.to_bytes()
        decision = Decision.from_bytes(self._control.broadcast(record, DECISION_BYTES))
        self._complete = decision.is_last
        self._known.append(decision)
        self._announce(decision)
