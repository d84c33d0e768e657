"""The time of a job on any number of workers, from what a run and an all-reduce were measured to
take.

Formula:  step = max over busy workers of (k·m·s) + u + all-reduce − what of it hides
          k micro-batches of m samples on the busiest worker; s seconds for each sample, forward and
          backward; u for decision, update and log
Source:   the slowest of p workers, whose steps vary by σ√k: σ√k·Φ⁻¹((p − 0.375)/(p + 0.25)) above
          the mean (Blom 1958); all-reduce: comm/cost_model.py.
Contract: pure. On CPUs nothing hides, since the cores that sum are those that compute, and workers
          that share cores slow each other down in proportion. On GPUs all messages but the last
          may hide behind the last backward pass, two thirds of a micro-batch.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hvdlarge.comm.cost_model import AllreduceCost
from hvdlarge.config.planning import layout_of
from hvdlarge.schedule.plan import Plan

_BACKWARD_SHARE = 2 / 3  # of a micro-batch: the gradients of inputs and of weights, and one forward
_MOST_TRIED = 4096  # numbers of workers that a search looks at


@dataclass(frozen=True)
class StepCosts:
    """What a step was measured to take on one worker."""

    sample_seconds: float  # s
    update_seconds: float  # u
    jitter_seconds: float  # σ, of a micro-batch
    gradient_bytes: int  # that a worker sends in each step
    messages: int  # in which it sends them
    on_gpu: bool
    workers_per_host: int  # the most workers on one host
    threads: int  # of a worker
    cores: int  # of a host

    def load(self, workers: int) -> float:
        """Threads for each core of a host with so many workers, at least 1."""
        return 1.0 if self.on_gpu else max(1.0, workers * self.threads / self.cores)


@dataclass(frozen=True)
class Cluster:
    """Where a job shall run."""

    workers_per_host: int
    allreduce: AllreduceCost
    algorithm: str = "fastest"


class StepTime(NamedTuple):
    """Seconds of one step on the busiest worker, by what they are spent on."""

    compute: float
    update: float
    straggling: float  # the slowest worker's compute above the mean
    allreduce: float  # all of it
    hidden: float  # of the all-reduce, behind the backward pass

    @property
    def total(self) -> float:
        """From the start of the step to that of the next."""
        return self.compute + self.update + self.straggling + self.allreduce - self.hidden


@dataclass(frozen=True)
class Forecast:
    """The time of one job by number of workers."""

    plan: Plan
    costs: StepCosts
    cluster: Cluster

    def step(self, global_batch: int, workers: int) -> StepTime:
        """A step of `global_batch` samples on so many workers."""
        layout = layout_of(replace(self.plan, world_size=workers), global_batch)
        count = layout.accumulation_steps
        costs, cluster = self.costs, self.cluster
        local = min(workers, cluster.workers_per_host)
        slower = costs.load(local) / costs.load(costs.workers_per_host)
        micro_batch = min(layout.micro_batch, global_batch) * costs.sample_seconds * slower
        sums = cluster.allreduce.seconds(
            costs.gradient_bytes,
            costs.messages,
            workers,
            cluster.workers_per_host,
            cluster.algorithm,
        ) * max(1.0, slower)  # as far as bench allreduce had a core for each worker
        may_hide = sums * (costs.messages - 1) / costs.messages if costs.messages else 0.0
        return StepTime(
            compute=count * micro_batch,
            update=costs.update_seconds * slower,
            straggling=math.sqrt(count)
            * costs.jitter_seconds
            * slower
            * above_the_mean(workers - layout.idle_workers),
            allreduce=sums,
            hidden=min(may_hide, _BACKWARD_SHARE * micro_batch) if costs.on_gpu else 0.0,
        )

    def seconds(self, workers: int) -> float:
        """The run, as far as its batches are known, without evaluations and checkpoints."""
        return sum(
            stage.steps * self.step(stage.global_batch, workers).total for stage in self.plan.stages
        )

    def efficiency(self, workers: int) -> float:
        """Of the run: how many times faster than one worker, divided by the workers."""
        return self.seconds(1) / (workers * self.seconds(workers))

    def limits(self) -> Limits:
        """Of the whole run."""
        batches = [stage.global_batch for stage in self.plan.stages]
        return _limits(self._useful(batches), self.seconds)

    def limits_of_batch(self, global_batch: int) -> Limits:
        """Of a run with steps of `global_batch` samples alone."""

        def seconds(workers: int) -> float:
            return self.step(global_batch, workers).total

        return _limits(self._useful([global_batch]), seconds)

    def _useful(self, batches: Iterable[int]) -> list[int]:
        """Numbers of workers to try: those at which the busiest worker of a step has one
        micro-batch less, and powers of two; more workers than micro-batches only wait.
        """
        one = replace(self.plan, world_size=1)
        found = {1}
        for batch in set(batches):
            count = layout_of(one, batch).num_micro_batches
            found |= {-(-count // share) for share in range(1, min(count, _MOST_TRIED) + 1)}
            found |= {2**power for power in range(count.bit_length())}
        return sorted(found)


class Limits(NamedTuple):
    """Numbers of workers beyond which more of them do not pay."""

    fastest: int  # with which a run takes the least time; one more makes it no faster
    half_efficient: int  # the most with which each still does half of the work it would do alone


def _limits(candidates: Sequence[int], seconds: Callable[[int], float]) -> Limits:
    times = {workers: seconds(workers) for workers in candidates}

    def pays(workers: int) -> bool:
        return times[1] >= 0.5 * workers * seconds(workers)

    half = max(workers for workers in times if pays(workers))
    # From there to the next candidate a step takes no less, so efficiency falls
    beyond = min((workers for workers in times if workers > half), default=half + 1)
    between = range(half + 1, beyond)
    half += bisect.bisect_left(between, True, key=lambda workers: not pays(workers))
    return Limits(min(times, key=lambda workers: (times[workers], workers)), half)


def above_the_mean(workers: int) -> float:
    """The expected maximum of so many standard normal numbers.

    >>> round(above_the_mean(1), 6), round(above_the_mean(64), 2)
    (0.0, 2.34)
    """
    if workers <= 1:
        return 0.0
    return statistics.NormalDist().inv_cdf((workers - 0.375) / (workers + 0.25))
