"""Benchmarks of the engine: `python -m hvdlarge.bench lars | step | allreduce | data`.

Each benchmark runs its variants, such as the engine and a bare loop, interleaved in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdlarge import exits
from hvdlarge.bench.interleave import Timing
from hvdlarge.comm.environment import host, versions
from hvdlarge.comm.launcher import detect, is_reporter
from hvdlarge.comm.rank_checks import on_rank_0, raise_on_all_ranks
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import job_path, parse_job, read_job
from hvdlarge.reporting.describe import columns
from hvdlarge.telemetry.console import only_if, print_status
from hvdlarge.world import RankContext, run_on_all_ranks

# torch is imported where it is needed: its import takes a second, and a wrong command line should
# fail at once.

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
    """Run a benchmark; returns the exit code. Every rank of a launch calls this together."""
    launch = detect(os.environ)
    with only_if(is_reporter(launch)):
        options = _parser().parse_intermixed_args(arguments)
    size = 1 if launch is None else launch.size

    def work(context: RankContext, job: Job | None) -> None:
        import torch

        torch.set_num_threads(options.threads)
        figures = _BENCHMARKS[options.what](context, job, options)
        on_rank_0(context.control, lambda: _report(figures, options, context))

    # Not watched: a benchmark has no time limit
    return run_on_all_ranks(launch, lambda: _job(options, size), vars(options), work, watched=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.bench",
        description=(
            "Benchmarks of the engine on this machine: variants run interleaved; reports the "
            "median and the range over all rounds."
        ),
        epilog=(
            "Start it under mpirun or horovodrun to measure several workers. Exit codes: 0; 2 for "
            "a wrong command line or job; 3 for a wrong environment."
        ),
    )
    what = (
        "lars: the update of ResNet-50's parameters; step: the engine's steps against a bare loop; "
        "allreduce: latency and bandwidth, for hvdlarge.plan; data: how long steps wait for samples"
    )
    parser.add_argument("what", choices=["lars", "step", "allreduce", "data"], help=what)
    parser.add_argument("job", nargs="?", help="for step and data (default: ResNet-20 on noise)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="as for hvdlarge.train"
    )
    parser.add_argument(
        "--rounds", type=_count, default=7, metavar="N", help="rounds of each variant (default: 7)"
    )
    parser.add_argument(
        "--steps",
        type=_count,
        default=30,
        metavar="N",
        help="for step: steps per round; for data: maximum number of steps (default: 30)",
    )
    parser.add_argument("--only", metavar="VARIANT", help="for step: measure this variant only")
    parser.add_argument(
        "--threads",
        type=_count,
        default=1,
        metavar="N",
        help="torch threads of each worker (default: 1)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the results; hvdlarge.plan --allreduce reads those of allreduce",
    )
    return parser


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _job(options: argparse.Namespace, world_size: int) -> Job | None:
    if options.what in ("lars", "allreduce"):
        return None
    if options.job is not None and "=" not in options.job:
        return read_job(job_path(options.job), options.overrides)
    overrides = ([options.job] if options.job is not None else []) + options.overrides
    return parse_job(DEFAULT_JOB, "the default job", [f"batch.base={64 * world_size}", *overrides])


def _lars(context: RankContext, job: Job | None, options: argparse.Namespace) -> dict[str, Any]:
    from hvdlarge.bench.lars import measure_lars
    from hvdlarge.comm.devices import choose_device

    device = raise_on_all_ranks(context.control, lambda: choose_device(context.tensors))
    seconds = measure_lars(device, options.rounds)
    timings = {name: Timing.of(values) for name, values in seconds.items()}
    return _figures(
        "lars", "seconds per update of ResNet-50's 161 tensors, float32", device, timings, "LARS"
    )


def _step(context: RankContext, job: Job | None, options: argparse.Namespace) -> dict[str, Any]:
    from hvdlarge.bench.step import StepClock, measure_step
    from hvdlarge.training.build import build_components

    assert job is not None  # see _job
    clock = StepClock(context.control.rank, job.timeouts.limits())
    context = replace(context, watchdog=clock)
    components = build_components(job, context)
    seconds = measure_step(
        job, components, context, clock, options.steps, options.rounds, options.only
    )
    timings = {name: Timing.of(values) for name, values in seconds.items()}
    what = (
        f"seconds per step of {job.model.name}, global batch {components.plan.initial_batch}, on "
        f"{context.control.size} workers"
    )
    return _figures("step", what, components.objective.precision.device, timings, "bare loop")


def _allreduce(
    context: RankContext, job: Job | None, options: argparse.Namespace
) -> dict[str, Any]:
    from hvdlarge.bench.allreduce import measure_allreduce, times_of
    from hvdlarge.comm.cost_model import fit
    from hvdlarge.comm.devices import choose_device

    if context.control.size < 2:
        raise exits.JobError(
            "an allreduce needs at least two workers: mpirun -np 2 python -m hvdlarge.bench "
            "allreduce"
        )
    device = raise_on_all_ranks(context.control, lambda: choose_device(context.tensors))
    seconds = measure_allreduce(context.tensors, context.control, device, _SIZES, options.rounds)
    timings = {name: Timing.of(values) for name, values in seconds.items()}
    workers = context.control.size
    cycle, message, link = fit(times_of(seconds, workers, _SIZES))
    hosts = context.control.allgather(socket.gethostname().encode())
    figures = _figures(
        "allreduce",
        f"seconds per sum over {context.control.size} workers, float32",
        device,
        timings,
        None,
    )
    return figures | {
        "workers": workers,
        "hosts": [host.decode() for host in hosts],
        "cycle_seconds": cycle,
        "message_seconds": message,
        "hop_seconds": link.hop_seconds,
        "carried_seconds": {str(size): carried for size, carried in link.carried},
    }


def _data(context: RankContext, job: Job | None, options: argparse.Namespace) -> dict[str, Any]:
    from hvdlarge.bench.data import loading_speed, loads_in_place, measure_waits
    from hvdlarge.config.planning import plan_run
    from hvdlarge.training.build import load_data, sample_form

    assert job is not None  # see _job
    training_set, _ = raise_on_all_ranks(context.control, lambda: load_data(job.data, job.seed))
    raise_on_all_ranks(context.control, lambda: sample_form(job.data))
    plan = raise_on_all_ranks(
        context.control, lambda: plan_run(job, len(training_set), context.control.size)
    )
    counts = [0] if loads_in_place(training_set) else sorted({0, 1, 2, job.data.num_workers})
    one_worker = replace(plan, world_size=1)
    speeds = {
        str(n): loading_speed(job.data, one_worker, training_set, job.seed, n, seconds=1.0)
        for n in counts
    }
    # Simulate compute that takes twice as long as loading.
    sample_seconds = 2 / speeds[str(0 if loads_in_place(training_set) else job.data.num_workers)]
    waits = measure_waits(
        job.data, plan, training_set, job.seed, context.control, sample_seconds, options.steps
    )
    return {
        "what": "data",
        "of": (
            f"loading {job.data.name}: samples/s of one worker by loader processes; waits of steps "
            "whose compute takes twice as long as loading"
        ),
        "samples_per_second": speeds,
        "waits": waits._asdict(),
    }


_BENCHMARKS = {"lars": _lars, "step": _step, "allreduce": _allreduce, "data": _data}


def _figures(
    what: str, of: str, device: Any, timings: Mapping[str, Timing], reference: str | None
) -> dict[str, Any]:
    variants = {name: timing._asdict() for name, timing in timings.items()}
    if reference is not None and reference in timings:
        for variant in variants.values():
            variant["ratio"] = variant["median"] / timings[reference].median
    return {
        "what": what,
        "of": of,
        "device": str(device),
        "reference": reference,
        "variants": variants,
    }


def _report(figures: dict[str, Any], options: argparse.Namespace, context: RankContext) -> None:
    """Print the results, and write them to the file of --json. Called on rank 0.

    Raises:
        JobError: if the file of --json cannot be written.
    """
    print_status("\n".join(_lines(figures)))
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


def _lines(figures: Mapping[str, Any]) -> list[str]:
    """The results as lines of text."""
    lines = [
        f"bench    {figures['of']}" + (f" ({figures['device']})" if "device" in figures else "")
    ]
    if figures["what"] == "data":
        waits = figures["waits"]
        speeds = [
            (count, f"{speed:,.0f}") for count, speed in figures["samples_per_second"].items()
        ]
        return [
            *lines,
            *columns([("loader processes", "samples/s"), *speeds]),
            f"waits    {waits['steps']} steps, the first of {waits['step_seconds']:.4g} s: median "
            f"{waits['median']:.2g} s, longest {waits['longest']:.2g} s; after {waits['borders']} "
            f"growths and epoch ends: longest {waits['longest_at_border']:.2g} s",
        ]
    last = [] if figures["what"] == "allreduce" else [f"× {figures['reference']}"]
    rows: list[tuple[str, ...]] = [("", "median ms", "lowest", "highest", *last)]
    for name, variant in figures["variants"].items():
        times = [f"{1e3 * variant[key]:.3f}" for key in ("median", "lowest", "highest")]
        ratio = [f"{variant['ratio']:.3f}"] if "ratio" in variant else [""] * len(last)
        rows.append((name, *times, *ratio))
    lines += columns(rows)
    if figures["what"] == "allreduce":
        size, carried = max((int(size), s) for size, s in figures["carried_seconds"].items())
        bandwidth = 1e-9 * size / carried if carried else float("inf")
        lines.append(
            f"fit      {1e3 * figures['cycle_seconds']:.3g} ms for each step, "
            f"{1e6 * figures['message_seconds']:.3g} µs for each message and "
            f"{1e6 * figures['hop_seconds']:.3g} µs for each hop of it; a link carries "
            f"{size:,} bytes at {bandwidth:.3g} GB/s"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
