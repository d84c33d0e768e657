"""Resumes an interrupted run: finds its newest checkpoint and restores it on every rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvdlarge.checkpoint.content import CheckpointContent, RunFacts
from hvdlarge.checkpoint.folder import CheckpointFolder
from hvdlarge.comm.interfaces import Collectives, ControlChannel
from hvdlarge.comm.rank_checks import on_rank_0
from hvdlarge.config.job import sha256_of
from hvdlarge.config.job_file import read_job
from hvdlarge.exits import CheckpointError, CheckpointWriteError, JobError
from hvdlarge.models.state import LOSS, MODEL, Modules, with_versions
from hvdlarge.replica.replica import Replica
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.telemetry.run_folder import FolderLock, holds_run, make_folder, set_aside

# The one key of `Job.resume_signature()` that may change between starts, under conditions
_LENGTH = "epochs"


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint from which a run continues. On rank 0."""

    path: Path
    content: CheckpointContent
    notes: list[str]  # for the user: checkpoints that were skipped, what has changed


@dataclass(frozen=True)
class RunStart:
    """How a run starts in its folder, as rank 0 decided; empty on the other ranks."""

    resumed: ResumePoint | None = None  # None: from the first step
    lock: FolderLock | None = None
    notes: Sequence[str] = ()

    def release(self) -> None:
        """Let other runs use the folder."""
        if self.lock is not None:
            self.lock.release()


def enter(
    folder: Path,
    fresh: bool,
    checkpoints: CheckpointFolder,
    facts: RunFacts,
    length_may_change: bool,
    modules: Modules,
) -> RunStart:
    """Lock a run folder and load its newest checkpoint, if there is one. Rank 0 only.

    Args:
        folder: of the run; created if missing.
        fresh: set an earlier run aside and start a new one.
        checkpoints: those in the folder.
        facts: see `find_resume_point`.
        length_may_change: see `find_resume_point`.
        modules: receive the state of the checkpoint.

    Raises:
        JobError: if the folder cannot be used, or another process is using it.
        CheckpointError: if it holds another job, or no checkpoint in it can be read.
    """
    notes = []
    if holds_run(folder) and fresh:
        notes.append(f"the earlier run was moved to {set_aside(folder)}")
    make_folder(folder)
    lock = FolderLock(folder)
    if not lock.acquired:
        notes.append(
            f"the file system of {folder} has no locks: do not start a second run in this folder"
        )
    if not holds_run(folder):
        return RunStart(None, lock, notes)
    try:
        resumed = find_resume_point(folder, checkpoints, facts, length_may_change)
        if resumed is None:
            notes.append("the earlier start left no checkpoint: starting from the first step")
            return RunStart(None, lock, notes)
        load_modules(modules, resumed.content, resumed.path)
    except CheckpointError:
        lock.release()
        raise
    return RunStart(resumed, lock, [*notes, *resumed.notes, f"resuming from {resumed.path}"])


def roll_back(checkpoints: CheckpointFolder, modules: Modules, step: int | None) -> ResumePoint:
    """Roll back: load an earlier checkpoint of this run and remove the later ones. Rank 0 only.

    Args:
        checkpoints: of the run.
        modules: receive its state.
        step: of the last scheduled checkpoint. Later ones, due to a stop or the clock, are ignored:
            an interruption must not decide how far a run rolls back. If None, or if no checkpoint
            up to this step can be read, the newest is used.

    Raises:
        CheckpointError: if no checkpoint can be read.
        CheckpointWriteError: if the later ones cannot be removed.
    """
    newest, problems_before = None, []
    if step is not None:
        try:
            newest = checkpoints.newest_good(step)
        except CheckpointError as error:  # a later one is better than none
            problems_before = [line.strip() for line in str(error).splitlines()[1:]]
    newest = newest or checkpoints.newest_good()
    if newest is None:
        raise CheckpointError(f"{checkpoints.folder} has no checkpoint to go back to")
    path, plain, problems = newest
    content = _content(path, plain)
    load_modules(modules, content, path)
    try:
        checkpoints.remove_above(content.progress.step)
    except OSError as error:
        intact = "the checkpoint to go back to is untouched"
        what = f"the list of checkpoints in {checkpoints.folder}"
        raise CheckpointWriteError.of(what, checkpoints.folder, error, intact) from None
    return ResumePoint(path, content, [*problems_before, *problems])


