"""The training loop: decisions in, steps taken, logs and evaluations out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hvdlarge.comm.world import TensorWire
from hvdlarge.controller import DecisionFeed, Plan
from hvdlarge.data.loader import Loaded, Loader
from hvdlarge.evaluate import Evaluation
from hvdlarge.exits import Diverged, JobError
from hvdlarge.measure.timers import PhaseTimers
from hvdlarge.runlog import RunLog
from hvdlarge.schedule.progress import marks_reached
from hvdlarge.step import Learner, train_step


@dataclass(frozen=True)
class Cadence:
    """How often a run looks up from its steps."""

    log_every_steps: int
    evaluate_every_epochs: float


def train(
    feed: DecisionFeed,
    plan: Plan,
    loader: Loader,
    learner: Learner,
    tensors: TensorWire,
    evaluation: Evaluation | None,
    cadence: Cadence,
    log: RunLog | None,
) -> dict[str, float]:
    """Follow every decision to the end of the run. Every rank calls this together; `log` is rank 0's, None elsewhere.

    Returns:
        `loss` of the last step and the last evaluation's results; the same on every rank.

    Raises:
        Diverged: on every rank alike, when a recorded loss is not finite.
    """
    timed = PhaseTimers()
    learner.model.train()
    learner.statistics.scatter()
    evaluated = 0  # evaluation marks passed
    results: dict[str, float] = {}
    while True:
        with timed("decide"):
            decision = feed.next()
        if decision is None:
            gather(learner, tensors)
            return results
        if log is not None:
            log.decision(decision)
        layout = plan.layout(decision)
        fetched = timed_fetch(loader, len(layout.numbers_of_rank(learner.rank)), timed)
        loss_share = train_step(decision, layout, fetched, learner, timed)

        samples_seen = decision.samples_seen + decision.global_batch
        epoch = plan.clock.epoch(samples_seen)
        if decision.is_last or (decision.step + 1) % cadence.log_every_steps == 0:
            with timed("measure"):
                loss = tensors.sum(loss_share, "loss").item()
            if log is not None:
                progress = {"step": decision.step, "epoch": epoch, "samples_seen": samples_seen}
                step = {"global_batch": decision.global_batch, "lr": decision.lr, "loss": loss}
                log.metrics(progress | step | trust_ratios(learner.update.optimizer) | timed.read())
                log.progress(decision, samples_seen, loss)
            results["loss"] = loss
            if not math.isfinite(loss):
                raise Diverged(
                    f"the training loss is {loss} at step {decision.step} (epoch {epoch:.2f}, global batch "
                    f"{decision.global_batch}, lr {decision.lr:.4g}): lower lr.base or warm up longer"
                )
        marks = marks_reached(epoch, cadence.evaluate_every_epochs, None)
        if evaluation is not None and (decision.is_last or marks > evaluated):
            evaluated = marks
            with timed("measure"):
                gather(learner, tensors)
                found = evaluation.run(learner, tensors)
                if not decision.is_last:
                    learner.statistics.scatter()
            results |= found
            if log is not None:
                log.metrics({"step": decision.step, "epoch": epoch, "samples_seen": samples_seen} | found)
                log.evaluated(found)
            if not math.isfinite(found["test_loss"]):
                loss = found["test_loss"]
                raise Diverged(f"the test loss is {loss} at epoch {epoch:.2f}: lower lr.base or warm up longer")


def gather(learner: Learner, tensors: TensorWire) -> None:
    """Give every rank the full running statistics. Every rank calls this together.

    Raises:
        JobError: on every rank alike, for a model whose statistics do not follow the micro-batches.
    """
    try:
        learner.statistics.gather(tensors.sum)
    except ValueError as error:
        raise JobError(f"model.name: {error}") from None


def timed_fetch(loader: Loader, count: int, timed: PhaseTimers) -> Iterator[Loaded]:
    """The loader's next `count` micro-batches; the time spent waiting for them counts as the phase fetch."""
    fetched = loader.fetch(count)
    for _ in range(count):
        with timed("fetch"):
            loaded = next(fetched)
        yield loaded


def trust_ratios(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Smallest and largest trust ratio of the adapted tensors in the last step, for an optimizer that has them."""
    if not hasattr(optimizer, "trust_ratio_of"):
        return {}
    adapted = (weight for group in optimizer.param_groups if group["adapt"] for weight in group["params"])
    ratios = [ratio for ratio in map(optimizer.trust_ratio_of, adapted) if ratio is not None]
    return {"trust_ratio_min": min(ratios), "trust_ratio_max": max(ratios)} if ratios else {}
