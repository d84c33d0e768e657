"""Door: python -m hvdlarge.train job.yaml [key.sub=value ...]

Runs the job, alone or as one worker of a launch, and leaves with an exit code of `exits.py`. This file is where the objects
of a run are put together; what they do is in the files it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlarge import __version__, exits
from hvdlarge.agreement import all_or_none, on_rank_0, same_everywhere
from hvdlarge.comm.launcher import Launch, bound_cores, cores_per_worker, detect, starting_settings
from hvdlarge.comm.world import (
    ControlWire,
    LostRank,
    RanksMismatch,
    TensorWire,
    WrongWorld,
    open_control,
    open_tensors,
)
from hvdlarge.controller import Controller
from hvdlarge.introduction import batch_line, model_line, notes, stage_table, update_line, world_line
from hvdlarge.job import Job, Timeouts, read_job
from hvdlarge.runlog import RunLog, complain, say, write_documents
from hvdlarge.stopping import StopRequest
from hvdlarge.watchdog import Watchdog

if TYPE_CHECKING:
    from hvdlarge.saver import Saver

# torch is imported inside the functions that need it: it takes a second, and a wrong job file should be answered at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code. Every rank of a launch calls this together."""
    launch = detect(os.environ)
    options = _parse(arguments, speaks=launch is None or launch.rank == 0)
    watchdog = Watchdog(0 if launch is None else launch.rank, _limits(options))
    watchdog.start()
    stop = StopRequest()
    stop.listen()
    settings = _settle_environment(launch)
    try:
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            raise WrongWorld("elastic Horovod is not supported; hvdlarge.launch goes on with fewer or more workers instead")
        control = open_control(launch)
    except WrongWorld as error:
        return _wrong_world(error, launch)
    try:
        return _leave_together(_run(options, launch, control, settings, watchdog, stop), control, watchdog)
    except exits.RunEnds as end:  # raised by every rank alike
        if control.rank == 0:
            (say if end.code == exits.STOPPED else complain)(str(end))
        return _leave_together(end.code, control, watchdog)
    except WrongWorld as error:
        code = _wrong_world(error, launch)
        time.sleep(0 if launch is None or launch.speaks_for_host else 2)  # let the message out before the run ends
        control.abort(code)
    except RanksMismatch as error:
        _let_lower_ranks_speak(control.rank)
        complain(f"the ranks disagree (seen by rank {control.rank}): {error}")
        control.abort(exits.RANKS_DISAGREE)
    except LostRank:
        # The rank that is gone, or the launcher, knows better why: it has some seconds to say so and to set the exit code.
        time.sleep(3.0)
        complain(f"rank {control.rank} of {control.size} ({socket.gethostname()}) has lost another rank")
        os._exit(exits.LOST_RANK)
    except BaseException as error:  # this rank alone: end the others too, who would wait for it for ever
        _let_lower_ranks_speak(control.rank)
        name = "interrupted" if isinstance(error, KeyboardInterrupt) else "internal error"
        complain(f"{name} on rank {control.rank} of {control.size} ({socket.gethostname()})\n{traceback.format_exc()}")
        control.abort(exits.INTERNAL_ERROR)


def _let_lower_ranks_speak(rank: int) -> None:
    """Where many ranks fail alike, one message is enough: the lowest rank's. Its abort ends this one while it waits here."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # mpirun's way to end a rank, about a second after another one's abort
    time.sleep(min(5.0, 1.25 * rank))


def _limits(options: argparse.Namespace) -> dict[str, float]:
    """The job's time limits, already before the ranks can talk; a wrong job is reported later, by all together."""
    try:
        timeouts = read_job(options.job, options.overrides).timeouts
    except exits.JobError:
        timeouts = Timeouts()
    return {key.removesuffix("_seconds"): value for key, value in timeouts.model_dump().items()}


def _leave_together(code: int, control: ControlWire, watchdog: Watchdog) -> int:
    """Close the control wire and return the code. Every rank calls this together."""
    control.close()
    watchdog.stop()
    return code


