"""Reads what a finished run and an all-reduce were measured to take, for plans of other runs."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hvdlarge.comm.cost_model import AllreduceCost, Link
from hvdlarge.comm.launcher import threads_per_worker
from hvdlarge.config import yaml_source
from hvdlarge.config.forecast import StepCosts
from hvdlarge.config.planning import Measured, measured_settings
from hvdlarge.exits import JobError
from hvdlarge.schedule.batch import BatchLayout

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, yaml_source.SourceError)


def read_measured(folder: Path) -> Measured:
    """The figures of a finished run.

    Raises:
        JobError: if the folder does not hold one.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        job = _resolved(folder)
        micro = job["batch"]["micro"]
        last = folder / "checkpoints" / "last.pt"
        return Measured(
            samples_per_second=summary["samples_per_second"] / summary["world_size"],
            world_size=summary["world_size"],
            micro_batch=micro if isinstance(micro, int) else None,
            peak_memory_bytes=summary.get("peak_memory_bytes"),
            checkpoint_bytes=last.stat().st_size if last.exists() else None,
            settings=measured_settings(job),
        )
    except _UNREADABLE as error:
        raise JobError(
            f"--measured {folder}: not the folder of a finished run ({type(error).__name__}: "
            f"{error})"
        ) from None


def _resolved(folder: Path) -> Mapping[str, Any]:
    text = (folder / "job.resolved.yaml").read_bytes()
    values: Mapping[str, Any] = yaml_source.read(text, fill_in=False).values
    return values


