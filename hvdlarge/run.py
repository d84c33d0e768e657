"""One run, from an accepted job to its summary: its objects are put together in the order in which
they depend on each other.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hvdlarge import build
from hvdlarge.checkpoint import resume
from hvdlarge.checkpoint.folder import CheckpointFolder
from hvdlarge.checkpoint.saver import CheckpointSaver
from hvdlarge.comm.environment import host, versions
from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.comm.launcher import Launch, cores_per_worker
from hvdlarge.comm.rank_checks import check_equal_across_ranks, on_rank_0, raise_on_all_ranks
from hvdlarge.config.job import Job
from hvdlarge.config.planning import plan_run
from hvdlarge.controller import Controller
from hvdlarge.data.loader import Loader
from hvdlarge.evaluation.metric import Metrics, rankings
from hvdlarge.exits import Stopped
from hvdlarge.loop import Cadence, LoopComponents, save, train
from hvdlarge.models.state import trained_modules
from hvdlarge.optim.precision import Precision
from hvdlarge.rehearsal import rehearse
from hvdlarge.replica import Replica
from hvdlarge.reporting.describe import (
    batch_line,
    model_line,
    notes,
    rule_notes,
    stage_table,
    update_line,
    update_notes,
    world_line,
)
from hvdlarge.resilience.consistency import ConsistencyCheck
from hvdlarge.resilience.nonfinite import RollBack
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.schedule.plan import Plan, RunProgress
from hvdlarge.telemetry.console import print_status
from hvdlarge.telemetry.run_folder import summary_of, write_documents, write_summary
from hvdlarge.telemetry.run_log import RunLog
from hvdlarge.train_state import TrainState


@dataclass(frozen=True)
class RankContext:
    """What this rank has at hand before it looks at the job."""

    launch: Launch | None  # None without a launcher
    settings: Mapping[str, str]  # what was set in the environment for MPI and Horovod
    control: ControlChannel
    tensors: Collectives
    watchdog: Watchdog
    stop: StopRequest


@dataclass(frozen=True)
class Components:
    """What a job names, built on this rank alone; every rank's are alike."""

    arithmetic: Precision
    training_set: Any
    test_set: Any  # or None
    sizes: Mapping[str, int | None]  # of both, in samples
    plan: Plan
    model: torch.nn.Module
    loss: Callable[[Any, Any], torch.Tensor]
    optimizer: torch.optim.Optimizer
    metrics: Metrics
    notes: Sequence[str] = ()  # what the user may not expect
    unlike: bool = False  # whether the ranks round differently


def run(job: Job, job_file: Path, fresh: bool, worker: RankContext) -> None:
    """Train a job to its end, or to where it is stopped. Every rank calls this together.

    Args:
        job: the same on every rank.
        job_file: kept in the run folder.
        fresh: set an earlier run of the folder aside.
        worker: this rank.

    Raises:
        RunExit: on every rank, for every end that has an exit code of its own.
    """
    control = worker.control
    hosts = [json.loads(message) for message in control.allgather(json.dumps(host()).encode())]
    cores = cores_per_worker([(other["host"], other["cores"]) for other in hosts], control.rank)
    exact = job.reduction == "exact"
    _settle_torch(1 if exact else cores, job.deterministic or exact, tf32=job.precision == "tf32")
    found = build_components(job, control, worker.tensors, worker.watchdog)
    loader = build.build_loader(job.data, found.training_set, job.seed)
    try:
        found = _rehearse(job, found, loader, worker)
        _train(job, job_file, fresh, worker, found, loader, hosts, cores)
    finally:
        loader.close()


def _rehearse(job: Job, found: Components, loader: Loader, worker: RankContext) -> Components:
    to_device = build.device_mover(found.arithmetic, job.model.channels_last)
    read = (
        None
        if found.test_set is None
        else build.test_samples(job.data, job.evaluate, found.test_set)
    )
    with worker.watchdog.during("rehearse"):
        unlike = rehearse(
            found.plan,
            found.model,
            found.loss,
            found.arithmetic,
            found.metrics,
            to_device,
            loader,
            read,
            job.seed,
            worker.control,
        )
    if found.arithmetic.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(found.arithmetic.device)
    note = (
        "the ranks do not round alike (unlike CPUs or GPUs, or numbers of threads): instead of "
        "being compared, weights and optimizer state are taken over from rank 0, every "
        f"{job.compare_every_steps} steps and before each checkpoint"
    )
    return replace(found, unlike=unlike, notes=[*found.notes, note] if unlike else found.notes)


