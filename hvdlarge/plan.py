"""Shows a run before it is started: `python -m hvdlarge.plan job.yaml --world-size 64`.

Its batches, steps and rates, without torch, Horovod, MPI or a single sample. What
cannot run is refused here in the words of `hvdlarge.train`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlarge import exits
from hvdlarge.comm.cost_model import AllreduceCost
from hvdlarge.config import yaml_source
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import job_path, read_job
from hvdlarge.config.json_schema import job_schema
from hvdlarge.config.planning import Measured, curve_of, estimate, plan_run, training_samples
from hvdlarge.controller import Controller
from hvdlarge.reporting.describe import batch_line, columns, duration, rule_notes, stage_table
from hvdlarge.schedule.plan import Plan
from hvdlarge.telemetry.console import print_error
from hvdlarge.telemetry.sinks import decision_record, json_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a plan; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.plan",
        description=(
            "The run on paper: batches, steps and rates of a job on any number of workers. Needs "
            "no torch and no MPI."
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
        "--world-size", type=int, default=1, metavar="N", help="workers (default: 1)"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="training samples, where the job does not say it"
    )
    parser.add_argument(
        "--measured",
        metavar="RUN",
        help="a finished run's folder: its figures give time, memory and disk space",
    )
    parser.add_argument(
        "--allreduce",
        metavar="FILE",
        help="with --measured: what hvdlarge.bench allreduce wrote, for other numbers of workers",
    )
    parser.add_argument(
        "--compare", metavar="JOB", help="another job, or another file of the same, side by side"
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw rate and batch over the epochs (png, svg or pdf)"
    )
    parser.add_argument(
        "--decisions",
        metavar="FILE",
        help="write every step's decision as the run's decisions.jsonl will hold it",
    )
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of the job file, for editors"
    )
    options = parser.parse_intermixed_args(arguments)
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


def _plan(options: argparse.Namespace) -> int:
    measured = None if options.measured is None else read_measured(Path(options.measured))
    if options.allreduce is not None and measured is None:
        raise exits.JobError(
            "command line: --allreduce tells what changes against a run: name that one with "
            "--measured"
        )
    allreduce = None if options.allreduce is None else read_allreduce(Path(options.allreduce))
    jobs = [read_job(job_path(options.job), options.overrides)]
    if options.compare is not None:
        jobs.append(read_job(options.compare))
    plans = [_plan_of(job, options) for job in jobs]
    papers = [
        estimate(job, plan, measured, allreduce) for job, plan in zip(jobs, plans, strict=True)
    ]
    if options.plot is not None:
        draw(Path(options.plot), [(job.name, plan) for job, plan in zip(jobs, plans, strict=True)])
    if options.decisions is not None:
        write_decisions(Path(options.decisions), plans[0])
    if options.json:
        print(json.dumps(papers[0] if len(papers) == 1 else papers, indent=2))
        return exits.FINISHED
    for job, plan, paper in zip(jobs, plans, papers, strict=True):
        print("\n".join(in_words(job, plan, paper, measured)))
        print()
    if len(jobs) == 2:
        print("\n".join(side_by_side(jobs, papers)))
    return exits.FINISHED


def _plan_of(job: Job, options: argparse.Namespace) -> Plan:
    if options.world_size < 1:
        raise exits.JobError(
            f"command line: --world-size is {options.world_size}: at least one worker is needed"
        )
    if options.samples is not None and options.samples < 1:
        raise exits.JobError(
            f"command line: --samples is {options.samples}: at least one sample is needed"
        )
    return plan_run(job, options.samples or training_samples(job), options.world_size)


def in_words(
    job: Job, plan: Plan, paper: Mapping[str, Any], measured: Measured | None
) -> list[str]:
    """The plan of one job as lines for a reader."""
    fixed = paper["steps_at_the_base_batch"]
    steps = paper["steps"]
    if steps == fixed:
        less = ", as many as"
    else:
        less = (
            f", {fixed / steps:.3g} × fewer than"
            if fixed > steps
            else f", {steps / fixed:.3g} × more than"
        )
    workers = f"{plan.world_size} {'worker' if plan.world_size == 1 else 'workers'}"
    lines = [
        f"plan     {job.name}: {paper['epochs']:g} epochs of {paper['training_samples']:,} samples "
        f"on {workers}",
        f"batch    {batch_line(plan)}",
        f"schedule {paper['fingerprint']}",
        *stage_table(plan, paper["stages"]),
        *rule_notes(job, plan),
        f"steps    {paper['steps']:,}{less} the {fixed:,} of a fixed batch of {plan.base_batch}",
    ]
    warmup = paper["warmup_epochs"]
    if warmup:
        lines.append(
            f"warmup   {warmup:.4g} epochs, "
            f"{warmup * plan.clock.dataset_size / plan.initial_batch:,.1f} steps"
        )
    lines.append(
        f"saved    {paper['checkpoints']} checkpoints at the job's cadence, and one at each new "
        "best evaluation"
    )
    if measured is not None:
        lines.append(
            f"time     {duration(paper['seconds'])} at {measured.samples_per_second:,.0f} "
            "samples/s on a busy worker"
        )
        if "allreduce" in paper:
            cost = paper["allreduce"]
            lines.append(
                f"sums     {cost['bytes'] / 2**20:,.1f} MiB in each step: "
                f"{1e3 * cost['seconds']:.3g} ms by bench allreduce, and "
                f"{1e3 * cost['seconds_measured']:.3g} ms on the {measured.world_size} workers of "
                "the measured run; if none of the difference hides behind the backward pass, the "
                f"run takes {duration(paper['seconds_if_none_hides'])}"
            )
        memory, size = paper["peak_memory_bytes"], paper["checkpoint_bytes"]
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
                f"disk     {kept * size / 2**20:,.1f} MiB for {job.checkpoint.keep} checkpoints "
                "and the best"
            )
    return lines


def side_by_side(jobs: Sequence[Job], papers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between two plans."""
    rows = [("", *(paper["name"] for paper in papers))]
    for key in (
        "fingerprint",
        "steps",
        "samples",
        "growths",
        "warmup_epochs",
        "checkpoints",
        "seconds",
    ):
        if key in papers[0]:
            rows.append((key, *(_short(paper[key]) for paper in papers)))
    rows.append(
        (
            "largest batch",
            *(_short(max(row["global_batch"] for row in paper["stages"])) for paper in papers),
        )
    )
    rows.append(
        (
            "highest lr",
            *(_short(max(row["lr_highest"] for row in paper["stages"])) for paper in papers),
        )
    )
    one, other = (_flat(job.resolved()) for job in jobs)
    for key in [*one, *(key for key in other if key not in one)]:
        if one.get(key) != other.get(key) and key != "name":
            rows.append((key, _short(one.get(key, "—")), _short(other.get(key, "—"))))
    return columns(rows)


