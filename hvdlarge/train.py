"""Door: python -m hvdlarge.train job.yaml [key.sub=value ...]

Runs the job, alone or as one worker of a launch, and leaves with an exit code of `exits.py`. This file is where the objects
of a run are put together; what they do is in the files it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hvdlarge import __version__, exits
from hvdlarge.agreement import all_or_none, same_everywhere
from hvdlarge.comm.launcher import Launch, bound_cores, cores_per_worker, detect, starting_settings
from hvdlarge.comm.world import ControlWire, TensorWire, WrongWorld, open_control, open_tensors
from hvdlarge.introduction import batch_line, model_line, notes, stage_table, update_line, world_line
from hvdlarge.job import Job, read_job
from hvdlarge.runlog import RunLog, complain, say

# torch is imported inside the functions that need it: it takes a second, and a wrong job file should be answered at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code. Every rank of a launch calls this together."""
    launch = detect(os.environ)
    try:
        options = _parse(arguments, speaks=launch is None or launch.rank == 0)
        settings = _settle_environment(launch)
        control = open_control(launch)
    except WrongWorld as error:
        return _wrong_world(error, launch)
    rank = control.rank
    try:
        code = _run(options, launch, control, settings)
        control.close()
        return code
    except exits.RunEnds as end:  # raised by every rank alike
        if rank == 0:
            complain(str(end))
        control.close()
        return end.code
    except WrongWorld as error:
        code = _wrong_world(error, launch)
        time.sleep(0 if launch is None or launch.speaks_for_host else 2)  # let the message out before the run ends
        control.abort(code)
    except BaseException as error:  # this rank alone: end the others too, who would wait for it for ever
        time.sleep(min(5.0, 0.25 * rank))  # where many ranks fail alike, one traceback is enough: the lowest rank's
        name = "interrupted" if isinstance(error, KeyboardInterrupt) else "internal error"
        complain(f"{name} on rank {rank} of {control.size} ({socket.gethostname()})\n{traceback.format_exc()}")
        control.abort(exits.INTERNAL_ERROR)


def _parse(arguments: Sequence[str] | None, speaks: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.train",
        description="Train a job with LARS, AdaBatch and LEGW, alone or on many workers.",
        epilog="Many workers: horovodrun -np 64 python -m hvdlarge.train job.yaml (or mpirun). "
        "Exit codes: 0 finished, 2 wrong job or command line, 3 wrong environment, 70 internal error, 71 the ranks "
        "disagree, 73 diverged.",
    )
    parser.add_argument("job", help="the job file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="set a key of the job, e.g. lr.base=0.2")
    parser.add_argument("--version", action="version", version=f"hvdlarge {__version__}")
    if speaks:
        return parser.parse_args(arguments)
    # One copy of a usage message is enough; the other ranks leave with the same code.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return parser.parse_args(arguments)


def _settle_environment(launch: Launch | None) -> dict[str, str]:
    """Set what MPI and Horovod read when they start; returns what was set."""
    settings = {} if launch is None else starting_settings(os.environ, launch.local_size, len(bound_cores()))
    os.environ.update(settings)
    return settings


def _wrong_world(error: WrongWorld, launch: Launch | None) -> int:
    if launch is None or launch.speaks_for_host:
        complain(f"{error} (host {socket.gethostname()})")
    return exits.WRONG_ENVIRONMENT


def _run(options: argparse.Namespace, launch: Launch | None, control: ControlWire, settings: dict[str, str]) -> int:
    """Agree on the job, then train it between the opening and the closing of the tensor wire."""
    job = all_or_none(control, lambda: read_job(options.job, options.overrides))
    same_everywhere(control, job.resolved(), "job")
    same_everywhere(control, _versions(), "versions")
    tensors = open_tensors(launch, control)
    try:
        _train(job, Path(options.job), launch, control, tensors, settings)
    except exits.RunEnds:  # raised by every rank alike; what one rank raises alone must not wait for the others here
        tensors.close()
        raise
    tensors.close()
    return exits.FINISHED


def _train(
    job: Job,
    job_file: Path,
    launch: Launch | None,
    control: ControlWire,
    tensors: TensorWire,
    settings: dict[str, str],
) -> None:
    """Put the objects of the run together, in the order in which they depend on each other, and follow the decisions."""
    import torch

    from hvdlarge import assembly
    from hvdlarge.loop import Cadence, train

    rank, world_size = control.rank, control.size
    hosts = [json.loads(message) for message in control.allgather(json.dumps(_host()).encode())]
    cores = cores_per_worker([(worker["host"], worker["cores"]) for worker in hosts], rank)
    torch.set_num_threads(cores)
    device = all_or_none(control, lambda: assembly.choose_device(tensors))

    training_set, test_set = all_or_none(control, lambda: assembly.load_data(job.data, job.seed))
    sizes = {"training samples": len(training_set), "test samples": None if test_set is None else len(test_set)}
    same_everywhere(control, sizes | {"device": device.type}, "data and devices")
    plan = all_or_none(control, lambda: assembly.plan_run(job, len(training_set), world_size))
    model, loss, optimizer = all_or_none(
        control, lambda: assembly.build_learning(job.model, job.loss, job.optimizer, job.precision, job.seed, device)
    )
    learner = assembly.join_learning(model, loss, optimizer, tensors, device, job.seed, rank)
    loader = assembly.build_loader(job.data, training_set, job.seed)
    evaluation = assembly.build_evaluation(job.data, job.evaluate, test_set, rank, world_size)
    feed = assembly.build_feed(job.data, plan, control, loader)

    environment = {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "launcher": None if launch is None else launch.launcher,
        "world_size": world_size,
        "versions": _versions(),
        "device": str(device),
        "settings": settings,
        "workers": hosts,
    }
    log = all_or_none(
        control,
        lambda: RunLog.begin(job.run_folder, job_file, job.to_yaml(), environment, plan) if rank == 0 else None,
    )
    if log is not None:
        say(world_line(environment, cores))
        say(f"data     {job.data.name}: {len(training_set):,} samples for training, {len(test_set or ()):,} for testing")
        say(f"model    {job.model.name}: {model_line(model)}")
        say(f"update   {update_line(optimizer)}")
        say(f"batch    {batch_line(plan)}")
        say("\n".join(["schedule", *stage_table(plan), *notes(plan, job.batch.micro == "auto", model)]))
        say(f"folder   {log.folder}" + (f" (an earlier run is now in {log.set_aside})" if log.set_aside else ""))

    cadence = Cadence(job.log.every_steps, job.evaluate.every_epochs)
    try:
        results = train(feed, plan, loader, learner, tensors, evaluation, cadence, log)
        all_or_none(control, lambda: log.finish(results, model.state_dict()) if log is not None else None)
    finally:
        if log is not None:
            log.close()


def _host() -> dict[str, Any]:
    """What the run folder keeps about each worker; `cores` are the numbers of those it may run on."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "cores": bound_cores()}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"hvdlarge": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "horovod", "mpi4py", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