def _train(
    job: Job,
    job_file: Path,
    fresh: bool,
    worker: RankContext,
    found: Components,
    loader: Loader,
    hosts: Sequence[Mapping[str, Any]],
    cores: int,
) -> None:
    """What `run` does once everything that the job names is there and has been tried."""
    control, folder = worker.control, job.run_folder
    facts = {
        "job": job.resume_signature(),
        "data": found.sizes,
        "versions": versions(),
        "world_size": control.size,
    }
    # Rank 0's; the others never touch it
    checkpoints = CheckpointFolder(folder / "checkpoints", job.checkpoint.keep)
    length_may_grow = job.lr.decay.policy in ("constant", "multistep", "exponential")
    modules = trained_modules(found.model, found.loss)
    with worker.watchdog.during("checkpoint"):
        start = on_rank_0(
            control,
            lambda: resume.enter(folder, fresh, checkpoints, facts, length_may_grow, modules),
        )
    try:
        _train_from(start, job, job_file, worker, found, loader, checkpoints, facts, hosts, cores)
    finally:
        if start is not None:
            start.lock.release()


def _train_from(
    start: resume.RunStart | None,
    job: Job,
    job_file: Path,
    worker: RankContext,
    found: Components,
    loader: Loader,
    checkpoints: CheckpointFolder,
    facts: Mapping[str, Any],
    hosts: Sequence[Mapping[str, Any]],
    cores: int,
) -> None:
    """Train from where the run stands to its end; `start` is rank 0's."""
    control, folder = worker.control, job.run_folder
    learner = join(job, found, control, worker.tensors)
    with worker.watchdog.during("checkpoint"):
        position, state = resume.share(
            start.found if start is not None else None, learner, control, worker.tensors
        )
    found, cut_notes = _keep_cutting(found, state, control.size)
    if position.samples_seen >= found.plan.clock.total_samples:
        on_rank_0(
            control,
            lambda: _already_finished(
                folder, start, found.plan, position, state, _gradient_bytes(job, learner)
            ),
        )
        return

    def open_log() -> RunLog:
        assert start is not None  # rank 0 has it
        environment = _environment(worker, found.arithmetic.device, hosts)
        write_documents(folder, job_file, job.to_yaml(), environment, position, start.notes)
        offsets = {} if start.found is None else start.found.log_offsets
        log = RunLog(folder, found.plan, start.lock, offsets, position, state)
        _introduce(
            job,
            found,
            environment,
            cores,
            [*found.notes, *update_notes(learner.update.optimizer), *cut_notes, *start.notes],
        )
        return log

    log = on_rank_0(control, open_log)
    worker.watchdog.take_notes(folder / "progress")
    worker.stop.watch(folder / "STOP" if control.rank == 0 else None, job.stop_after_minutes)
    try:
        follow(
            job,
            found,
            worker,
            learner,
            loader,
            checkpoints if control.rank == 0 else None,
            facts,
            log,
            position,
            state,
        )
    except Stopped:
        worker.stop.consume_file()
        raise
    finally:
        if log is not None:
            log.close()


def _already_finished(
    folder: Path,
    start: resume.RunStart | None,
    plan: Plan,
    position: RunProgress,
    state: TrainState,
    gradient_bytes: int,
) -> None:
    """Leave a finished run alone, but for a summary that it did not come to write: it was killed
    after its last checkpoint.
    """
    made_up = ""
    if not (folder / "summary.json").exists():
        assert start is not None  # rank 0 has it
        assert start.found is not None  # what is finished was begun
        plan = replace(plan, world_size=start.found.world_size)
        write_summary(
            folder, summary_of(plan, state, position, state.train_seconds, None, gradient_bytes)
        )
        made_up = ", and its summary.json, which was missing, is written"
    print_status(
        f"already finished: {folder} holds this run, complete{made_up}; --fresh sets it aside and "
        "begins anew"
    )


def build_components(
    job: Job, control: ControlChannel, tensors: Collectives, watchdog: Watchdog
) -> Components:
    """Build what the job names and hold it against the other ranks'. Every rank calls this
    together.

    Raises:
        JobError, InvalidEnvironmentError, RanksDisagreeError: on every rank.
    """
    device = raise_on_all_ranks(control, lambda: build.choose_device(tensors))
    arithmetic = raise_on_all_ranks(control, lambda: Precision(job.precision, device))
    notes = build.check_gpus(device, control, tensors)
    with watchdog.during("data"):
        training_set, test_set = raise_on_all_ranks(
            control, lambda: build.load_data(job.data, job.seed)
        )
    sizes = {
        "training samples": len(training_set),
        "test samples": None if test_set is None else len(test_set),
    }
    check_equal_across_ranks(control, sizes | {"device": device.type}, "data and devices")
    plan = raise_on_all_ranks(control, lambda: plan_run(job, len(training_set), control.size))
    built, metrics = raise_on_all_ranks(
        control,
        lambda: (
            build.build_learning(job.model, job.loss, job.optimizer, arithmetic, job.seed),
            build.build_metrics(job.evaluate),
        ),
    )
    if job.batch.micro == "auto" and device.type == "cuda":
        largest = build.largest_micro_batch(
            plan,
            built.model,
            built.loss,
            arithmetic,
            training_set,
            job.data,
            job.model.channels_last,
            control,
        )
        torch.cuda.reset_peak_memory_stats(device)  # what was tried out is not what the run needs
        plan = replace(plan, largest_micro_batch=largest)
    return Components(
        arithmetic, training_set, test_set, sizes, plan, *built[:3], metrics, [*notes, *built.notes]
    )


