"""Warmup of the learning rate, also when the batch grows while the rate is still rising.

Formula:  W(k) = warmup length in epochs:  none: 0;  linear: w;  legw: w0·k
          before any growth:  multiplier(e) = scale(k) · min(1, e / W(k))
          on_growth = jump:   multiplier(e) = scale(k(e)) · min(1, e / W(k_0)),
                              k_0 = batch factor of the first stage
          on_growth = ramp:   at a growth from k to k' at epoch e the multiplier rises linearly from
                              its value at e to scale(k') over so many epochs:
                              legw: max(w0·k' − e, w0·(k' − k));  linear: w;  none: 0
Source:   linear: Goyal et al. (2017), section 2.2; legw: You et al., LEGW (UCB/EECS-2018-138;
          2019): a batch k times larger warms up over k times as many epochs, hence over the same
          number of *iterations*. jump is AdaBatch's own reading (the rate changes with the batch,
          in the same step). ramp is ours: no paper says what happens when a batch grows during a
          LEGW run.
Contract: pure; the multiplier never falls while batches only grow; it is continuous where a warmup
          or ramp ends.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from hvdlarge.schedule.scaling import Scaling, scale
from hvdlarge.schedule.section import Policy

OnGrowth = Literal["jump", "ramp"]


class StageStart(NamedTuple):
    """Where a stage of constant batch began."""

    epoch: float  # epochs
    batch_factor: float  # k = global_batch / base_batch


class Warmup(Policy, ABC):
    """How the learning rate rises at the start of a run, and at growths of the batch."""

    @property
    @abstractmethod
    def on_growth(self) -> OnGrowth:
        """At a growth of the batch: `ramp` up to the new lr, or `jump` to it."""

    @abstractmethod
    def length(self, batch_factor: float) -> float:
        """Length in epochs, for a run that begins with k = `batch_factor`."""

    @abstractmethod
    def ramp_length(self, epoch: float, before: float, after: float) -> float:
        """Epochs over which the lr follows a growth from k = `before` to `after` at `epoch`, with
        `on_growth: ramp`.
        """

    def length_as_arithmetic(self, batch_factor: float) -> str:
        """The computation of `length`, for messages; empty if the job gives it directly."""
        return ""


def _check_epochs(epochs: float) -> None:
    if not (math.isfinite(epochs) and epochs >= 0):
        raise ValueError(f"epochs must be 0 or more, got {epochs}")


@dataclass(frozen=True)
class NoWarmup(Warmup):
    """The full rate from the first step on."""

    policy: Literal["none"] = "none"
    """The full rate from the first step on."""
    on_growth: ClassVar[OnGrowth] = "jump"  # there is nothing to ramp over

    def length(self, batch_factor: float) -> float:
        """Warmup length in epochs: 0."""
        return 0.0

    def ramp_length(self, epoch: float, before: float, after: float) -> float:
        """Epochs over which the rate follows a growth: 0, at once."""
        return 0.0


@dataclass(frozen=True)
class LinearWarmup(Warmup):
    """A linear warmup over a fixed number of epochs, whatever the batch."""

    policy: Literal["linear"] = "linear"
    """A linear warmup of fixed length (Goyal et al. 2017)."""
    epochs: float = 5.0
    """Length, in epochs."""
    on_growth: OnGrowth = "jump"
    """At a growth of the batch: `ramp` up to the new rate, or `jump` to it."""

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)

    def length(self, batch_factor: float) -> float:
        """Warmup length in epochs: the same for every batch."""
        return self.epochs

    def ramp_length(self, epoch: float, before: float, after: float) -> float:
        """Epochs over which the rate follows a growth from k = `before` to `after` at `epoch`: one
        warmup.
        """
        return self.epochs


@dataclass(frozen=True)
class LegwWarmup(Warmup):
    """LEGW, the linear-epoch gradual warmup: the length in epochs grows with the batch.

    >>> LegwWarmup(epochs=10 / 2**5).length(32768 / 1024)
    10.0
    """

    policy: Literal["legw"] = "legw"
    """LEGW (You et al. 2019): the length in epochs grows with the batch."""
    epochs: float = 0.0
    """Warmup at `batch.base`, in epochs; a batch k times as large has one k times as long. LEGW is
    this warmup together with `lr.scaling: sqrt`."""
    on_growth: OnGrowth = "ramp"
    """At a growth of the batch: `ramp` up to the new rate, or `jump` to it."""

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)

    def length(self, batch_factor: float) -> float:
        """Warmup length in epochs for k = `batch_factor`."""
        return self.epochs * batch_factor

    def ramp_length(self, epoch: float, before: float, after: float) -> float:
        """Epochs over which the lr follows a growth from k = `before` to `after` at `epoch`."""
        return max(self.epochs * after - epoch, self.epochs * (after - before))

    def notes(self, epochs: float) -> Iterator[str]:
        """A note if it never acts."""
        if self.epochs == 0:
            yield "epochs is 0: there is no warmup, and the lr jumps at a growth of the batch"

    def length_as_arithmetic(self, batch_factor: float) -> str:
        """The product that gives the length."""
        return f"{self.epochs:g} × {batch_factor:g}, the first batch over the base batch"


def multiplier(
    warmup: Warmup, scaling: Scaling, stages: Sequence[StageStart], epoch: float
) -> float:
    """What multiplies the base rate at `epoch`, before decay.

    Args:
        warmup: the policy.
        scaling: how the rate follows the batch.
        stages: the stages begun so far, in order, the first at epoch 0.
        epoch: progress, in epochs, not before the last stage's start.

    >>> run = [StageStart(0.0, 1.0), StageStart(2.0, 4.0)]
    >>> legw = LegwWarmup(epochs=0.5)
    >>> [round(multiplier(legw, "sqrt", run, epoch), 3) for epoch in (2.0, 2.75, 3.5, 9.0)]
    [1.0, 1.5, 2.0, 2.0]
    """
    first = stages[0]
    if warmup.on_growth == "jump":
        now = scale(scaling, stages[-1].batch_factor)
        return now * _fraction(epoch, warmup.length(first.batch_factor))

    begin, begin_value = first.epoch, 0.0
    length, end_value = warmup.length(first.batch_factor), scale(scaling, first.batch_factor)
    before = first.batch_factor
    for stage in stages[1:]:
        begin_value += (end_value - begin_value) * _fraction(stage.epoch - begin, length)
        begin, end_value = stage.epoch, scale(scaling, stage.batch_factor)
        length = warmup.ramp_length(stage.epoch, before, stage.batch_factor)
        before = stage.batch_factor
    return begin_value + (end_value - begin_value) * _fraction(epoch - begin, length)


def full_lr_epoch(warmup: Warmup, stages: Sequence[StageStart]) -> float:
    """The epoch at which the rate of the last of `stages` is fully reached."""
    last = stages[-1]
    if len(stages) == 1 or warmup.on_growth == "jump":
        return max(last.epoch, warmup.length(stages[0].batch_factor))
    return last.epoch + warmup.ramp_length(last.epoch, stages[-2].batch_factor, last.batch_factor)


def _fraction(passed: float, length: float) -> float:
    return 1.0 if passed >= length else passed / length