def read_step_costs(folder: Path) -> StepCosts:
    """What a step of a finished run took on rank 0, from the run's last start on.

    Raises:
        JobError: if the folder does not hold that.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        start = json.loads((folder / "starts.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        job = _resolved(folder)
        micro = job["batch"]["micro"]
        if not isinstance(micro, int):
            raise ValueError("batch.micro: auto takes micro-batches of any size; measure with one")
        with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
            intervals = list(_intervals(file, start["step"]))
        on_gpu = environment["device"] != "cpu"
        steps = [
            _step_of(each, BatchLayout(each.global_batch, micro, summary["world_size"]), on_gpu)
            for each in _settled(intervals)
        ]
        if not steps:
            raise ValueError("metrics.jsonl has no times of steps; a longer run has")
        return StepCosts(
            sample_seconds=statistics.median(step.sample for step in steps),
            update_seconds=statistics.median(step.update for step in steps),
            jitter_seconds=_jitter(steps),
            gradient_bytes=summary["gradient_bytes"],
            messages=_messages(summary, job["horovod"], environment["settings"]),
            on_gpu=on_gpu,
            **_places(environment["workers"]),
        )
    except _UNREADABLE as error:
        raise JobError(
            f"--measured {folder}: does not hold the times of a run's steps "
            f"({type(error).__name__}: {error})"
        ) from None


class _Interval(NamedTuple):
    """Steps between two lines of metrics.jsonl."""

    steps: int
    global_batch: int
    seconds: Mapping[str, float]  # by phase


def _intervals(lines: Iterator[str], first_step: int) -> Iterator[_Interval]:
    before = first_step - 1
    for line in lines:
        record = json.loads(line)
        if "forward_seconds" not in record or record["step"] <= before:
            continue
        seconds = {
            key.removesuffix("_seconds"): value
            for key, value in record.items()
            if key.endswith("_seconds")
        }
        yield _Interval(record["step"] - before, record["global_batch"], seconds)
        before = record["step"]


def _settled(intervals: Sequence[_Interval]) -> Sequence[_Interval]:
    """Those that follow one of the same batch; all if there is none."""
    return [
        after
        for before, after in itertools.pairwise(intervals)
        if before.global_batch == after.global_batch
    ] or intervals


class _Step(NamedTuple):
    """Mean seconds within an interval."""

    sample: float  # of forward and backward pass, and of fetching it
    update: float
    micro_batch: float
    passes: int  # micro-batches in the interval


def _step_of(interval: _Interval, layout: BatchLayout, on_gpu: bool) -> _Step:
    size, count = min(layout.micro_batch, layout.global_batch), layout.accumulation_steps
    phases = ["fetch", "forward", "backward"]
    if on_gpu:  # where the host waits for the device is no matter of phases
        phases.append("allreduce")
    compute = sum(interval.seconds.get(phase, 0.0) for phase in phases) / interval.steps
    update = sum(interval.seconds.get(phase, 0.0) for phase in ("decide", "update", "measure"))
    passes = interval.steps * count
    return _Step(compute / count / size, update / interval.steps, compute / count, passes)


def _jitter(steps: Sequence[_Step]) -> float:
    """The standard deviation of a micro-batch's seconds, from the differences between means over
    successive intervals: a machine whose speed drifts is no straggler among its workers.
    """
    if len(steps) < 2:
        return 0.0
    # The median of |x| is 1/1.4826 standard deviations of a normal x
    return 1.4826 * statistics.median(
        abs(after.micro_batch - before.micro_batch) / (1 / before.passes + 1 / after.passes) ** 0.5
        for before, after in itertools.pairwise(steps)
    )


def _messages(
    summary: Mapping[str, Any], horovod: Mapping[str, Any], settings: Mapping[str, str]
) -> int:
    """Messages of a step: one for each tensor or group, or as many as Horovod's fusion leaves."""
    tensors, groups = int(summary["gradient_tensors"]), horovod["groups"]
    most = tensors if groups is None else min(groups, tensors)
    # A run without a launcher sets nothing: then it is the job's
    threshold = int(settings.get("HOROVOD_FUSION_THRESHOLD", horovod["fusion_mib"] * 2**20))
    if threshold == 0:
        return most
    return min(most, max(1, -(-int(summary["gradient_bytes"]) // threshold)))


def _places(workers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        "workers_per_host": max(Counter(worker["host"] for worker in workers).values()),
        "threads": threads_per_worker(workers, 0),
        "cores": workers[0]["host_cores"],
    }


class MeasuredAllreduce(NamedTuple):
    """The cost of an all-reduce, and how it is known."""

    cost: AllreduceCost
    workers_per_host: int  # the most of any measurement
    notes: list[str]


def read_allreduce(paths: Sequence[Path]) -> MeasuredAllreduce:
    """The figures that `hvdlarge.bench allreduce --json` wrote: within a host, between hosts, or
    one file of each.

    Raises:
        JobError: if a file does not hold them, or two were measured in the same place.
    """
    found: dict[bool, Mapping[str, Any]] = {}
    most = 1
    for path in paths:
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
            several = len(set(figures["hosts"])) > 1
            figures["link"] = _link(figures)
            most = max(most, *Counter(figures["hosts"]).values())
            _ = figures["cycle_seconds"] + figures["message_seconds"]
        except _UNREADABLE as error:
            raise JobError(
                f"--allreduce {path}: not what hvdlarge.bench allreduce --json writes "
                f"({type(error).__name__}: {error})"
            ) from None
        if several in found:
            where = "between hosts" if several else "within one host"
            raise JobError(f"--allreduce {path}: two files hold what was measured {where}")
        found[several] = figures
    overall = found.get(True, found.get(False))
    assert overall is not None  # at least one path
    cost = AllreduceCost(
        overall["cycle_seconds"],
        overall["message_seconds"],
        within=found.get(False, overall)["link"],
        between=overall["link"],
    )
    return MeasuredAllreduce(cost, most, _notes(found))


def _link(figures: Mapping[str, Any]) -> Link:
    carried = tuple((int(size), float(s)) for size, s in figures["carried_seconds"].items())
    if not carried or list(carried) != sorted(carried):
        raise ValueError("carried_seconds is empty, or not in the order of sizes")
    return Link(float(figures["hop_seconds"]), carried)


def _notes(found: Mapping[bool, Any]) -> list[str]:
    if True not in found:
        return [
            "--allreduce was measured within one host: the links between hosts are taken to be as "
            "fast, which they are not; measure with one worker on each of two hosts too"
        ]
    if False not in found:
        return [
            "--allreduce was measured between hosts: the links within one are taken to be as slow"
        ]
    return []
