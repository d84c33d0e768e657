"""Policies for mean gradients that are not finite: stop the run, skip the step, or roll back.

Gradients are checked after the all-reduce, so every rank takes the same branch. A loss can be
non-finite while the gradients are finite; it is summed only when it is logged, after the update,
so such a step can no longer be skipped.
"""

from __future__ import annotations

from typing import NoReturn, Protocol

from hvdlarge.exits import DivergedError
from hvdlarge.optim.interface import GradientNorms
from hvdlarge.optim.precision import LossScaler
from hvdlarge.reduction.batch_norm import Snapshot
from hvdlarge.replica.replica import Replica
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.decision import Decision


class NonFinitePolicy(Protocol):
    """Decides what happens to a step whose mean gradients are not finite."""

    def before_step(self, replica: Replica) -> None:
        """Save the state that a skipped step must leave unchanged."""
        ...

    def check(self, decision: Decision, replica: Replica, norms: GradientNorms) -> bool:
        """Whether to apply the update, by the norms of the mean gradients. The same on every rank.

        Raises:
            RunExit, RollBack: on every rank.
        """
        ...

    def check_loss(self, decision: Decision, loss: float) -> None:
        """The mean loss of an applied step is not finite. Raises what `check` does, on every
        rank.
        """
        ...


class RollBack(Exception):
    """Roll back to the last scheduled checkpoint and continue with a lower learning rate; raised on
    every rank.
    """

    def __init__(self, reason: str, lr_factor: float) -> None:
        super().__init__(reason)
        self.lr_factor = lr_factor


class _StopAtLoss:
    """A loss that is not finite ends the run."""

    def check_loss(self, decision: Decision, loss: float) -> None:
        """Raise DivergedError."""
        raise DivergedError(_describe_loss(decision, loss))


class StopPolicy(_StopAtLoss):
    """The first such step ends the run."""

    def before_step(self, replica: Replica) -> None:
        """Do nothing."""

    def check(self, decision: Decision, replica: Replica, norms: GradientNorms) -> bool:
        """Apply, or raise DivergedError."""
        if not_finite := norms.not_finite(replica.names):
            raise DivergedError(_describe(decision, not_finite, replica))
        return True


class SkipPolicy(_StopAtLoss):
    """Skips the step on every rank: weights, momentum and running statistics stay unchanged.

    Args:
        limit: maximum number of skipped steps in a run.
        skipped: steps skipped before this start.
    """

    def __init__(self, limit: int, skipped: int = 0) -> None:
        self.skipped = skipped
        self._limit = limit
        self._snapshot: Snapshot | None = None

    def before_step(self, replica: Replica) -> None:
        """Keep the running statistics, which the forward passes change."""
        self._snapshot = replica.statistics.snapshot()

    def check(self, decision: Decision, replica: Replica, norms: GradientNorms) -> bool:
        """Skip the step, or raise DivergedError if too many have been skipped."""
        if not (not_finite := norms.not_finite(replica.names)):
            return True
        self.skipped += 1
        if self.skipped > self._limit:
            raise DivergedError(
                f"{_describe(decision, not_finite, replica)}; {self._limit} such steps have been "
                "skipped already"
            )
        assert self._snapshot is not None
        replica.statistics.restore(self._snapshot)
        return False


class RollbackPolicy:
    """Rolls back to the last checkpoint of the cadence.

    Args:
        limit: maximum number of rollbacks in a run.
        lr_factor: factor of the learning rate for each.
        rolled_back: so far.
    """

    def __init__(self, limit: int, lr_factor: float, rolled_back: int = 0) -> None:
        self._limit = limit
        self._lr_factor = lr_factor
        self._rolled_back = rolled_back

    def before_step(self, replica: Replica) -> None:
        """Do nothing: the checkpoint holds all state."""

    def check(self, decision: Decision, replica: Replica, norms: GradientNorms) -> bool:
        """Raise RollBack, or DivergedError when it has been done too often."""
        if not_finite := norms.not_finite(replica.names):
            self._roll_back(_describe(decision, not_finite, replica))
        return True

    def check_loss(self, decision: Decision, loss: float) -> None:
        """As `check`."""
        self._roll_back(_describe_loss(decision, loss))

    def _roll_back(self, reason: str) -> NoReturn:
        if self._rolled_back >= self._limit:
            raise DivergedError(f"{reason}; the run was rolled back {self._limit} times already")
        raise RollBack(reason, self._lr_factor)


class LossScalingPolicy:
    """Dynamic loss scaling for fp16 around another policy: an overflow skips the step and halves
    the scale.

    Args:
        then: consulted if the gradients are finite or the scale is 1 already.
        scale: moved by this policy.
        state: keeps the scale for a resume; changed in place.
    """

    def __init__(self, then: NonFinitePolicy, scale: LossScaler, state: TrainState) -> None:
        self._then = then
        self._scale = scale
        self._state = state
        self._snapshot: Snapshot | None = None
        scale.dynamic = state.loss_scale or LossScaler.FIRST

    def before_step(self, replica: Replica) -> None:
        """Keep the running statistics, which the forward passes change."""
        self._snapshot = replica.statistics.snapshot()
        self._then.before_step(replica)

    def check(self, decision: Decision, replica: Replica, norms: GradientNorms) -> bool:
        """Skip the step and halve the scale, or let the other policy check."""
        clean, scale = self._state.steps_at_loss_scale + 1, self._scale
        if scale.dynamic > 1 and norms.not_finite(replica.names):
            assert self._snapshot is not None
            replica.statistics.restore(self._snapshot)
            clean, scale.dynamic, applied = 0, scale.dynamic / 2, False
            self._state.overflows += 1
        else:
            applied = self._then.check(decision, replica, norms)
            if not applied:  # its gradients were not finite
                clean = 0
            elif clean == LossScaler.STEPS_BEFORE_GROWTH:
                clean, scale.dynamic = 0, min(2 * scale.dynamic, LossScaler.LARGEST)
        self._state.loss_scale, self._state.steps_at_loss_scale = scale.dynamic, clean
        return applied

    def check_loss(self, decision: Decision, loss: float) -> None:
        """As the other policy."""
        self._then.check_loss(decision, loss)


def _describe(decision: Decision, not_finite: list[str], replica: Replica) -> str:
    if count := replica.averaging.without_weight:
        where = "a micro-batch" if count == 1 else f"{count} micro-batches"
        advice = (
            f"{where} of this step had weight 0, such as one whose targets are all ignored: if the "
            "model or the loss divides by their number, let it divide by 1 at least, as the "
            "gradient of a mean over none is nan even where the mean is not used; else lower "
            "lr.base or warm up longer"
        )
    else:
        advice = (
            "lower lr.base or warm up longer; a mean over targets that are all ignored is not "
            "finite either"
        )
    others = f" and {len(not_finite) - 1} more" if len(not_finite) > 1 else ""
    return (
        f"the gradient of {not_finite[0]}{others} is not finite at step {decision.step} (epoch "
        f"{decision.epoch:.2f}, global batch {decision.global_batch}, lr {decision.lr:.4g}): "
        f"{advice}"
    )


def _describe_loss(decision: Decision, loss: float) -> str:
    return (
        f"the loss is {loss} at step {decision.step} (epoch {decision.epoch:.2f}, global batch "
        f"{decision.global_batch}) while the gradients are finite: most often all targets of a "
        "micro-batch are ignored (ignore_index), so that its mean has no sample; else look for a "
        "logarithm or a division by zero in the loss"
    )