def _parse(arguments: Sequence[str] | None, speaks: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlarge.train",
        description="Train a job with LARS, AdaBatch and LEGW, alone or on many workers.",
        epilog="Many workers: horovodrun -np 64 python -m hvdlarge.train job.yaml (or mpirun). "
        "Exit codes: 0 finished, 2 wrong job or command line, 3 wrong environment, 70 internal error, 71 the ranks "
        "disagree, 72 a rank hangs, 73 diverged, 74 a checkpoint could not be written, 75 stopped on request: run it again, "
        "76 a rank was lost, 77 a checkpoint is damaged or of another job.",
    )
    parser.add_argument("job", help="the job file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="set a key of the job, e.g. lr.base=0.2")
    parser.add_argument("--fresh", action="store_true", help="begin anew; an earlier run of the folder is set aside")
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


def _run(
    options: argparse.Namespace,
    launch: Launch | None,
    control: ControlWire,
    settings: dict[str, str],
    watchdog: Watchdog,
    stop: StopRequest,
) -> int:
    """Agree on the job, then train it between the opening and the closing of the tensor wire."""
    job = all_or_none(control, lambda: read_job(options.job, options.overrides))
    same_everywhere(control, job.resolved(), "job")
    same_everywhere(control, _versions(), "versions")
    tensors = open_tensors(launch, control)
    try:
        _train(job, options, launch, control, tensors, settings, watchdog, stop)
    except exits.RunEnds:  # raised by every rank alike; what one rank raises alone must not wait for the others here
        tensors.close()
        raise
    tensors.close()
    return exits.FINISHED


def _train(
    job: Job,
    options: argparse.Namespace,
    launch: Launch | None,
    control: ControlWire,
    tensors: TensorWire,
    settings: dict[str, str],
    watchdog: Watchdog,
    stop: StopRequest,
) -> None:
    """Put the objects of the run together, in the order in which they depend on each other, and follow the decisions."""
    import torch

    from hvdlarge import assembly, resume
    from hvdlarge.checkpoint import CheckpointFolder
    from hvdlarge.loop import Cadence, Parts, save, train
    from hvdlarge.nonfinite import RollBack
    from hvdlarge.step_agreement import StepAgreement

    rank, world_size, folder = control.rank, control.size, job.run_folder
    hosts = [json.loads(message) for message in control.allgather(json.dumps(_host()).encode())]
    cores = cores_per_worker([(worker["host"], worker["cores"]) for worker in hosts], rank)
    torch.set_num_threads(1 if job.reduction == "exact" else cores)  # more threads would add up in another order
    if job.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it, before CUDA starts
        torch.use_deterministic_algorithms(True)
    device = all_or_none(control, lambda: assembly.choose_device(tensors))

    training_set, test_set = all_or_none(control, lambda: assembly.load_data(job.data, job.seed))
    sizes = {"training samples": len(training_set), "test samples": None if test_set is None else len(test_set)}
    same_everywhere(control, sizes | {"device": device.type}, "data and devices")
    plan = all_or_none(control, lambda: assembly.plan_run(job, len(training_set), world_size))
    model, loss, optimizer = all_or_none(
        control, lambda: assembly.build_learning(job.model, job.loss, job.optimizer, job.precision, job.seed, device)
    )

    facts = {"job": job.mathematics(), "data": sizes, "versions": _versions(), "world_size": world_size}
    keeper = CheckpointFolder(folder / "checkpoints", job.checkpoint.keep)  # rank 0's; the others never touch it
    length_may_grow = job.lr.decay.policy in ("constant", "multistep")
    start = on_rank_0(control, lambda: resume.enter(folder, options.fresh, keeper, facts, length_may_grow, model))
    learner = assembly.join_learning(model, loss, optimizer, control, tensors, device, job.seed, job.reduction == "exact")
    learner.model.train()
    position, state = resume.share(start.found if start is not None else None, learner, control, tensors)
    if position.samples_seen >= plan.clock.total_samples:
        if rank == 0:
            say(f"already finished: {folder} holds this run, complete; --fresh sets it aside and begins anew")
        return

    environment = {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "launcher": None if launch is None else launch.launcher,
        "world_size": world_size,
        "versions": _versions(),
        "device": str(device),
        "settings": settings,
        "workers": hosts,
    }
    log = None
    if start is not None:
        offsets = {} if start.found is None else start.found.log_offsets
        write_documents(folder, Path(options.job), job.to_yaml(), environment, position, start.notes)
        log = RunLog(folder, plan, start.lock, offsets, position, state)
        say(world_line(environment, cores))
        say(f"data     {job.data.name}: {len(training_set):,} samples for training, {len(test_set or ()):,} for testing")
        say(f"model    {job.model.name}: {model_line(model)}")
        say(f"update   {update_line(optimizer)}")
        say(f"batch    {batch_line(plan)}")
        say("\n".join(["schedule", *stage_table(plan), *notes(plan, job.batch.micro == "auto", model)]))
        say(f"folder   {folder}")
        for note in start.notes:
            say(f"note     {note}")
    watchdog.take_notes(folder / "progress")
    stop.look(folder / "STOP" if rank == 0 else None, job.stop_after_minutes)

    fingerprint = int(job.fingerprint()[:8], 16)
    evaluation = assembly.build_evaluation(job.data, job.evaluate, test_set, rank, world_size)
    cadence = Cadence(job.log.every_steps, job.evaluate.every_epochs, job.compare_every_steps)
    try:
        while True:
            controller = Controller(plan, position) if rank == 0 else None
            loader = assembly.build_loader(job.data, training_set, job.seed)
            log_offsets = log.offsets if log is not None else dict
            saver = assembly.build_saver(
                job.checkpoint,
                control,
                tensors,
                learner,
                controller,
                keeper if rank == 0 else None,
                plan.clock,
                facts,
                log_offsets,
            )
            asks = functools.partial(_wishes, stop, saver)
            parts = Parts(
                control=control,
                tensors=tensors,
                plan=plan,
                feed=assembly.build_feed(job.data, plan, control, controller, loader),
                loader=loader,
                learner=learner,
                evaluation=evaluation,
                agreement=StepAgreement(tensors, control, fingerprint, asks),
                policy=assembly.build_policy(job.on_nonfinite, state),
                saver=saver,
                stop=stop,
                watchdog=watchdog,
                cadence=cadence,
                log=log,
            )
            if job.on_nonfinite.policy == "rollback" and (position.step == 0 or state.rolled_back):
                # Something to go back to; and after going back, the lower rate must outlive an interruption.
                here = position if rank == 0 else None
                save(parts, state, here, cut=False, best=False, in_cadence=True, wait=True)
            try:
                train(parts, state)
                break
            except RollBack as reason:
                on_rank_0(control, saver.finish)
                found = on_rank_0(control, lambda: resume.go_back(keeper, model))
                tensors.broadcast_(list(model.state_dict().items()))
                rolled_back = state.rolled_back + 1
                position, state = resume.share(found, learner, control, tensors)
                position = replace(position, lr_factor=position.lr_factor * reason.lr_factor, ahead=())
                state.rolled_back = rolled_back
                if log is not None and found is not None:
                    log.go_back(found.log_offsets, position)
                    say(f"{reason}; back to step {position.step}, the rate is multiplied by {position.lr_factor:g} from there")
        on_rank_0(control, saver.finish)
        if log is not None:
            assert controller is not None
            log.finish(state, controller.final_position())
    except exits.Stopped:
        stop.consume_file()
        raise
    finally:
        if log is not None:
            log.close()


def _wishes(stop: StopRequest, saver: Saver) -> dict[str, bool]:
    """What this rank asks of all, in each step."""
    return {"stop": stop.wanted(), "save": saver.wants_save(), "failed": saver.failed()}


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