def _keep_cutting(
    found: Components, state: TrainState, world_size: int
) -> tuple[Components, list[str]]:
    """On as many workers as before, cut steps as before the interruption, if that still fits; and
    what is to be said of it.
    """
    largest, notes = found.plan.largest_micro_batch, []
    if largest is None:
        return found, []
    before = state.largest_micro_batch if state.workers == world_size else None
    if before is not None and largest < before:
        notes.append(
            f"only {largest:,} samples fit at once now, not {before:,}: batch statistics and "
            "dropout follow that"
        )
    elif before is not None:
        largest = before
    state.largest_micro_batch, state.workers = largest, world_size
    return replace(found, plan=replace(found.plan, largest_micro_batch=largest)), notes


def join(job: Job, found: Components, control: ControlChannel, tensors: Collectives) -> Replica:
    """Put the sum over all workers before the update. Every rank calls this together."""
    return build.build_replica(
        found.model,
        found.loss,
        found.optimizer,
        found.arithmetic,
        job.gradients,
        job.horovod.groups,
        job.model.channels_last,
        control,
        tensors,
        job.seed,
        exact=job.reduction == "exact",
    )


def follow(
    job: Job,
    found: Components,
    worker: RankContext,
    learner: Replica,
    loader: Loader,
    checkpoints: CheckpointFolder | None,
    facts: Mapping[str, Any],
    log: RunLog | None,
    position: RunProgress,
    state: TrainState,
) -> None:
    """Follow the decisions from `position` to the end, by way of as many rollbacks as the job
    allows.

    Every rank calls this together; `checkpoints` and `log` are rank 0's.
    """
    went_back = False
    while True:
        controller = Controller(found.plan, position) if worker.control.rank == 0 else None
        parts = build_loop(
            job, found, worker, learner, loader, controller, checkpoints, facts, log, state
        )
        try:
            if went_back or (job.on_nonfinite.policy == "rollback" and position.step == 0):
                # Something to go back to; and after going back, the lower rate must outlive an
                # interruption.
                state.scheduled_step = position.step
                here = position if controller is not None else None
                save(parts, state, here, truncated=False, best=False, scheduled=True, wait=True)
            train(parts, state)
        except RollBack as reason:
            loader.close()
            position, state = _go_back(parts, state, checkpoints, reason)
            went_back = True
            loader = build.build_loader(job.data, found.training_set, job.seed)
        else:
            break
        finally:
            parts.loader.close()
    memory = max(
        int(message)
        for message in worker.control.allgather(b"%d" % _peak_memory(found.arithmetic.device))
    )
    on_rank_0(
        worker.control,
        lambda: _finish(parts, state, controller, memory, _gradient_bytes(job, learner)),
    )


def _finish(
    parts: LoopComponents,
    state: TrainState,
    controller: Controller | None,
    peak_memory: int,
    gradient_bytes: int,
) -> None:
    """Wait for the last checkpoint and write the summary. Rank 0 alone."""
    parts.saver.finish()
    if parts.log is not None and controller is not None:
        parts.log.finish(state, controller.final_position(), peak_memory, gradient_bytes)


def _gradient_bytes(job: Job, learner: Replica) -> int:
    """What a worker sends in each step."""
    half = job.gradients.compression == "fp16"
    return sum(weight.numel() * (2 if half else weight.element_size()) for weight in learner.names)


