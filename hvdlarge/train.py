"""Trains a job: `python -m hvdlarge.train job.yaml [key.sub=value ...]`, or `hvdlarge.run_job(...)`
in a program.

Runs the job, alone or as one worker of a launch, and exits with a code of `exits.py`. `world.py`
opens the channels between the ranks; `run.py` builds and trains the run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hvdlarge import __version__, exits
from hvdlarge.comm.interfaces import WorldMismatchError
from hvdlarge.comm.launcher import Launch, detect, is_reporter, reports_wrong_launch, wrong_launch
from hvdlarge.config import yaml_source
from hvdlarge.config.explain import explain
from hvdlarge.config.job import Job
from hvdlarge.config.job_file import job_path, parse_job, read_job
from hvdlarge.config.planning import UnknownSamples, known_or_counted_samples, plan_run
from hvdlarge.telemetry.console import only_if, print_error, print_status
from hvdlarge.world import RankContext, on_all_ranks, run_on_all_ranks

if TYPE_CHECKING:
    from torch import nn

# torch is imported inside functions: it takes a second, and errors in a job should appear at once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code. Every rank of a launch calls this together."""
    launch, wrong = detect(os.environ), wrong_launch(os.environ)
    reports = reports_wrong_launch(os.environ) if wrong else is_reporter(launch)
    options = _parse(arguments, reports)
    if options.dry_run and not wrong:
        return _dry_run(options, launch)

    def work(context: RankContext, job: Job) -> None:
        from hvdlarge.training.run import run

        gc.freeze()
        gc.enable()
        run(job, Path(options.job), options.fresh, context)

    # What imports leave stays to the end: looking for garbage in it takes a tenth of a second now,
    # and three more at the exit, on every worker
    gc.disable()
    try:
        return run_on_all_ranks(
            launch, lambda: read_job(options.job, options.overrides), {}, work, watched=True
        )
    finally:
        gc.enable()


