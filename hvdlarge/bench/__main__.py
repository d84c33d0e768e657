"""Measures what the engine costs here: `python -m hvdlarge.bench lars | step | allreduce | data`.

Each measurement runs the engine, the limit and the alternatives in turn, within one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdlarge import exits
from hvdlarge.bench.interleave import Timing
from hvdlarge.comm.environment import host, versions
from hvdlarge.comm.launcher import detect
from hvdlarge.comm.rank_checks import on_rank_0, raise_on_all_ranks
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import parse_job, read_job
from hvdlarge.reporting.describe import columns
from hvdlarge.telemetry.console import print_status
from hvdlarge.world import RankContext, run_on_all_ranks

# torch is imported inside the functions that need it: it takes a second, and a wrong command line
# should be answered at once.

DEFAULT_JOB = """\
name: bench
epochs: 1
data: {name: synthetic_images, args: {samples: 50000, size: 32}}
model: {name: resnet20}
batch: {base: 64, micro: 64}
lr: {base: 0.1}
optimizer: {name: lars, weight_decay: 1e-4}
"""
_SIZES = [4 * 4**power for power in range(13)]  # 4 bytes to 64 MiB


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code. Every rank of a launch calls this together."""
    launch = detect(os.environ)
    with contextlib.nullcontext() if launch is None or launch.rank == 0 else _silence():
        options = _parser().parse_intermixed_args(arguments)
    size = 1 if launch is None else launch.size

    def work(context: RankContext, job: Job | None) -> None:
        import torch

        torch.set_num_threads(options.threads)
        figures = _MEASURES[options.what](context, job, options)
        on_rank_0(context.control, lambda: _report(figures, options, context))

    # Not watched: a measurement may take as long as it needs
    return run_on_all_ranks(launch, lambda: _job(options, size), vars(options), work, watched=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.bench",
        description=(
            "Measure what the engine costs here: all sides in turn in one run, medians and the "
            "range of all rounds."
        ),
        epilog=(
            "Under mpirun or horovodrun: with so many workers. Exit codes: 0; 2 for a wrong "
            "command line or job; 3 for a wrong environment."
        ),
    )
    what = "lars: the update of ResNet-50's tensors; step: the engine's steps against a bare loop; "
    what += (
        "allreduce: latency and bandwidth, for hvdlarge.plan; data: whether a step waits for its "
        "samples"
    )
    parser.add_argument("what", choices=["lars", "step", "allreduce", "data"], help=what)
    parser.add_argument("job", nargs="?", help="of step and data (default: ResNet-20 on noise)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="as for hvdlarge.train"
    )
    parser.add_argument(
        "--rounds", type=_count, default=7, metavar="N", help="turns of each side (default: 7)"
    )
    parser.add_argument(
        "--steps",
        type=_count,
        default=30,
        metavar="N",
        help="for step: steps in a turn; for data: steps at most",
    )
    parser.add_argument("--only", metavar="SIDE", help="for step: this side alone")
    parser.add_argument(
        "--threads",
        type=_count,
        default=1,
        metavar="N",
        help="torch's threads on each worker (default: 1)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write all figures; hvdlarge.plan --allreduce reads allreduce's",
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


@contextlib.contextmanager
def _silence() -> Any:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _job(options: argparse.Namespace, world_size: int) -> Job | None:
    if options.what in ("lars", "allreduce"):
        return None
    if options.job is not None and "=" not in options.job:
        return read_job(options.job, options.overrides)
    overrides = ([options.job] if options.job is not None else []) + options.overrides
    return parse_job(DEFAULT_JOB, "the default job", [f"batch.base={64 * world_size}", *overrides])


def _lars(context: RankContext, job: Job | None, options: argparse.Namespace) -> dict[str, Any]:
    from hvdlarge.bench.lars import measure_lars
    from hvdlarge.comm.devices import choose_device

    device = choose_device(context.tensors)
    seconds = measure_lars(device, options.rounds)
    timings = {name: Timing.of(values) for name, values in seconds.items()}
    return _figures(
        "lars", "seconds of one update of ResNet-50's 161 tensors, float32", device, timings, "LARS"
    )


def _step(context: RankContext, job: Job | None, options: argparse.Namespace) -> dict[str, Any]:
    from hvdlarge.bench.step import StepClock, measure_step
    from hvdlarge.build import build_components

    assert job is not None  # `_job` gave one
    clock = StepClock(context.control.rank, job.timeouts.limits())
    context = replace(context, watchdog=clock)
    components = build_components(job, context)
    seconds = measure_step(
        job, components, context, clock, options.steps, options.rounds, options.only
    )
    timings = {name: Timing.of(values) for name, values in seconds.items()}
    what = (
        f"seconds of a step of {job.model.name}, global batch {components.plan.initial_batch}, on "
        f"{context.control.size} workers"
    )
    return _figures("step", what, components.precision.device, timings, "bare loop")


def _allreduce(
    context: RankContext, job: Job | None, options: argparse.Namespace
) -> dict[str, Any]:
    from hvdlarge.bench.allreduce import measure_allreduce
    from hvdlarge.comm.cost_model import fit
    from hvdlarge.comm.devices import choose_device

    if context.control.size < 2:
        raise exits.JobError(
            "an allreduce needs two workers at least: mpirun -np 2 python -m hvdlarge.bench "
            "allreduce"
        )
    device = raise_on_all_ranks(context.control, lambda: choose_device(context.tensors))
    seconds = measure_allreduce(context.tensors, context.control, device, _SIZES, options.rounds)
    timings = {f"{size:,} bytes": Timing.of(values) for size, values in seconds.items()}
    cost = fit(
        list(seconds),
        [Timing.of(values).median for values in seconds.values()],
        context.control.size,
    )
    figures = _figures(
        "allreduce",
        f"seconds of a sum over {context.control.size} workers, float32",
        device,
        timings,
        None,
    )
    return figures | {
        "workers": context.control.size,
        "latency_seconds": cost.latency_seconds,
        "seconds_per_byte": cost.seconds_per_byte,
        "fitted": {str(size): cost.seconds(size, context.control.size) for size in seconds},
    }


def _data(context: RankContext, job: Job | None, options: argparse.Namespace) -> dict[str, Any]:
    from hvdlarge.bench.data import loading_speed, loads_in_place, measure_waits
    from hvdlarge.build import load_data
    from hvdlarge.config.planning import plan_run

    assert job is not None  # `_job` gave one
    training_set, _ = raise_on_all_ranks(context.control, lambda: load_data(job.data, job.seed))
    plan = raise_on_all_ranks(
        context.control, lambda: plan_run(job, len(training_set), context.control.size)
    )
    numbers = [0] if loads_in_place(training_set) else sorted({0, 1, 2, job.data.num_workers})
    alone = replace(plan, world_size=1)
    speeds = {
        str(n): loading_speed(job.data, alone, training_set, job.seed, n, seconds=1.0)
        for n in numbers
    }
    # A worker that computes twice as long as its samples take to load.
    sample_seconds = 2 / speeds[str(0 if loads_in_place(training_set) else job.data.num_workers)]
    waits = measure_waits(
        job.data, plan, training_set, job.seed, context.control, sample_seconds, options.steps
    )
    return {
        "what": "data",
        "of": (
            f"loading {job.data.name}: samples/s of one worker by loader processes; waits of steps "
            "that compute twice as long"
        ),
        "samples_per_second": speeds,
        "waits": waits._asdict(),
    }


_MEASURES = {"lars": _lars, "step": _step, "allreduce": _allreduce, "data": _data}


def _figures(
    what: str, of: str, device: Any, timings: Mapping[str, Timing], reference: str | None
) -> dict[str, Any]:
    sides = {name: timing._asdict() for name, timing in timings.items()}
    if reference is not None and reference in timings:
        unit = timings[reference].median
        for side in sides.values():
            side["ratio"] = side["median"] / unit
    return {"what": what, "of": of, "device": str(device), "reference": reference, "sides": sides}


def _report(figures: dict[str, Any], options: argparse.Namespace, context: RankContext) -> None:
    """Print what was measured, and write it down where that was asked for. Rank 0 alone.

    Raises:
        JobError: if the file of --json cannot be written.
    """
    print_status("\n".join(in_words(figures)))
    if options.json is None:
        return
    launch = context.launch
    document = figures | {
        "launcher": None if launch is None else launch.launcher,
        "world_size": context.control.size,
        "threads": options.threads,
        "versions": versions(),
        "host": host(),
        "settings": dict(context.settings),
    }
    try:
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise exits.JobError(
            f"--json {options.json}: cannot be written: {error.strerror}"
        ) from None


def in_words(figures: Mapping[str, Any]) -> list[str]:
    """What was measured, as lines for a reader."""
    lines = [
        f"bench    {figures['of']}" + (f" ({figures['device']})" if "device" in figures else "")
    ]
    if figures["what"] == "data":
        waits = figures["waits"]
        speeds = [
            (number, f"{speed:,.0f}") for number, speed in figures["samples_per_second"].items()
        ]
        return [
            *lines,
            *columns([("loader processes", "samples/s"), *speeds]),
            f"waits    {waits['steps']} steps, the first batch's of {waits['step_seconds']:.4g} s: "
            f"median {waits['median']:.2g} s, longest {waits['longest']:.2g} s; at "
            f"{waits['borders']} growths and epoch ends: longest {waits['longest_at_border']:.2g} "
            "s",
        ]
    head: tuple[str, ...] = ("", "median ms", "lowest", "highest")
    last = "fitted" if figures["what"] == "allreduce" else f"× {figures['reference']}"
    rows = [(*head, last)]
    for name, side in figures["sides"].items():
        ratio = f"{side['ratio']:.3f}" if "ratio" in side else ""
        if figures["what"] == "allreduce":
            ratio = f"{1e3 * figures['fitted'][name.split()[0].replace(',', '')]:.3f}"
        rows.append(
            (name, *(f"{1e3 * side[key]:.3f}" for key in ("median", "lowest", "highest")), ratio)
        )
    lines += columns(rows)
    if figures["what"] == "allreduce":
        rate = 1e-9 / figures["seconds_per_byte"] if figures["seconds_per_byte"] else float("inf")
        lines.append(
            f"fit      {1e6 * figures['latency_seconds']:.1f} µs a message, {rate:.3g} GB/s along "
            "the ring"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