def _peak_memory(device: torch.device) -> int:
    """The most memory that this rank has held so far, in bytes: torch's on its GPU, or the whole
    process's on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def build_loop(
    job: Job,
    found: Components,
    worker: RankContext,
    learner: Replica,
    loader: Loader,
    controller: Controller | None,
    checkpoints: CheckpointFolder | None,
    facts: Mapping[str, Any],
    log: RunLog | None,
    state: TrainState,
) -> LoopComponents:
    """The objects that the loop works with; controller, checkpoints and log are rank 0's."""
    control, tensors = worker.control, worker.tensors
    saver = CheckpointSaver(
        control,
        tensors,
        learner,
        checkpoints,
        found.plan.clock,
        every_epochs=job.checkpoint.epochs,
        every_steps=job.checkpoint.every_steps,
        every_minutes=job.checkpoint.every_minutes,
        rankings=rankings(job.checkpoint.best, found.metrics),
        facts=dict(facts),
        log_offsets=log.offsets if log is not None else dict,
        goes_back=job.on_nonfinite.policy == "rollback",
    )
    asks = functools.partial(_wishes, worker.stop, saver, log)
    return LoopComponents(
        control=control,
        tensors=tensors,
        plan=found.plan,
        controller=controller,
        feed=build.build_feed(job.data, found.plan, control, controller, loader),
        loader=loader,
        learner=learner,
        evaluation=build.build_evaluation(
            job.data, job.evaluate, found.metrics, found.test_set, control.rank, control.size
        ),
        agreement=ConsistencyCheck(control, int(job.fingerprint()[:8], 16), asks),
        policy=build.build_policy(job.on_nonfinite, state, learner),
        saver=saver,
        stop=worker.stop,
        watchdog=worker.watchdog,
        cadence=Cadence(job.log.every_steps, job.evaluate.every_epochs, job.compare_every_steps),
        log=log,
        unlike=found.unlike,
    )


def _go_back(
    parts: LoopComponents, state: TrainState, checkpoints: CheckpointFolder | None, reason: RollBack
) -> tuple[RunProgress, TrainState]:
    """Bring every rank back to the last checkpoint, with a lower rate. Every rank calls this
    together.
    """
    control, tensors, rolled_back = parts.control, parts.tensors, state.rolled_back + 1
    cutting = state.largest_micro_batch, state.workers
    on_rank_0(control, parts.saver.finish)
    with parts.watchdog.during("checkpoint"):
        found = on_rank_0(
            control,
            lambda: (
                resume.go_back(checkpoints, parts.learner.modules, state.scheduled_step)
                if checkpoints is not None
                else None
            ),
        )
    build.share_state(parts.learner.modules, control, tensors)
    position, state = resume.share(found, parts.learner, control, tensors)
    position = replace(position, lr_factor=position.lr_factor * reason.lr_factor)
    state.rolled_back = rolled_back
    state.largest_micro_batch, state.workers = cutting  # this part of the run goes on as it does
    log = parts.log
    on_rank_0(
        control,
        lambda: (
            log.go_back(found.log_offsets, position)
            if log is not None and found is not None
            else None
        ),
    )
    if log is not None:
        for note in found.notes if found is not None else ():
            print_status(f"note     {note}")
        print_status(
            f"{reason}; back to step {position.step}, the rate is multiplied by "
            f"{position.lr_factor:g} from there"
        )
    return position, state


def _settle_torch(threads: int, deterministic: bool, tf32: bool) -> None:
    torch.set_num_threads(threads)  # one in exact mode: more would add up in another order
    # fp32 means 23 bits of mantissa: torch's default lets convolutions use TF32, with 10.
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if deterministic:
        # torch asks for it, before CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _introduce(
    job: Job,
    found: Components,
    environment: Mapping[str, Any],
    cores: int,
    start_notes: Sequence[str],
) -> None:
    """Say what runs, before the first step. Rank 0 only."""
    print_status(world_line(environment, cores))
    print_status(
        f"data     {job.data.name}: {len(found.training_set):,} samples for training, "
        f"{len(found.test_set or ()):,} for testing"
    )
    print_status(f"model    {job.model.name}: {model_line(found.model)}")
    print_status(f"update   {update_line(found.optimizer)}")
    print_status(f"batch    {batch_line(found.plan)}")
    print_status("\n".join([f"schedule {found.plan.fingerprint()}", *stage_table(found.plan)]))
    for note in [*rule_notes(job, found.plan), *notes(found.plan, found.model)]:
        print_status(note)
    print_status(f"folder   {job.run_folder}")
    for note in start_notes:
        print_status(f"note     {note}")


def _environment(
    worker: RankContext, device: torch.device, hosts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the run folder keeps about where a run was started."""
    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "launcher": None if worker.launch is None else worker.launch.launcher,
        "world_size": worker.control.size,
        "versions": versions(),
        "device": str(device),
        "settings": dict(worker.settings),
        "workers": list(hosts),
    }


def _wishes(stop: StopRequest, saver: CheckpointSaver, log: RunLog | None) -> dict[str, bool]:
    """What this rank asks of all, in each step."""
    failed = saver.failed() or (log is not None and log.failed)
    return {"stop": stop.requested(), "save": saver.wants_save(), "failed": failed}
