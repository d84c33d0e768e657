"""The schedules of a job put together, and where a run stands in them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import Any

from hvdlarge.schedule.batch import BatchLayout
from hvdlarge.schedule.decision import Decision
from hvdlarge.schedule.growth import Growth
from hvdlarge.schedule.lr import LRSchedule
from hvdlarge.schedule.outline import StageOutline, outline
from hvdlarge.schedule.progress import Clock
from hvdlarge.schedule.warmup import StageStart


@dataclass(frozen=True)
class Plan:
    """What the controller follows: the schedules of a job and the size of its world."""

    clock: Clock
    base_batch: int  # samples; where k = 1
    initial_batch: int  # samples, of the first stage
    micro_batch: int | None  # samples; None: each step is shared evenly over the workers
    growth: Growth
    lr_schedule: LRSchedule
    world_size: int  # workers
    # Samples that fit at once on every worker; None: as many as there are
    largest_micro_batch: int | None = None

    @functools.cached_property
    def stages(self) -> list[StageOutline]:
        """Its stages, as far as they are known before the run; the last one records whether they
        end before the run does. Found once: for a long run that takes a second.

        Raises:
            ValueError: if the growth gives a smaller batch after a larger one.
        """
        return outline(
            self.clock, self.base_batch, self.initial_batch, self.growth, self.lr_schedule
        )

    def micro_batch_of(self, global_batch: int) -> int:
        """Samples of one forward/backward pass in a step of `global_batch` samples."""
        if self.micro_batch is not None:
            return self.micro_batch
        share = -(-global_batch // self.world_size)
        passes = 1 if self.largest_micro_batch is None else -(-share // self.largest_micro_batch)
        return -(-share // passes)

    def fingerprint(self) -> str:
        """What stands for the schedule: 16 hexadecimal digits, the same for the same decisions
        whatever the number of workers.
        """
        plain = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("world_size", "largest_micro_batch")
        }
        text = json.dumps(_plain(plain), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def layout(self, decision: Decision) -> BatchLayout:
        """How a decided step is dealt to the workers."""
        return BatchLayout(decision.global_batch, decision.micro_batch, self.world_size)

    def waits_after(self, decision: Decision) -> bool:
        """Whether the decision after this one waits until its step has been taken, since it depends
        on what is measured. The same on every rank, and for any number of workers.
        """
        after = self.clock.epoch(decision.samples_seen + decision.global_batch)
        return self.growth.depends_on_measurement and self.growth.acts_between(
            decision.epoch, after
        )


def _plain(value: Any) -> Any:
    """Settings as JSON has them; those that it has no form for (of own policies: dates, decimals,
    enums) by their repr. Sets are sorted: their order differs between processes.
    """
    if isinstance(value, dict):
        return {
            key if isinstance(key, (str, int, float, NoneType)) else repr(key): _plain(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return value if isinstance(value, (str, int, float, NoneType)) else repr(value)


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands between two steps: all that the controller needs to go on from there.

    What was decided ahead is no part of it: every decision is a function of the plan, of this and
    of what is measured from here on, and the plan may change at a resume (a run may become longer
    or shorter, and with it what its last step is).
    """

    step: int = 0  # steps taken
    samples_seen: int = 0  # samples
    stages: tuple[StageStart, ...] = ()  # begun so far
    stage_batch: int = 0  # samples per update of the last of them
    lr_factor: float = 1.0  # product of the factors of all rollbacks
    # By name, as of the last step that updated the weights; empty unless the growth depends on it
    measured: Mapping[str, float] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """As builtins, for a checkpoint."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "stages": [[stage.epoch, stage.batch_factor] for stage in self.stages],
            "measured": dict(self.measured),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RunProgress:
        """The progress that `to_plain` gave."""
        return cls(
            **{name: plain[name] for name in _PLAIN},
            stages=tuple(StageStart(*stage) for stage in plain["stages"]),
            measured=dict(plain["measured"]),
        )


_PLAIN = ("step", "samples_seen", "stage_batch", "lr_factor")
