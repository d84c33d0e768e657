"""Shows a run before it is started: `python -m hvdlarge.plan job.yaml --world-size 64`.

Its batches, steps and learning rates, without torch, Horovod, MPI or a single sample; only a data
set whose size is not known otherwise is built. What cannot run is refused here in the words of
`hvdlarge.train`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlarge import exits
from hvdlarge.comm.cost_model import ALGORITHMS
from hvdlarge.config.forecast import Cluster, Forecast
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import job_path, read_job
from hvdlarge.config.json_schema import job_schema
from hvdlarge.config.planning import (
    Measured,
    TrainingSamples,
    curve_of,
    differences,
    estimate,
    known_or_counted_samples,
    plan_run,
)
from hvdlarge.controller import Controller
from hvdlarge.reporting.describe import batch_line, columns, duration, rule_notes, stage_table
from hvdlarge.reporting.forecast_table import (
    forecast_as_json,
    forecast_in_words,
    sizes_as_json,
    sizes_in_words,
)
from hvdlarge.reporting.measured_run import read_allreduce, read_measured, read_step_costs
from hvdlarge.schedule.plan import Plan
from hvdlarge.telemetry.console import print_error
from hvdlarge.telemetry.sinks import decision_record, json_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a plan; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.schema:
            print(json.dumps(job_schema(), indent=2))
            return exits.FINISHED
        if options.job is None:
            raise exits.JobError("command line: name a job file")
        return _plan(options)
    except exits.RunExit as end:
        print_error(str(end))
        return end.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.plan",
        description=(
            "A run before it is started: batches, steps and learning rates of a job on any number "
            "of workers. Needs no torch and no MPI, except to build a data set whose size is not "
            "known otherwise."
        ),
        epilog=(
            "Exit codes: 0, or 2 for a wrong job, a wrong command line, or a job that cannot run "
            "on so many workers."
        ),
    )
    parser.add_argument("job", nargs="?", help="the job file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="as for hvdlarge.train"
    )
    parser.add_argument(
        "--world-size",
        type=_sizes,
        default=[1],
        metavar="N[,N…]",
        help="workers (default: 1); several numbers are compared",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="training samples, whatever the jobs say"
    )
    parser.add_argument(
        "--measured",
        metavar="RUN",
        help="a finished run's folder: its figures give time, memory and disk space",
    )
    parser.add_argument(
        "--compare", metavar="JOB", help="another job, or another file of the same, side by side"
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw lr and batch over the epochs (png, svg or pdf)"
    )
    parser.add_argument(
        "--decisions",
        metavar="FILE",
        help="write every step's decision as the run's decisions.jsonl will hold it",
    )
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of the job file, for editors"
    )
    _add_forecast(parser)
    return parser


def _add_forecast(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allreduce",
        action="append",
        default=[],
        metavar="FILE",
        help=(
            "with --measured: what hvdlarge.bench allreduce wrote, for a forecast of the time on "
            "any number of workers; twice: within a host and between hosts"
        ),
    )
    parser.add_argument(
        "--workers-per-host",
        type=int,
        metavar="N",
        help="of the forecast (default: as many as were measured)",
    )
    parser.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        help="how the forecast sums gradients (default: fastest, the faster of ring and tree)",
    )


def _plan(options: argparse.Namespace) -> int:
    measured = None if options.measured is None else read_measured(Path(options.measured))
    if options.allreduce and measured is None:
        raise exits.JobError(
            "command line: --allreduce needs the times of a measured run: name that run with "
            "--measured"
        )
    of_forecast = [options.workers_per_host, options.algorithm]
    if not options.allreduce and any(option is not None for option in of_forecast):
        raise exits.JobError(
            "command line: --workers-per-host and --algorithm are of the forecast: give the times "
            "of sums with --allreduce"
        )
    # Each before the next is read: own parts are looked for beside the job that was read last
    jobs = [read_job(job_path(options.job), options.overrides)]
    samples = [_samples_of(jobs[0], options)]
    if options.compare is not None:
        jobs.append(read_job(job_path(options.compare)))
        samples.append(_samples_of(jobs[1], options))
    plans = [
        _planned(job, known.number, options.world_size)
        for job, known in zip(jobs, samples, strict=True)
    ]
    estimates = [
        estimate(job, plan, measured)
        | _on_all_sizes(job, plan, options)
        | ({"data_set_built": True} if known.was_built else {})
        for job, plan, known in zip(jobs, plans, samples, strict=True)
    ]
    if options.plot is not None:
        draw(Path(options.plot), [(job.name, plan) for job, plan in zip(jobs, plans, strict=True)])
    if options.decisions is not None:
        write_decisions(Path(options.decisions), plans[0])
    if options.json:
        print(json.dumps(estimates[0] if len(estimates) == 1 else estimates, indent=2))
        return exits.FINISHED
    for job, plan, estimated in zip(jobs, plans, estimates, strict=True):
        print("\n".join(in_words(job, plan, estimated, measured)))
        print()
    if len(jobs) == 2:
        print("\n".join(side_by_side(jobs, estimates)))
    return exits.FINISHED


def _sizes(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of workers, or several with commas between them"
        ) from None


def _planned(job: Job, samples: int, sizes: Sequence[int]) -> Plan:
    """The plan on the first number of workers; JobError if the job cannot run on one of them."""
    plans = [plan_run(job, samples, size) for size in sizes]
    return plans[0]


def _on_all_sizes(job: Job, plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """What a plan says of all numbers of workers together."""
    if options.allreduce:
        forecast, notes = _forecast(job, plan, options)
        figures = forecast_as_json(forecast, options.world_size)
        return {"forecast": figures | {"notes": notes}}
    if len(options.world_size) > 1:
        return {"world_sizes": sizes_as_json(plan, options.world_size)}
    return {}


def _forecast(job: Job, plan: Plan, options: argparse.Namespace) -> tuple[Forecast, list[str]]:
    """The forecast, and what is to be said of it."""
    if job.reduction == "exact":
        raise exits.JobError(
            "--allreduce: reduction: exact does not sum by all-reduce; there is no forecast for it"
        )
    costs = read_step_costs(Path(options.measured))
    allreduce = read_allreduce([Path(path) for path in options.allreduce])
    per_host = options.workers_per_host or max(costs.workers_per_host, allreduce.workers_per_host)
    notes = list(allreduce.notes)
    if costs.on_gpu:
        notes.append(
            "on GPUs the wait for sums of the measured run counts as computation: measure with one "
            "worker; that sums hide behind the backward pass was not checked against measurements"
        )
    cluster = Cluster(per_host, allreduce.cost, options.algorithm or "fastest")
    return Forecast(plan, costs, cluster), notes


def _samples_of(job: Job, options: argparse.Namespace) -> TrainingSamples:
    for size in options.world_size:
        if size < 1:
            raise exits.JobError(
                f"command line: --world-size is {size}: at least one worker is needed"
            )
    if options.workers_per_host is not None and options.workers_per_host < 1:
        raise exits.JobError(
            f"command line: --workers-per-host is {options.workers_per_host}: at least one worker "
            "is needed"
        )
    if options.samples is not None and options.samples < 1:
        raise exits.JobError(
            f"command line: --samples is {options.samples}: at least one sample is needed"
        )
    if options.samples is not None:
        return TrainingSamples(options.samples)
    return known_or_counted_samples(job, _count)


def _count(job: Job) -> int:
    from hvdlarge.training.build import load_data  # needs torch

    return len(load_data(job.data, job.seed)[0])


def in_words(
    job: Job, plan: Plan, estimated: Mapping[str, Any], measured: Measured | None
) -> list[str]:
    """The plan of one job as lines for a reader; `estimated` is what `planning.estimate` gave."""
    workers = f"{plan.world_size} {'worker' if plan.world_size == 1 else 'workers'}"
    lines = [
        f"plan     {job.name}: {estimated['epochs']:g} epochs of "
        f"{estimated['training_samples']:,} samples on {workers}",
        f"batch    {batch_line(plan)}",
        f"schedule {estimated['fingerprint']}",
        *stage_table(plan, estimated["stages"]),
        *rule_notes(job, plan),
        *([built_note(job, plan)] if estimated.get("data_set_built") else []),
        f"steps    {_steps_in_words(plan, estimated)}",
    ]
    warmup = estimated["warmup_epochs"]
    if warmup:
        steps = warmup * plan.clock.dataset_size / plan.initial_batch
        which = " of the first batch" if len(plan.stages) > 1 else ""
        lines.append(f"warmup   {warmup:.4g} epochs, {steps:,.1f} steps{which}")
    lines.append(
        f"saved    {_checkpoints(estimated['checkpoints'])} at the job's cadence, and one at each "
        "new best evaluation"
    )
    if measured is not None:
        lines += _costs_in_words(job, plan, estimated, measured)
    if "forecast" in estimated:
        forecast = estimated["forecast"]
        lines += [*(f"note     {note}" for note in forecast["notes"])]
        lines += forecast_in_words(forecast, plan)
    elif "world_sizes" in estimated:
        lines += sizes_in_words(estimated["world_sizes"])
    return lines


def built_note(job: Job, plan: Plan) -> str:
    """That the data set was built to count its samples."""
    return (
        f"note     {job.data.name} was built to count its {plan.clock.dataset_size:,} samples; "
        f"data.samples: {plan.clock.dataset_size} in the job makes that unnecessary"
    )


def _steps_in_words(plan: Plan, estimated: Mapping[str, Any]) -> str:
    steps, fixed = estimated["steps"], estimated["steps_at_the_base_batch"]
    if "measured_from_epoch" in estimated:
        return f"{steps:,} up to epoch {estimated['measured_from_epoch']:.4g}, as far as is known"
    if steps == fixed:
        compared = "as many as"
    elif steps < fixed:
        compared = f"{fixed / steps:.3g} × fewer than"
    else:
        compared = f"{steps / fixed:.3g} × more than"
    return f"{steps:,}, {compared} the {fixed:,} of a fixed batch of {plan.base_batch}"


def _costs_in_words(
    job: Job, plan: Plan, estimated: Mapping[str, Any], measured: Measured
) -> list[str]:
    """Time, memory and disk, a line each, after a note for each way in which the measured run is
    not like the job.
    """
    lines = [
        f"note     --measured: {key} is {_short(there)} in the measured run and {_short(here)} in "
        "this job; the figures below are those of the measured run"
        for key, there, here in differences(job, measured)
    ]
    lines += [
        f"time     {duration(estimated['seconds'])} at {measured.samples_per_second:,.0f} "
        "samples/s on a busy worker"
    ]
    memory, size = estimated["peak_memory_bytes"], estimated["checkpoint_bytes"]
    if memory is not None:
        lines.append(
            f"memory   {memory / 2**20:,.0f} MiB a worker, as measured with micro-batches of "
            f"{plan.micro_batch}"
        )
    else:
        lines.append("memory   not measured with this micro-batch")
    if size is not None:
        kept = job.checkpoint.keep + 1
        lines.append(
            f"disk     {kept * size / 2**20:,.1f} MiB for {_checkpoints(job.checkpoint.keep)} "
            "and the best"
        )
    return lines


def _checkpoints(count: int) -> str:
    return f"{count} {'checkpoint' if count == 1 else 'checkpoints'}"


def side_by_side(jobs: Sequence[Job], estimates: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between two plans."""
    rows = [("", *(estimated["name"] for estimated in estimates))]
    for key in (
        "fingerprint",
        "steps",
        "samples",
        "growths",
        "warmup_epochs",
        "checkpoints",
        "seconds",
    ):
        if key in estimates[0]:
            rows.append((key, *(_short(estimated[key]) for estimated in estimates)))
    for title, key in (("largest batch", "global_batch"), ("highest lr", "lr_highest")):
        largest = (max(row[key] for row in estimated["stages"]) for estimated in estimates)
        rows.append((title, *map(_short, largest)))
    one, other = (_flat(job.resolved()) for job in jobs)
    for key in [*one, *(key for key in other if key not in one)]:
        if one.get(key) != other.get(key) and key != "name":
            rows.append((key, _short(one.get(key, "—")), _short(other.get(key, "—"))))
    return columns(rows)


