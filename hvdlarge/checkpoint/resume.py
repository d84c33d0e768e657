"""Finds where a run left off and brings every rank there: the same command goes on with a run that
was stopped or killed.
"""

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
from hvdlarge.config.job import sha256_of
from hvdlarge.config.job_file import read_job
from hvdlarge.exits import CheckpointError, CheckpointWriteError, JobError
from hvdlarge.models.state import Modules
from hvdlarge.replica import Replica
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.telemetry.run_folder import FolderLock, holds_run, make_folder, set_aside
from hvdlarge.train_state import TrainState

# What a run may change on its way and still be the same run, beside what is not mathematics at all.
_LENGTH = "epochs"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run that began earlier goes on, as rank 0 found it."""

    path: Path  # the checkpoint
    content: CheckpointContent
    notes: list[str]  # what the user should know: damaged checkpoints passed over, what has changed


@dataclass(frozen=True)
class RunStart:
    """How a run begins in its folder, as rank 0 decided; on the other ranks everything is None."""

    resumed: ResumePoint | None = None  # None for a run that begins with its first step
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
    length_may_grow: bool,
    modules: Modules,
) -> RunStart:
    """Take possession of a run folder and find out where the run in it stands. Rank 0 only.

    Args:
        folder: of the run; made where it is not there.
        fresh: set an earlier run aside and begin anew.
        checkpoints: those in the folder.
        facts: see `find`.
        length_may_grow: see `find`.
        modules: get the state of the checkpoint.

    Raises:
        JobError: if the folder cannot be used, or a run is going on in it.
        CheckpointError: if it holds another job, or no checkpoint of it is whole.
    """
    notes = []
    if holds_run(folder) and fresh:
        notes.append(f"the earlier run is now in {set_aside(folder)}")
    make_folder(folder)
    lock = FolderLock(folder)
    if not lock.held:
        notes.append(
            f"the file system of {folder} has no locks: nothing keeps a second run out of this "
            "folder"
        )
    if not holds_run(folder):
        return RunStart(None, lock, notes)
    try:
        resumed = find(folder, checkpoints, facts, length_may_grow)
        if resumed is None:
            notes.append("the earlier start left no checkpoint: from the beginning")
            return RunStart(None, lock, notes)
        load_modules(modules, resumed.content, resumed.path)
    except CheckpointError:
        lock.release()
        raise
    return RunStart(resumed, lock, [*notes, *resumed.notes, f"goes on from {resumed.path}"])


def go_back(checkpoints: CheckpointFolder, modules: Modules, step: int | None) -> ResumePoint:
    """Load a checkpoint of the run that is going on, and remove those above it. Rank 0 only.

    Args:
        checkpoints: of the run.
        modules: get its state.
        step: after which the job's cadence asked for the last one. Those that a stop or a clock
            asked for are passed over: an interruption must not decide where a run goes back to.
            None, or none there: the newest.

    Raises:
        CheckpointError: if none is whole.
        CheckpointWriteError: if those above cannot be removed.
    """
    good, damaged = None, []
    if step is not None:
        try:
            good = checkpoints.newest_good(step)
        except CheckpointError as error:  # then from a newer one, rather than not at all
            damaged = str(error).splitlines()
    good = good or checkpoints.newest_good()
    if good is None:
        raise CheckpointError(f"{checkpoints.folder} has no checkpoint to go back to")
    path, plain, problems = good
    content = _content(path, plain)
    load_modules(modules, content, path)
    try:
        checkpoints.remove_above(content.progress.step)
    except OSError as error:
        left = "the checkpoint to go back to is untouched"
        what = f"the list of checkpoints in {checkpoints.folder}"
        raise CheckpointWriteError.of(what, checkpoints.folder, error, left) from None
    return ResumePoint(path, content, [*damaged, *problems])


def find(
    folder: Path, checkpoints: CheckpointFolder, facts: RunFacts, length_may_grow: bool
) -> ResumePoint | None:
    """Where the run in `folder` goes on, if it is the one that `facts` describe; None where it was
    killed before its first checkpoint. Rank 0 only.

    Args:
        folder: holds a run.
        checkpoints: those of the run.
        facts: of the run that is being started.
        length_may_grow: whether the schedule of the job does not depend on its length, so that more
            epochs may be added.

    Raises:
        CheckpointError: if the folder holds another job, or no checkpoint of it is whole.
    """
    good = checkpoints.newest_good()
    if good is None:
        _refuse_another(folder, {"job": _written_job(folder)}, {"job": facts.job})
        return None
    path, plain, problems = good
    content = _content(path, plain)
    before = content.facts
    notes = [f"passed over: {problem}" for problem in problems]
    there: dict[str, Any] = {"job": dict(before.job), "data": before.data}
    here: dict[str, Any] = {"job": dict(facts.job), "data": facts.data}
    length_there, length_here = there["job"].get(_LENGTH), here["job"][_LENGTH]
    # Every job has had a training set
    passed = content.progress.samples_seen / (before.data["training samples"] or 1)
    may_change = length_may_grow and not content.truncated and length_here > passed
    if length_there != length_here and may_change:
        there["job"].pop(_LENGTH), here["job"].pop(_LENGTH)
        notes.append(f"epochs changes from {length_there:g} to {length_here:g}")
    _refuse_another(folder, there, here)
    if before.world_size != facts.world_size:
        notes.append(
            f"the number of workers changes from {before.world_size} to {facts.world_size}"
        )
    for name, version in sorted(facts.versions.items()):
        if before.versions.get(name) != version:
            notes.append(f"{name} changes from {before.versions.get(name)} to {version}")
    return ResumePoint(path, content, notes)


def _content(path: Path, plain: Mapping[str, Any]) -> CheckpointContent:
    try:
        return CheckpointContent.from_plain(plain)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of this version ({type(error).__name__}: {error})"
        ) from None


def _written_job(folder: Path) -> dict[str, Any]:
    """What decides the weights, of the job that an earlier start has written down as one to run."""
    try:
        return read_job(str(folder / "job.resolved.yaml")).resume_signature()
    except JobError as error:
        raise CheckpointError(
            f"{folder} holds a run whose job cannot be read; --fresh sets it aside and begins "
            f"anew\n{error}"
        ) from None


def _refuse_another(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differing = list(_differences(there, here, ""))
    if differing:
        lines = [
            f"  {name} is {json.dumps(theirs)} there and {json.dumps(ours)} here"
            for name, theirs, ours in differing
        ]
        raise CheckpointError(
            "\n".join(
                [
                    f"{folder} holds another job:",
                    *lines,
                    "  --fresh sets it aside and begins anew; run_dir=… names another folder",
                ]
            )
        )


def _differences(there: Any, here: Any, name: str) -> list[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            found
            for key in sorted(there.keys() | here.keys())
            for found in _differences(
                there.get(key), here.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if _alike(there, here) else [(name.removeprefix("job."), there, here)]


def _alike(there: Any, here: Any) -> bool:
    """Whether two values are the same, where one of them may be kept as its SHA-256: it came from
    the environment.
    """
    return there == here or any(
        isinstance(one, str) and sha256_of(one) == other
        for one, other in [(there, here), (here, there)]
    )


def load_modules(modules: Modules, content: CheckpointContent, path: Path) -> None:
    """Put a checkpoint's parameters, buffers and extra state into the model and the loss. Rank 0
    only.

    Raises:
        CheckpointError: if names, shapes or types are those of other modules; nothing has been
            changed then.
    """
    states = {"": content.model, "loss.": content.loss}
    for prefix, module in modules.items():
        there, here, what = states[prefix], module.state_dict(), "loss" if prefix else "model"
        for name in sorted(there.keys() | here.keys()):
            ours, theirs = (_shape(state, name) for state in (here, there))
            if ours != theirs:
                raise CheckpointError(
                    f"{path}: the {what} has {name!r} as {ours}, the checkpoint as {theirs}"
                )
    for prefix, module in modules.items():
        module.load_state_dict(states[prefix])


def _shape(state: Mapping[str, Any], name: str) -> str:
    if name not in state:
        return "nothing"
    value = state[name]
    if not isinstance(value, torch.Tensor):
        return "extra state"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def share(
    resumed: ResumePoint | None, learner: Replica, control: ControlChannel, tensors: Collectives
) -> tuple[RunProgress, TrainState]:
    """Bring every rank to rank 0's checkpoint; the weights have been shared already. Every rank
    calls this together.

    Args:
        resumed: on rank 0, None for a new run; None elsewhere.
        learner: whose optimizer state and running statistics are set; these are scattered
            afterwards.
        control: for what is small.
        tensors: for what is large.
    """
    content = None if resumed is None else resumed.content
    message = b"null" if content is None else json.dumps(_small(content)).encode()
    small = json.loads(control.allgather(message if control.rank == 0 else b"")[0])
    if small is None:
        learner.statistics.to_partial()
        return RunProgress(), TrainState()
    _share_optimizer(small["optimizer"], content, learner, tensors)
    learner.statistics.to_partial()
    if small["has_parts"] and small["world_size"] == control.size:
        _share_parts(content, learner, tensors, control)
    return RunProgress.from_plain(small["progress"]), TrainState(**small["state"])


def _small(content: CheckpointContent) -> dict[str, Any]:
    """All of a checkpoint but its tensors, and what the tensors of the optimizer are like."""
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
        "has_parts": bool(content.local_stats),
        "optimizer": entries,
    }


def _share_optimizer(
    entries: Sequence[Sequence[Any]],
    content: CheckpointContent | None,
    learner: Replica,
    tensors: Collectives,
) -> None:
    # hvd.broadcast_optimizer_state would take a real step on empty state and move the weights;
    # these are plain tensors.
    weights = {name: weight for weight, name in learner.names.items()}
    learner.update.optimizer.state.clear()
    shared = []
    for name, key, value, dtype in entries:
        weight = weights[name]
        if dtype is None:
            learner.update.optimizer.state[weight][key] = value
            continue
        # A tensor with the shape of its weight lies beside it, also where neither has a dimension;
        # torch keeps counts on the CPU.
        beside = key != "step" and value == list(weight.shape)
        tensor = torch.zeros(
            value, dtype=getattr(torch, dtype), device=weight.device if beside else "cpu"
        )
        if content is not None:
            tensor.copy_(content.optimizer[name][key])
        learner.update.optimizer.state[weight][key] = tensor
        shared.append((f"optimizer.{name}.{key}", tensor))
    tensors.broadcast_(shared)


def _share_parts(
    content: CheckpointContent | None,
    learner: Replica,
    tensors: Collectives,
    control: ControlChannel,
) -> None:
    """Give each rank its own part of the running statistics back, so that not even their last bits
    change.
    """
    own = learner.statistics.local_stats()
    rows = torch.zeros(control.size, own.numel(), dtype=own.dtype)
    if content is not None:
        for rank, part in enumerate(content.local_stats):
            rows[rank] = part.view(own.dtype)
    if own.numel():
        tensors.broadcast_([("statistics_parts", rows)])
        learner.statistics.restore_local_stats(rows[control.rank].to(own.device))