def run_job(
    job: Mapping[str, Any] | str | os.PathLike[str],
    *overrides: str,
    model: nn.Module | None = None,
    data: tuple[Any, Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Train a job in this process and return its summary.

    On one worker, or on those of the launcher that has started this program: then every rank calls
    this together, with the same job and equal objects. An interrupted run is resumed; a finished
    one is left alone, and its summary is returned. torch's global settings (threads, TF32,
    deterministic algorithms, with CUBLAS_WORKSPACE_CONFIG) are set as the job requires and are not
    restored; signal handlers and the variables of Horovod and MPI are.

    Args:
        job: the keys of a job file as a mapping, its path, or the name of a shipped job. A mapping
            needs no section for what is given as an object.
        *overrides: `key.sub=value`, as on the command line.
        model: what is trained, in place of `model.name` and its `args`. It holds the trained
            weights afterwards, on every rank. Its first weights are rank 0's as they are, whatever
            the job's `seed`.
        data: the training set and the test set, or None, in place of `data.name` and its `args`.
        loss: a function of (outputs, targets) or a module, in place of `loss.name` and its `args`;
            a module may share parts of the model.
        fresh: set an earlier run in the folder aside and start a new one.

    Returns:
        The content of summary.json, on every rank: `loss`, `steps`, `epochs`, `train_seconds` and
        so on; with a test set also `test_loss` and the metrics, such as `accuracy`.

    Raises:
        JobError: on every rank, if the job is invalid.
        InvalidEnvironmentError: if a launcher started this program without MPI or Horovod.
        RunExit: on every rank, for every other end with an exit code (see exits.py). An error that
            one rank of several raises alone ends all processes.
        OutOfMemory, PartError: on one worker, if memory runs out, or a part of the job breaks its
            contract after the first step.

    >>> run_job({"name": "oops"})
    Traceback (most recent call last):
    ...
    hvdlarge.exits.JobError: job.yaml: 5 problems in the job file
    ...
    """
    if wrong := wrong_launch(os.environ):
        raise exits.InvalidEnvironmentError(wrong)
    launch = detect(os.environ)
    objects = {"model": model, "data": data, "loss": loss}
    given = {name: value for name, value in objects.items() if value is not None}
    return _read_and_run(job, overrides, given, fresh, launch)


def _read_and_run(
    job: Mapping[str, Any] | str | os.PathLike[str],
    overrides: Sequence[str],
    given: Mapping[str, Any],
    fresh: bool,
    launch: Launch | None,
) -> dict[str, Any]:
    names = {section: _name_of(value) for section, value in given.items()}
    if not isinstance(job, Mapping):
        path = Path(job_path(os.fspath(job)))
        return _run_objects(
            launch, lambda: read_job(str(path), overrides, names), path, given, fresh
        )
    text = _written(dict(job))
    with tempfile.TemporaryDirectory(prefix="hvdlarge-") as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return _run_objects(
            launch, lambda: parse_job(text, "job.yaml", overrides, names), path, given, fresh
        )


def _name_of(value: Any) -> str:
    """How the documents of a run name an object that it was given."""
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"object:{kind.__qualname__.rpartition('.')[2].strip('<>')}"


def _written(keys: dict[str, Any]) -> str:
    try:
        return yaml_source.write(keys)
    except yaml.representer.RepresenterError as error:
        raise exits.JobError(
            "job.yaml: a value is not a number, text, list, mapping, true, false or null: "
            f"{error.args[-1]!r}"
        ) from None


def _copied(given: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the modules among some objects, which share what these share; everything else as it
    is.

    Raises:
        JobError: if they cannot be copied, or if a loss that is a function holds the model, whose
            copy is trained.
    """
    from torch import nn

    modules = {name: value for name, value in given.items() if isinstance(value, nn.Module)}
    model, loss = modules.get("model"), given.get("loss")
    if model is not None and "loss" not in modules and _holds(loss, _pieces(model)):
        raise exits.JobError(
            "loss: it holds the model or a part of it, and a copy of the model is trained: give a "
            "torch.nn.Module that holds it"
        )
    try:
        return {**given, **copy.deepcopy(modules)}
    except Exception as error:
        if exits.is_out_of_memory(error):
            raise
        raise exits.JobError(
            f"{' and '.join(modules)}: copy.deepcopy raises {type(error).__name__}: {error}"
        ) from None


def _pieces(model: nn.Module) -> set[int]:
    """The identities of a model's modules, parameters and buffers."""
    return {
        id(piece)
        for kind in ("modules", "parameters", "buffers")
        for piece in getattr(model, kind)()
    }


def _holds(value: Any, pieces: set[int], depth: int = 4) -> bool:
    """Whether something that can be called reaches a piece of a model: by its closure, its object,
    its attributes, the global variables that it names, or the arguments of a functools.partial,
    nested up to `depth` times.
    """
    if id(value) in pieces:
        return True
    if depth == 0 or isinstance(value, (type, types.ModuleType)):
        return False
    inner: list[Any] = [getattr(value, "__self__", None), getattr(value, "func", None)]
    inner += [
        cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _is_bound(cell)
    ]
    for name in ("args", "__defaults__"):
        if isinstance(values := getattr(value, name, None), tuple):
            inner += values
    for name in ("keywords", "__kwdefaults__", "__dict__"):
        if isinstance(values := getattr(value, name, None), dict):
            inner += values.values()
    if isinstance(value, types.FunctionType):
        named = (value.__globals__.get(name) for name in _names_used(value.__code__))
        inner += [each for each in named if callable(each)]
    if isinstance(value, (tuple, list)):
        inner += value
    if isinstance(value, dict):
        inner += value.values()
    return any(_holds(part, pieces, depth - 1) for part in inner if part is not None)


def _names_used(code: types.CodeType) -> Iterator[str]:
    """The global names and attributes that a function's code names, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_used(constant)


def _is_bound(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # its variable has no value yet
        return False


def _run_objects(
    launch: Launch | None,
    read: Callable[[], Job],
    path: Path,
    given: Mapping[str, Any],
    fresh: bool,
) -> dict[str, Any]:
    from hvdlarge.comm.rank_checks import on_rank_0, raise_on_all_ranks
    from hvdlarge.comm.solo import SoloChannel, SoloCollectives
    from hvdlarge.resilience.preemption import StopRequest
    from hvdlarge.resilience.watchdog import Watchdog
    from hvdlarge.training.build import own_memory
    from hvdlarge.training.run import run

    summary: dict[str, Any] = {}

    def work(context: RankContext, job: Job) -> None:
        # Copies, since a run changes device, dtypes and mode, and Horovod leaves hooks behind
        copies = raise_on_all_ranks(context.control, lambda: _copied(given))
        run(job, path, fresh, replace(context, objects=copies))
        for name, trained in copies.items():
            if trained is not given[name]:
                own_memory({name: given[name]})
                given[name].load_state_dict(trained.state_dict())
        read_summary = (job.run_folder / "summary.json").read_text
        text = on_rank_0(context.control, lambda: read_summary(encoding="utf-8")) or ""
        summary.update(json.loads(context.control.allgather(text.encode())[0]))

    if launch is None:
        job = read()
        # Never started: it must not end the caller's process
        watchdog = Watchdog(0, job.timeouts.limits())
        context = RankContext(None, {}, SoloChannel(), SoloCollectives(), watchdog, StopRequest())
        work(context, job)
        return summary
    try:
        on_all_ranks(launch, read, {"objects": sorted(given)}, work, watched=True, last=False)
    except WorldMismatchError as error:
        raise exits.InvalidEnvironmentError(str(error)) from None
    return summary


def _dry_run(options: argparse.Namespace, launch: Launch | None) -> int:
    """Print the job with every default and start nothing; every rank returns the same code."""
    lines = []
    try:
        job = read_job(options.job, options.overrides)
        try:
            samples = known_or_counted_samples(job, _count)
        except UnknownSamples as unknown:
            lines.append(f"# the schedule was not checked: {unknown}")
        else:
            plan_run(job, samples.number, 1 if launch is None else launch.size)
            if samples.was_built:
                lines.append(f"# {job.data.name} was built: it has {samples.number:,} samples")
    except exits.RunExit as end:
        if is_reporter(launch):
            print_error(str(end))
        return end.code
    if is_reporter(launch):
        print_status("\n".join([*lines, job.to_yaml().rstrip()]))
    return exits.FINISHED


def _count(job: Job) -> int:
    from hvdlarge.training.build import load_data

    return len(load_data(job.data, job.seed)[0])


def _parse(arguments: Sequence[str] | None, reports: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.train",
        description="Train a job with LARS, AdaBatch and LEGW, alone or on many workers.",
        epilog="Many workers: horovodrun -np 64 python -m hvdlarge.train job.yaml (or mpirun). "
        "Exit codes: 0 finished, 2 wrong job or command line, 3 wrong environment, 70 an error "
        "while training, 71 the ranks disagree, 72 a rank hangs, 73 diverged, 74 a checkpoint "
        "could not be written, 75 stopped on request: run it again, 76 a rank was lost, 77 a "
        "checkpoint is damaged or of another job.",
    )
    parser.add_argument("job", help="the job file, or the name of a shipped job such as digits")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="set a key of the job, e.g. lr.base=0.2",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start a new run; an earlier one is set aside"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the job with every default and start nothing"
    )
    parser.add_argument(
        "--explain",
        action=_Explain,
        nargs="?",
        const="",
        metavar="KEY",
        help="print what a key of the job means, e.g. lr.warmup, or all top-level keys, and exit",
    )
    parser.add_argument("--version", action="version", version=f"hvdlarge {__version__}")
    with only_if(reports):
        options = parser.parse_intermixed_args(arguments)
    options.job = job_path(options.job)
    return options


class _Explain(argparse.Action):
    """Prints the meaning of a key of the job file, and exits as `--help` does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            print(explain(values))
        except exits.JobError as error:
            parser.error(str(error))
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