def _flat(section: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found = {}
    for key, value in section.items():
        name = f"{path}.{key}" if path else key
        found.update(_flat(value, name) if isinstance(value, dict) and value else {name: value})
    return found


def _short(value: Any) -> str:
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else f"{value:,}"
        if type(value) is int
        else str(value)
    )


def read_measured(folder: Path) -> Measured:
    """The figures of a finished run.

    Raises:
        JobError: if the folder does not hold one.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        job = yaml_source.read((folder / "job.resolved.yaml").read_bytes(), fill_in=False).values
        micro = job["batch"]["micro"]
        last = folder / "checkpoints" / "last.pt"
        return Measured(
            samples_per_second=summary["samples_per_second"] / summary["world_size"],
            world_size=summary["world_size"],
            gradient_bytes=summary.get("gradient_bytes"),
            micro_batch=micro if isinstance(micro, int) else None,
            peak_memory_bytes=summary.get("peak_memory_bytes"),
            checkpoint_bytes=last.stat().st_size if last.exists() else None,
        )
    except (OSError, ValueError, KeyError, TypeError, yaml_source.SourceError) as error:
        raise exits.JobError(
            f"--measured {folder}: not the folder of a finished run ({type(error).__name__}: "
            f"{error})"
        ) from None


def read_allreduce(path: Path) -> AllreduceCost:
    """The figures that `hvdlarge.bench allreduce --json` wrote.

    Raises:
        JobError: if the file does not hold them.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return AllreduceCost(float(found["latency_seconds"]), float(found["seconds_per_byte"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise exits.JobError(
            f"--allreduce {path}: not what hvdlarge.bench allreduce --json writes "
            f"({type(error).__name__}: {error})"
        ) from None


def write_decisions(path: Path, plan: Plan) -> None:
    """Let the run's own controller decide every step, and write that down.

    Raises:
        JobError: if the file cannot be written.
    """
    controller, before = Controller(plan), 0
    try:
        with path.open("w", encoding="utf-8") as file:
            while (decision := controller.decide()) is not None:
                file.write(json_line(decision_record(decision, before)) + "\n")
                before = decision.stage_batch
    except OSError as error:
        raise exits.JobError(f"--decisions {path}: cannot be written: {error.strerror}") from None


def draw(path: Path, plans: Sequence[tuple[str, Plan]]) -> None:
    """Draw rate and global batch over the epochs.

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
        epochs, batches, rates = zip(*curve_of(plan), strict=True)
        end = plan.clock.epochs
        upper.plot(epochs, rates, label=name)
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