def _flat(section: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in section.items():
        name = f"{path}.{key}" if path else key
        flat.update(_flat(value, name) if isinstance(value, dict) and value else {name: value})
    return flat


def _short(value: Any) -> str:
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else f"{value:,}"
        if type(value) is int
        else str(value)
    )


def write_decisions(path: Path, plan: Plan) -> None:
    """Let the run's own controller decide every step that does not depend on measurements, and
    write that down.

    Raises:
        JobError: if the file cannot be written.
    """
    controller, before = Controller(plan), 0
    try:
        with path.open("w", encoding="utf-8") as file:
            while (decision := controller.decide()) is not None:
                file.write(json_line(decision_record(decision, before)) + "\n")
                before = decision.stage_batch
                if plan.waits_after(decision):
                    break
    except OSError as error:
        raise exits.JobError(f"--decisions {path}: cannot be written: {error.strerror}") from None


def draw(path: Path, plans: Sequence[tuple[str, Plan]]) -> None:
    """Draw lr and global batch over the epochs, as far as they are known before the run.

    Raises:
        JobError: if matplotlib is missing, does not know the format, or the file cannot be written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise exits.JobError("--plot needs matplotlib: pip install 'hvdlarge[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5), layout="constrained"
    )
    for name, plan in plans:
        epochs, batches, lrs = zip(*curve_of(plan), strict=True)
        last = plan.stages[-1]
        end = last.end if last.open_end else plan.clock.epochs
        upper.plot(epochs, lrs, label=name)
        lower.step([*epochs, end], [*batches, batches[-1]], where="post", label=name)
    upper.set_ylabel("lr")
    lower.set_ylabel("global batch (samples)")
    lower.set_xlabel("epoch")
    lower.set_yscale("log", base=2)
    lower.yaxis.set_major_formatter(
        matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}")
    )
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise exits.JobError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