def find_resume_point(
    folder: Path, checkpoints: CheckpointFolder, facts: RunFacts, length_may_change: bool
) -> ResumePoint | None:
    """The newest checkpoint of the run in `folder`; None if it was killed before the first one.
    Rank 0 only.

    Args:
        folder: holds a run.
        checkpoints: of that run.
        facts: of the run being started, which must be the same run.
        length_may_change: whether the job's schedule is independent of its length, so that the
            number of epochs may change.

    Raises:
        CheckpointError: if the folder holds another job, or no checkpoint in it can be read.
    """
    newest = checkpoints.newest_good()
    if newest is None:
        nothing = "no checkpoint was written there, so nothing that was trained would be lost"
        _check_same_run(folder, {"job": _read_written_job(folder)}, {"job": facts.job}, nothing)
        return None
    path, plain, problems = newest
    content = _content(path, plain)
    saved = content.facts
    notes = [f"skipped {problem}" for problem in problems]
    saved_keys: dict[str, Any] = {"job": dict(saved.job), "data": saved.data}
    keys: dict[str, Any] = {"job": dict(facts.job), "data": facts.data}
    saved_epochs, epochs = saved_keys["job"].get(_LENGTH), keys["job"][_LENGTH]
    # `or 1` is for the type checker: every run has a training set
    epochs_done = content.progress.samples_seen / (saved.data["training samples"] or 1)
    may_change = length_may_change and not content.truncated and epochs > epochs_done
    if saved_epochs != epochs and may_change:
        saved_keys["job"].pop(_LENGTH), keys["job"].pop(_LENGTH)
        notes.append(f"epochs changes from {saved_epochs:g} to {epochs:g}")
    _check_same_run(folder, saved_keys, keys)
    if saved.world_size != facts.world_size:
        notes.append(f"the number of workers changes from {saved.world_size} to {facts.world_size}")
    for name, version in sorted(facts.versions.items()):
        if saved.versions.get(name) != version:
            notes.append(f"{name} changes from {saved.versions.get(name)} to {version}")
    return ResumePoint(path, content, notes)


def _content(path: Path, plain: Mapping[str, Any]) -> CheckpointContent:
    try:
        return CheckpointContent.from_plain(plain)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of this version ({type(error).__name__}: {error})"
        ) from None


def _read_written_job(folder: Path) -> dict[str, Any]:
    """The resume signature of the job that an earlier start wrote to the run folder."""
    try:
        return read_job(str(folder / "job.resolved.yaml")).resume_signature()
    except JobError as error:
        raise CheckpointError(
            f"{folder} holds a run whose job cannot be read; --fresh sets it aside and starts a "
            f"new run\n{error}"
        ) from None


def _check_same_run(
    folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any], remark: str = ""
) -> None:
    differences = _differences(saved, current, "")
    if differences:
        lines = [
            f"  {name} is {json.dumps(old)} in the folder, {json.dumps(new)} in this job"
            for name, old, new in differences
        ]
        raise CheckpointError(
            "\n".join(
                [
                    f"{folder} holds another job:",
                    *lines,
                    *([f"  {remark}"] if remark else []),
                    "  --fresh sets it aside and starts a new run; run_dir=… names another folder",
                ]
            )
        )


