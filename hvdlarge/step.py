"""One step: from decided micro-batches to moved weights. It stays on one screen; a new idea is an object handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from hvdlarge.arithmetic import Arithmetic, LossScale
from hvdlarge.comm.world import SummedUpdate
from hvdlarge.data import seeds
from hvdlarge.data.draws import seed_all
from hvdlarge.data.layout import BatchLayout
from hvdlarge.data.loader import Loaded
from hvdlarge.measure.timers import PhaseTimers
from hvdlarge.models.running_statistics import RunningStatistics
from hvdlarge.models.state import Modules
from hvdlarge.optim.groups import set_rate
from hvdlarge.optim.norms import GradientNorms
from hvdlarge.schedule.decision import Decision
from hvdlarge.step_agreement import StepAgreement, Verdict


@dataclass(frozen=True)
class Learner:
    """What learns, on one worker."""

    model: torch.nn.Module
    loss: Callable[[Any, Any], torch.Tensor]  # a mean over the samples of a micro-batch; a module's parameters are trained too
    modules: Modules  # both, the loss where it is a module
    update: SummedUpdate
    statistics: RunningStatistics
    arithmetic: Arithmetic
    scale: LossScale
    clip_norm: float | None  # of all mean gradients together
    to_device: Callable[[Any], Any]  # moves a micro-batch's inputs or targets, and gives floats the type of the weights
    names: dict[torch.nn.Parameter, str]  # of the trainable parameters, in the model's order
    seed: int
    rank: int
    zero_if_missing: bool = False  # a parameter without a gradient on some workers counts as having a gradient of zero there

    def set_mode(self, training: bool) -> None:
        """Put all of it into training or evaluation mode."""
        for module in self.modules.values():
            module.train(training)


class NotFinitePolicy(Protocol):
    """What becomes of a step whose mean gradients are not finite."""

    def before_step(self, learner: Learner) -> None:
        """Keep what a step that is left out must leave as it was."""
        ...

    def judge(self, decision: Decision, learner: Learner, norms: GradientNorms) -> bool:
        """Whether to apply the update, by the norms of the mean gradients. The same on every rank.

        Raises:
            RunEnds: on every rank alike, where the run does not go on from here.
        """
        ...

    def judge_loss(self, decision: Decision, loss: float) -> None:
        """The mean loss of an applied step is not finite. Raises what `judge` does, on every rank alike."""
        ...

    def settle(self, learner: Learner) -> None:
        """Judge whatever has not been judged yet, before a state is looked at or kept. Raises what `judge` does."""
        ...


class StepOutcome(NamedTuple):
    """What came of a step."""

    loss_share: torch.Tensor  # this worker's share of the mean loss, float64, shape (); all workers' shares add up to it
    verdict: Verdict  # the same on every rank
    applied: bool  # whether the weights have moved; the same on every rank


def train_step(
    decision: Decision,
    layout: BatchLayout,
    fetched: Iterable[Loaded],
    learner: Learner,
    agreement: StepAgreement,
    digest: int | None,
    policy: NotFinitePolicy,
    timed: PhaseTimers,
) -> StepOutcome:
    """Take the decided step. Every rank calls this together, with its own micro-batches in `fetched`."""
    mine = layout.numbers_of_rank(learner.rank)
    loss_share = torch.zeros((), dtype=torch.float64, device=learner.arithmetic.device)
    policy.before_step(learner)
    learner.update.begin(mine, layout.num_micro_batches)
    learner.statistics.begin_step()
    got_gradient: list[str] | None = None  # an idle worker has no view of it
    for micro_batch, inputs, targets in fetched:
        # What model and loss draw belongs to the micro-batch, named by its first sample: not to the worker that processes it.
        seed_all(seeds.key(learner.seed, seeds.MICRO_BATCH, micro_batch.start))
        with timed("forward"), learner.arithmetic.autocast():
            outputs = learner.model(learner.to_device(inputs))
            share = learner.loss(outputs, learner.to_device(targets)) * (micro_batch.size / decision.global_batch)
        with timed("backward"):
            learner.update.backward(learner.scale.scaled(share))
            loss_share += share.detach()
            if micro_batch.number == mine.stop - 1 and not learner.zero_if_missing:
                got_gradient = [name for weight, name in learner.names.items() if weight.grad is not None]
            learner.update.end_pass()
            learner.statistics.end_pass()
    with timed("allreduce"):
        agreement.send(decision, got_gradient, digest, uneven=learner.statistics.count_uses(len(mine)))
        learner.update.reduce()
        verdict = agreement.hear()
        learner.statistics.end_step(layout, verdict.uneven)
    with timed("update"):  # only now: the norms, and so the trust ratios of LARS, are those of the mean gradient
        learner.scale.unscale(learner.names)
        optimizer: Any = learner.update.optimizer
        norms = optimizer.measure()
        applied = policy.judge(decision, learner, norms)
        if applied:
            optimizer.gradient_norms = norms.clipped(learner.clip_norm)
            set_rate(optimizer, decision.lr)
            learner.update.apply()
    return StepOutcome(loss_share, verdict, applied)
