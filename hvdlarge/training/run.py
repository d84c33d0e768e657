"""One run, from an accepted job to its summary: its objects are put together in the order in which
they depend on each other.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hvdlarge.checkpoint import resume
from hvdlarge.checkpoint.content import RunFacts
from hvdlarge.checkpoint.folder import CheckpointFolder, NoCheckpoints
from hvdlarge.checkpoint.initial_weights import load_initial_weights
from hvdlarge.checkpoint.saver import CheckpointSaver
from hvdlarge.comm.environment import host, versions
from hvdlarge.comm.launcher import threads_per_worker
from hvdlarge.comm.rank_checks import on_rank_0, raise_on_all_ranks
from hvdlarge.config.job import AVERAGED, Job
from hvdlarge.controller import Controller
from hvdlarge.data.loader import Loader
from hvdlarge.evaluation.metric import rankings
from hvdlarge.exits import CheckpointWriteError, Stopped
from hvdlarge.models.state import MODEL, Modules
from hvdlarge.preflight.auto_micro_batch import keep_micro_batches
from hvdlarge.preflight.rehearsal import rehearse
from hvdlarge.replica.replica import Replica
from hvdlarge.replica.train_state import TrainState
from hvdlarge.reporting.describe import startup_summary
from hvdlarge.resilience.consistency import ConsistencyCheck
from hvdlarge.resilience.nonfinite import RollBack
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.telemetry.background_sink import BackgroundSink, open_sinks
from hvdlarge.telemetry.console import print_error, print_status
from hvdlarge.telemetry.hooks import Hooks, NoHooks, RunView
from hvdlarge.telemetry.measurements import Measurements, NoMeasurements
from hvdlarge.telemetry.run_folder import Sums, summary_of, write_documents, write_summary
from hvdlarge.telemetry.run_log import RunLog, SilentRunLog
from hvdlarge.telemetry.sinks import SinkRun, Status
from hvdlarge.telemetry.weight_distance import FILE, WeightDistance
from hvdlarge.training.build import (
    Components,
    build_components,
    build_evaluation,
    build_feed,
    build_loader,
    build_policy,
    build_replica,
    share_state,
    test_samples,
)
from hvdlarge.training.loop import Cadence, LoopComponents, save, train
from hvdlarge.world import RankContext


def run(job: Job, job_file: Path, fresh: bool, context: RankContext) -> None:
    """Train a job to its end, or to where it is stopped. Every rank calls this together.

    Args:
        job: the same on every rank.
        job_file: kept in the run folder.
        fresh: set an earlier run of the folder aside.
        context: of this rank.

    Raises:
        RunExit: on every rank, for every end that has an exit code of its own.
    """
    control = context.control
    described = raise_on_all_ranks(control, lambda: json.dumps(host()).encode())
    hosts = [json.loads(message) for message in control.allgather(described)]
    threads = threads_per_worker(hosts, control.rank)
    exact = job.reduction == "exact"
    _configure_torch(
        1 if exact else threads, job.deterministic or exact, tf32=job.precision == "tf32"
    )
    components = build_components(job, context)
    loader = build_loader(job.data, components.form, components.training_set, job.seed)
    try:
        components = _rehearse(job, components, loader, context)
        _train_in_folder(job, job_file, fresh, context, components, loader, hosts)
    finally:
        loader.close()


def _rehearse(job: Job, components: Components, loader: Loader, context: RankContext) -> Components:
    """Rehearse with the first samples; the result records whether the ranks round differently."""
    device, test_set = components.objective.precision.device, components.test_set
    read_again = (
        None
        if test_set is None
        else test_samples(job.data, job.evaluate, components.form, test_set, components.transforms)
    )
    with context.watchdog.during("rehearse"):
        rehearsed = rehearse(
            components.plan,
            components.objective,
            components.metrics,
            loader,
            read_again,
            components.transforms.train,
            job.seed,
            job.on_nonfinite.policy == "stop",
            context.control,
        )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    components = replace(components, rehearsed=rehearsed)
    best = job.checkpoint.best
    named = best if best in components.metrics else (best or "").removeprefix(AVERAGED)
    if named in rehearsed.without_result:
        note = (
            f"checkpoint.best: {best} does not apply to the first samples of the test set; as "
            "long as it applies to none, no best.pt is written"
        )
        components = replace(components, notes=[*components.notes, note])
    if not rehearsed.rounds_differently:
        return components
    note = (
        "the ranks round differently (different CPUs, GPUs or thread counts): weights and "
        "optimizer state are not compared but broadcast from rank 0, every "
        f"{job.compare_every_steps} steps and before each checkpoint"
    )
    return replace(components, notes=[*components.notes, note])


def _train_in_folder(
    job: Job,
    job_file: Path,
    fresh: bool,
    context: RankContext,
    components: Components,
    loader: Loader,
    hosts: Sequence[Mapping[str, Any]],
) -> None:
    """Enter the run folder, resume from its checkpoint or begin, and train."""
    control, folder = context.control, job.run_folder
    facts = RunFacts(job.resume_signature(), components.sizes, versions(), control.size)
    checkpoints = CheckpointFolder(folder / "checkpoints", job.checkpoint.keep)  # rank 0's
    modules = components.objective.modules
    with context.watchdog.during("checkpoint"):
        start = (
            on_rank_0(control, lambda: _start(job, fresh, checkpoints, facts, modules))
            or resume.RunStart()
        )
    try:
        replica = build_replica(job, components, control, context.tensors)
        with context.watchdog.during("checkpoint"):
            progress, state = resume.share(start.resumed, replica, control, context.tensors)
        plan, micro_batch_notes = keep_micro_batches(components.plan, state)
        components = replace(
            components, plan=plan, notes=[*components.notes, *micro_batch_notes, *start.notes]
        )
        run = Run(job, context, components, replica, facts, checkpoints, SilentRunLog())
        if progress.samples_seen >= plan.clock.total_samples:
            on_rank_0(control, lambda: run.report_finished(start, progress, state))
            if context.objects:
                replica.statistics.all_reduce(context.tensors.sum)
            return
        log = on_rank_0(control, lambda: run.open_log(start, job_file, hosts, progress, state))
        run = replace(run, log=log or run.log)
        context.watchdog.take_notes(folder / "progress")
        stop_file = folder / "STOP" if control.rank == 0 else None
        context.stop.watch(stop_file, job.stop_after_minutes)
        status: Status = "failed"
        try:
            run.train(loader, progress, state)
            status = "finished"
        except Stopped:
            context.stop.consume_file()
            status = "stopped"
            raise
        finally:
            with context.watchdog.during("save"):
                run.log.close(status)
    finally:
        _finish_writing(checkpoints, context)
        start.release()


def _start(
    job: Job, fresh: bool, checkpoints: CheckpointFolder, facts: RunFacts, modules: Modules
) -> resume.RunStart:
    """Enter the run folder; load the weights from which a run begins, or those of its checkpoint.
    Rank 0 alone; errors are those of the two.
    """
    notes: list[str] = []
    if job.init_from is not None and (fresh or not checkpoints.newest_first()):
        # Before the folder is made or set aside: the file may be in it, or be refused
        notes = load_initial_weights(job.init_from, modules[MODEL])
    length_may_change = not job.lr.decay.depends_on_length
    start = resume.enter(job.run_folder, fresh, checkpoints, facts, length_may_change, modules)
    return replace(start, notes=[*notes, *start.notes])


def _finish_writing(checkpoints: CheckpointFolder, context: RankContext) -> None:
    """Wait for a checkpoint that a run which ends with an error has begun to write: the folder is
    locked for as long as it changes.
    """
    with context.watchdog.during("save"):
        try:
            checkpoints.finish()
        except CheckpointWriteError as error:  # must not hide the error that ends the run
            print_error(str(error))


@dataclass(frozen=True)
class Run:
    """The objects of a run on one rank that persist until its end, across rollbacks."""

    job: Job
    context: RankContext
    components: Components
    replica: Replica
    facts: RunFacts
    checkpoints: CheckpointFolder | NoCheckpoints  # used by rank 0 alone
    log: RunLog | SilentRunLog  # rank 0's; silent elsewhere

    def train(self, loader: Loader, progress: RunProgress, state: TrainState) -> None:
        """Train from `progress` to the end, with as many rollbacks as the job allows. Every rank
        calls this together.

        Args:
            loader: of the training set, with nothing enqueued; closed at the end.
            progress: where the run starts or resumes.
            state: results so far.
        """
        control, rolled_back, begun = self.context.control, False, progress
        while True:
            parts = self.build_loop(loader, progress, state)
            try:
                if rolled_back or (self.job.on_nonfinite.can_roll_back and progress.step == 0):
                    # A checkpoint to return to; after a rollback it also saves the lower lr
                    state.scheduled_step = progress.step
                    with self.context.watchdog.during("save"):
                        save(parts, state, progress, best=False, scheduled=True, wait=True)
                if not rolled_back:
                    self._call_hooks(parts, "on_start", state, begun)
                train(parts, state)
            except Stopped:
                self._call_hooks(parts, "on_end", state, begun, False)
                raise
            except RollBack as reason:
                loader.close()
                progress, state = self._roll_back(parts, state, reason)
                rolled_back = True
                components = self.components
                loader = build_loader(
                    self.job.data, components.form, components.training_set, self.job.seed
                )
            else:
                break
            finally:
                parts.loader.close()
        if self.context.objects:  # whose owner goes on with them
            self.replica.statistics.all_reduce(self.context.tensors.sum)
        memory = max(int(peak) for peak in control.allgather(b"%d" % self._peak_memory()))
        on_rank_0(control, lambda: self._finish(parts, state, memory))
        self._call_hooks(parts, "on_end", state, begun, True)

    def _call_hooks(
        self, parts: LoopComponents, event: str, state: TrainState, begun: RunProgress, *more: bool
    ) -> None:
        """Call the hooks at the start or the end of the run. Every rank calls this together."""
        job, control = self.job, self.context.control

        def view() -> RunView:
            return RunView(
                name=job.name,
                folder=job.run_folder,
                rank=control.rank,
                world_size=control.size,
                epochs=parts.plan.clock.epochs,
                training_samples=parts.plan.clock.dataset_size,
                step=begun.step,
                samples_seen=begun.samples_seen,
                results=MappingProxyType(dict(state.results)),
                model=self.replica.objective.model,
            )

        parts.hooks.call(event, lambda: [view(), *more])

    def build_loop(
        self, loader: Loader, progress: RunProgress, state: TrainState
    ) -> LoopComponents:
        """The objects that the loop works with."""
        job, context, components = self.job, self.context, self.components
        control, plan = context.control, components.plan
        saver = CheckpointSaver(
            control,
            context.tensors,
            self.replica,
            self.checkpoints if control.rank == 0 else NoCheckpoints(),
            plan.clock,
            job.checkpoint,
            rankings(job.checkpoint.best, components.metrics),
            self.facts,
            self.log.offsets,
            can_roll_back=job.on_nonfinite.can_roll_back,
        )

        def flags() -> dict[str, bool]:
            return {
                "stop": context.stop.requested(),
                "save": saver.wants_save(),
                "failed": saver.failed() or self.log.failed,
            }

        controller = Controller(plan, progress) if control.rank == 0 else None
        return LoopComponents(
            control=control,
            tensors=context.tensors,
            plan=plan,
            feed=build_feed(job.data, plan, control, controller, loader),
            loader=loader,
            transform=components.transforms.train,
            replica=self.replica,
            evaluation=build_evaluation(
                job.data,
                job.evaluate,
                components.metrics,
                components.form,
                components.test_set,
                control.rank,
                control.size,
                components.transforms,
            ),
            consistency=ConsistencyCheck(control, int(job.fingerprint()[:8], 16), flags),
            policy=build_policy(job.on_nonfinite, state, self.replica),
            saver=saver,
            stop=context.stop,
            watchdog=context.watchdog,
            cadence=Cadence(
                job.log.every_steps, job.evaluate.every_epochs, job.compare_every_steps
            ),
            log=self.log,
            rounds_differently=components.rehearsed.rounds_differently,
            hooks=Hooks(components.hooks, control, context.watchdog, self.replica.modules)
            if components.hooks
            else NoHooks(),
            measurements=self._measurements(state, begins=progress.step == 0),
        )

    def _measurements(self, state: TrainState, begins: bool) -> Measurements | NoMeasurements:
        """What is measured within the steps. Every rank calls this together."""
        log, control = self.job.log, self.context.control
        if not (log.layers_every_steps or log.noise_every_steps or log.distances):
            return NoMeasurements()
        distance = on_rank_0(control, lambda: self._distance(begins)) if log.distances else None
        return Measurements(
            self.replica, control, state, log.layers_every_steps, log.noise_every_steps, distance
        )

    def _distance(self, begins: bool) -> WeightDistance | None:
        """From the start of the run. Rank 0 alone.

        Raises:
            CheckpointWriteError: if the first weights cannot be written.
        """
        if isinstance(self.log, SilentRunLog):
            return None
        folder, names = self.log.folder, self.replica.names
        if not begins:
            distance = WeightDistance.resume(names, folder)
            if distance is None:
                self.log.note(
                    f"log.distances: {folder / FILE} is missing or holds other weights, so the "
                    "distance from the start is not known any more; it is not logged"
                )
            return distance
        try:
            return WeightDistance.begin(names, folder)
        except OSError as error:
            raise CheckpointWriteError.of(
                f"the first weights in {folder}", folder, error, "no step was taken"
            ) from None

    def _roll_back(
        self, parts: LoopComponents, state: TrainState, reason: RollBack
    ) -> tuple[RunProgress, TrainState]:
        """Return to the last scheduled checkpoint, with a lower learning rate. Every rank calls
        this together.
        """
        control, tensors, modules = parts.control, parts.tensors, self.replica.modules
        rolled_back, step = state.rolled_back + 1, state.scheduled_step
        micro_batch_settings = state.largest_micro_batch, state.workers
        with parts.watchdog.during("save"):
            on_rank_0(control, parts.saver.finish)
        with parts.watchdog.during("checkpoint"):
            point = on_rank_0(control, lambda: resume.roll_back(self._folder, modules, step))
        share_state(modules, control, tensors)
        progress, state = resume.share(point, self.replica, control, tensors)
        progress = replace(progress, lr_factor=progress.lr_factor * reason.lr_factor)
        state.rolled_back = rolled_back
        # Those of this start, not of the one that wrote the checkpoint
        state.largest_micro_batch, state.workers = micro_batch_settings
        offsets = {} if point is None else point.content.log_offsets
        on_rank_0(control, lambda: self.log.roll_back(offsets, progress))
        if control.rank == 0:
            for note in [] if point is None else point.notes:
                print_status(f"note     {note}")
            print_status(
                f"{reason}; back to step {progress.step}, the learning rate is multiplied by "
                f"{progress.lr_factor:g} from there"
            )
        return progress, state

    @property
    def _folder(self) -> CheckpointFolder:
        assert isinstance(self.checkpoints, CheckpointFolder)  # only such a run rolls back
        return self.checkpoints

    def open_log(
        self,
        start: resume.RunStart,
        job_file: Path,
        hosts: Sequence[Mapping[str, Any]],
        progress: RunProgress,
        state: TrainState,
    ) -> RunLog:
        """Write the documents of the run, print the startup summary, and open the logs. Rank 0
        alone.

        Raises:
            CheckpointWriteError: if something cannot be written.
        """
        job, components, folder = self.job, self.components, self.job.run_folder
        environment = self._environment(hosts)
        write_documents(folder, job_file, job.to_yaml(), environment, progress, start.notes)
        offsets = {} if start.resumed is None else start.resumed.content.log_offsets
        log = RunLog(folder, components.plan, offsets, progress, state, self._sinks(progress))
        lines = startup_summary(
            job,
            components.plan,
            components.objective.model,
            self.replica.update.optimizer,
            components.sizes,
            environment,
            components.notes,
        )
        print_status("\n".join(lines))
        return log

    def _sinks(self, progress: RunProgress) -> list[BackgroundSink]:
        """What receives the records beside the log files."""
        job, sizes = self.job, self.components.sizes
        run = SinkRun(
            job.name,
            job.run_folder,
            job.resolved(),
            self.context.control.size,
            self.components.plan.clock.dataset_size,
            sizes.get("test samples"),
            progress.step,
            progress.samples_seen,
        )
        return open_sinks(self.components.sinks, run, job.timeouts.step_seconds)

    def _environment(self, hosts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The content of environment.json."""
        launch = self.context.launch
        return {
            "command": [sys.executable, *sys.orig_argv[1:]],
            "launcher": None if launch is None else launch.launcher,
            "world_size": self.context.control.size,
            "versions": versions(),
            "device": str(self.components.objective.precision.device),
            "settings": dict(self.context.settings),
            "workers": list(hosts),
        }

    def report_finished(
        self, start: resume.RunStart, progress: RunProgress, state: TrainState
    ) -> None:
        """Report a run that has finished; write its summary if it was killed before it could.
        Rank 0 alone.
        """
        folder, written = self.job.run_folder, ""
        if not (folder / "summary.json").exists():
            assert start.resumed is not None  # what is finished was begun
            plan = replace(self.components.plan, world_size=start.resumed.content.facts.world_size)
            summary = summary_of(plan, state, progress, state.train_seconds, None, self._sums())
            write_summary(folder, summary)
            written = " (the missing summary.json was written)"
        print_status(
            f"already finished: {folder} holds the complete run{written}; --fresh moves it aside "
            "and starts over"
        )

    def _finish(self, parts: LoopComponents, state: TrainState, peak_memory: int) -> None:
        """Wait for the last checkpoint and write the summary. Rank 0 alone."""
        parts.saver.finish()
        progress = parts.feed.final_progress()
        self.log.finish(state, progress, peak_memory, self._sums())

    def _sums(self) -> Sums:
        """What a worker sends in each step."""
        half = self.job.gradients.compression == "fp16"
        weights = list(self.replica.names)
        return Sums(
            sum(weight.numel() * (2 if half else weight.element_size()) for weight in weights),
            len(weights),
        )

    def _peak_memory(self) -> int:
        """Peak memory of this rank, in bytes: torch's on its GPU, or the process's on a CPU."""
        device = self.components.objective.precision.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def _configure_torch(threads: int, deterministic: bool, tf32: bool) -> None:
    torch.set_num_threads(threads)  # one in exact mode: more would add up in another order
    # fp32 means 23 bits of mantissa: torch's default lets convolutions use TF32, with 10.
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if deterministic:
        # torch asks for it, before CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Also turned off, where this process has run another job before. Never called without need: it
    # imports torch's compiler, which takes more than a second on every worker.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