def _differences(saved: Any, current: Any, name: str) -> list[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(current, dict):
        return [
            difference
            for key in sorted(saved.keys() | current.keys())
            for difference in _differences(
                saved.get(key), current.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if _equal(saved, current) else [(name.removeprefix("job."), saved, current)]


def _equal(saved: Any, current: Any) -> bool:
    """Whether two values are equal; one that came from the environment is stored as its SHA-256."""
    return saved == current or any(
        isinstance(text, str) and sha256_of(text) == digest
        for text, digest in [(saved, current), (current, saved)]
    )


def load_modules(modules: Modules, content: CheckpointContent, path: Path) -> None:
    """Load a checkpoint's parameters, buffers and extra state into the model and the loss. Rank 0
    only.

    Raises:
        CheckpointError: if names, shapes or dtypes differ; the modules are unchanged then.
    """
    states = {MODEL: content.model, LOSS: content.loss}
    for prefix, module in modules.items():
        saved, current, what = states[prefix], module.state_dict(), "loss" if prefix else "model"
        for name in sorted(saved.keys() | current.keys()):
            saved_form, form = _describe_entry(saved, name), _describe_entry(current, name)
            if saved_form != form:
                raise CheckpointError(
                    f"{path}: {name!r} is {form} in the {what}, {saved_form} in the checkpoint"
                )
    for prefix, module in modules.items():
        try:
            module.load_state_dict(with_versions(states[prefix], module))
        except Exception as error:  # of a module that loads in a way of its own
            raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from None


def _describe_entry(state: Mapping[str, Any], name: str) -> str:
    if name not in state:
        return "missing"
    value = state[name]
    if not isinstance(value, torch.Tensor):
        return "extra state"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def share(
    resumed: ResumePoint | None, replica: Replica, control: ControlChannel, tensors: Collectives
) -> tuple[RunProgress, TrainState]:
    """Broadcast rank 0's checkpoint, except the weights, which are broadcast before. Every rank
    calls this together.

    Args:
        resumed: on rank 0 the checkpoint, or None for a new run; None elsewhere.
        replica: its optimizer state, averages, carried states and running statistics are set; the
            latter are partial afterwards.
        control: for everything but tensors.
        tensors: for tensors.

    Returns:
        The run's progress and state, the same on every rank.

    Raises:
        CheckpointError: on every rank, if the model carries states of another form.
    """
    content = None if resumed is None else resumed.content
    message = b"null" if content is None else json.dumps(_without_tensors(content)).encode()
    record = json.loads(control.allgather(message if control.rank == 0 else b"")[0])
    if record is None:
        replica.statistics.to_partial()
        return RunProgress(), TrainState()
    _share_optimizer(record["optimizer"], content, replica, tensors)
    if replica.ema is not None:
        if content is not None:
            of_loss = {f"{LOSS}{name}": value for name, value in content.ema_loss.items()}
            replica.ema.load({**content.ema, **of_loss})
        tensors.broadcast_(list(replica.ema.named_tensors().items()))
    if replica.carried.named_tensors():
        on_rank_0(control, lambda: _check_carried(resumed, replica))
        replica.carried.restore(None if content is None else content.carried)
        tensors.broadcast_(list(replica.carried.named_tensors().items()))
    replica.statistics.to_partial()
    if record["has_local_stats"] and record["world_size"] == control.size:
        _share_local_stats(content, replica, tensors, control)
    return RunProgress.from_plain(record["progress"]), TrainState(**record["state"])


def _check_carried(resumed: ResumePoint | None, replica: Replica) -> None:
    """Raise CheckpointError unless the states in a checkpoint are those that the model carries."""
    assert resumed is not None  # on rank 0 of a run that resumes
    saved, current = resumed.content.carried, replica.carried.named_tensors()
    for name in sorted(saved.keys() | current.keys()):
        saved_form, form = _describe_entry(saved, name), _describe_entry(current, name)
        if saved_form != form:
            raise CheckpointError(
                f"{resumed.path}: the state {name!r} is {form} in the model, {saved_form} in the "
                "checkpoint"
            )


def _without_tensors(content: CheckpointContent) -> dict[str, Any]:
    """A checkpoint's progress and state, and shape and dtype of each tensor of the optimizer."""
    entries: list[Sequence[Any]] = []
    for name, state in content.optimizer.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                entries.append(
                    (name, key, list(value.shape), str(value.dtype).removeprefix("torch."))
                )
            else:
                entries.append((name, key, value, None))
    return {
        "progress": content.progress.to_plain(),
        "state": vars(content.state),
        "world_size": content.facts.world_size,
        "has_local_stats": bool(content.local_stats),
        "optimizer": entries,
    }


def _share_optimizer(
    entries: Sequence[Sequence[Any]],
    content: CheckpointContent | None,
    replica: Replica,
    tensors: Collectives,
) -> None:
    # Not hvd.broadcast_optimizer_state: on empty state it takes a step, which updates the weights
    weights = {name: weight for weight, name in replica.names.items()}
    replica.update.optimizer.state.clear()
    counted_on_device = {
        weight
        for group in replica.update.optimizer.param_groups
        if group.get("capturable") or group.get("fused")
        for weight in group["params"]
    }
    named_tensors = []
    for name, key, value, dtype in entries:
        weight = weights[name]
        if dtype is None:
            replica.update.optimizer.state[weight][key] = value
            continue
        # As in `Optimizer.load_state_dict`, state lies on the weight's device, except "step"; that
        # of an own optimizer where its class was seen to keep it.
        on_cpu = getattr(replica.update.optimizer, "state_on_cpu", None)
        on_device = key != "step" or weight in counted_on_device
        on_device = on_device if on_cpu is None else key not in on_cpu
        tensor = torch.zeros(
            value, dtype=getattr(torch, dtype), device=weight.device if on_device else "cpu"
        )
        if content is not None:
            tensor.copy_(content.optimizer[name][key])
        replica.update.optimizer.state[weight][key] = tensor
        named_tensors.append((f"optimizer.{name}.{key}", tensor))
    tensors.broadcast_(named_tensors)


def _share_local_stats(
    content: CheckpointContent | None,
    replica: Replica,
    tensors: Collectives,
    control: ControlChannel,
) -> None:
    """Restore each rank's partial running statistics, bit for bit."""
    current = replica.statistics.local_stats()
    rows = torch.zeros(control.size, current.numel(), dtype=current.dtype)
    if content is not None:
        for rank, saved in enumerate(content.local_stats):
            rows[rank] = saved.view(current.dtype)
    if current.numel():
        tensors.broadcast_([("local_stats", rows)])
        replica.statistics.restore_local_stats(rows[control.rank].to(current.device))
