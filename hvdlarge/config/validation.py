"""Checks that span several keys of a job."""

from __future__ import annotations

from collections.abc import Iterator

from hvdlarge.config.job import AVERAGED, Job
from hvdlarge.config.own_parts import policy_problem
from hvdlarge.schedule.warmup import NoWarmup

# What else lines of metrics.jsonl or summary.json hold beside the metrics
RESERVED_RESULTS = {
    *("loss", "test_loss", "step", "steps", "epoch", "epochs", "samples_seen", "growths"),
    *("global_batch", "world_size", "lr", "trust_ratio_min", "trust_ratio_max", "skipped_steps"),
    *("steps_without_loss", "rollbacks", "samples_per_second", "time"),
    *("peak_memory_bytes", "gradient_bytes", "gradient_tensors"),
    *("layers", "noise_scale", "gradient_square", "gradient_variance"),
    *("weight_distance", "distances"),
}
Problem = tuple[tuple[str, ...], str]  # the key, and what is wrong with its value


def cross_field_errors(job: Job) -> Iterator[Problem]:
    """Yield (key, message) for each invalid combination."""
    if own := list(_own_policies(job)):
        yield from own  # nothing else can be asked of them
        return
    yield from _batch(job)
    yield from _exact(job)
    yield from _warmup(job)
    yield from _gradients(job)
    yield from _loss(job)
    yield from _results(job)
    yield from _lanes(job)
    yield from _noise(job)
    for path, policy in job.policies():
        for key, message in policy.errors(job.epochs):
            yield (*path, key), message


def _noise(job: Job) -> Iterator[Problem]:
    micro, first = job.batch.micro, job.batch.first
    if job.batch.growth.policy != "noise_scale":
        return
    if job.log.noise_every_steps is None:
        yield (
            ("batch", "growth", "policy"),
            "noise_scale follows the gradient noise, which is measured where "
            "log.noise_every_steps is set, for example to 20",
        )
    if micro == "auto" or micro >= first:
        yield (
            ("batch", "growth", "policy"),
            "noise_scale follows the gradient noise, the difference between the micro-batches of a "
            "step, of which there must be at least two: "
            + (f"set batch.micro to {first // 2} or less" if first > 1 else "set a larger batch"),
        )


def _own_policies(job: Job) -> Iterator[Problem]:
    first = job.batch.first
    for path, policy in job.policies():
        if problem := policy_problem(policy, job.epochs, first, first / job.batch.base):
            yield (*path, "policy"), problem


def _batch(job: Job) -> Iterator[Problem]:
    micro, first = job.batch.micro, job.batch.first
    if micro != "auto" and micro > first:
        yield (
            ("batch", "micro"),
            f"a micro-batch of {micro} samples is more than the first global batch of {first}",
        )


def _exact(job: Job) -> Iterator[Problem]:
    if job.reduction == "exact" and job.batch.micro == "auto":
        yield (
            ("batch", "micro"),
            "reduction: exact adds up micro-batches that are the same on any number of workers: "
            "give a number",
        )


def _warmup(job: Job) -> Iterator[Problem]:
    warmup = job.lr.warmup
    if job.lr.decay.includes_warmup and warmup != NoWarmup():
        yield (
            ("lr", "warmup"),
            f"{job.lr.decay.policy} is its own warmup: leave lr.warmup out, or set its policy to "
            "none",
        )
    k = job.batch.first / job.batch.base
    length = warmup.length(k)
    if length > job.epochs:
        arithmetic = warmup.length_as_arithmetic(k)
        shown = f"{length:g} epochs{f' ({arithmetic})' if arithmetic else ''}"
        yield (
            ("lr", "warmup", *(["epochs"] if hasattr(warmup, "epochs") else [])),
            f"the warmup takes {shown}, the run has {job.epochs:g}; it is given in epochs, not in "
            "steps",
        )


def _gradients(job: Job) -> Iterator[Problem]:
    compressed = job.gradients.compression != "none"
    if compressed and job.reduction == "exact":
        yield (
            ("gradients", "compression"),
            "reduction: exact keeps every bit, compression does not: choose one of them",
        )
    if compressed and job.precision == "fp64":
        yield (
            ("gradients", "compression"),
            "precision: fp64 asks for 53 bits, compression: fp16 sends 11: choose one of them",
        )
    if job.horovod.groups is not None and job.reduction == "exact":
        yield (
            ("horovod", "groups"),
            "reduction: exact sends all gradients of a worker as one: leave horovod.groups out",
        )


def _loss(job: Job) -> Iterator[Problem]:
    if not job.loss.is_torch_loss:
        return
    given = job.loss.args
    sums = {"reduction": given.get("reduction", "mean") not in ("mean", "batchmean")}
    # torch's older names for it
    sums |= {old: given.get(old) is False for old in ("size_average", "reduce")}
    for key in (key for key, says_so in sums.items() if says_so):
        why = "the engine weighs the mean over each micro-batch by its share of the global batch"
        yield (
            ("loss", "args", key),
            f"{given.get(key)!r} makes the loss no mean over its micro-batch: {why}",
        )


def _lanes(job: Job) -> Iterator[Problem]:
    if job.evaluate.lanes is not None and job.data.lanes is None:
        yield ("evaluate", "lanes"), "goes with data.lanes, which is not set"


def _results(job: Job) -> Iterator[Problem]:
    names = job.evaluate.named.keys()
    results = ["test_loss", *names]
    averaged = [] if job.ema is None else [f"{AVERAGED}{name}" for name in results]
    if len(names) < len(job.evaluate.metrics):
        yield ("evaluate", "metrics"), "two metrics have the same name; results are stored by name"
    times = {name for name in names if name.endswith("_seconds")}
    for name in sorted(names & {*RESERVED_RESULTS, *averaged} | times):
        yield (
            ("evaluate", "metrics"),
            f"{name!r} is a reserved field of metrics.jsonl or summary.json",
        )
    best = job.checkpoint.best
    if best is not None and best not in [*results, *averaged]:
        known = ", ".join([*results, *averaged])
        yield ("checkpoint", "best"), f"{best!r} is not an evaluation result; known: {known}"
