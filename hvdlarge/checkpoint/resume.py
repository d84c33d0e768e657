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


@dataclass
class ResumePoint:
    """A run that began earlier, as rank 0 found it."""

    path: Path | None  # the checkpoint; None where the run was killed before its first one
    content: dict[str, Any] | None
    notes: list[str]  # what the user should know: damaged checkpoints passed over, what has changed

    @property
    def position(self) -> RunProgress:
        """Where the run stands."""
        return (
            RunProgress()
            if self.content is None
            else RunProgress.from_plain(self.content["position"])
        )

    @property
    def world_size(self) -> int:
        """Workers of the part that wrote the checkpoint."""
        return 0 if self.content is None else self.content["world_size"]

    @property
    def log_offsets(self) -> dict[str, int]:
        """Where the logs ended at the checkpoint."""
        return {} if self.content is None else self.content["logs"]


@dataclass
class RunStart:
    """How a run begins in its folder, as rank 0 decided."""

    found: ResumePoint | None  # None for a new run
    lock: FolderLock
    notes: list[str]


def enter(
    folder: Path,
    fresh: bool,
    checkpoints: CheckpointFolder,
    facts: Mapping[str, Any],
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
        found = find(folder, checkpoints, facts, length_may_grow)
        if found.content is None or found.path is None:
            return RunStart(
                found, lock, [*notes, "the earlier start left no checkpoint: from the beginning"]
            )
        load_modules(modules, found.content, found.path)
    except CheckpointError:
        lock.release()
        raise
    return RunStart(found, lock, [*notes, *found.notes, f"goes on from {found.path}"])


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
    path, content, problems = good
    load_modules(modules, content, path)
    found = ResumePoint(path, content, [*damaged, *problems])
    try:
        checkpoints.remove_above(found.position.step)
    except OSError as error:
        left = "the checkpoint to go back to is untouched"
        what = f"the list of checkpoints in {checkpoints.folder}"
        raise CheckpointWriteError.of(what, checkpoints.folder, error, left) from None
    return found


def find(
    folder: Path, checkpoints: CheckpointFolder, facts: Mapping[str, Any], length_may_grow: bool
) -> ResumePoint:
    """The run in `folder`, if it is the one that `facts` describe. Rank 0 only.

    Args:
        folder: holds a run.
        checkpoints: those of the run.
        facts: of the run that is being started: `job` (what decides the weights), `data` (sizes),
            `versions`, `world_size`.
        length_may_grow: whether the schedule of the job does not depend on its length, so that more
            epochs may be added.

    Raises:
        CheckpointError: if the folder holds another job, or no checkpoint of it is whole.
    """
    good = checkpoints.newest_good()
    if good is None:
        _refuse_another(folder, {"job": _written_job(folder)}, {"job": facts["job"]})
        return ResumePoint(None, None, [])
    path, content, problems = good
    notes = [f"passed over: {problem}" for problem in problems]
    there, here = (
        {"job": dict(content["job"]), "data": content["data"]},
        {"job": dict(facts["job"]), "data": facts["data"]},
    )
    before, now = there["job"].get(_LENGTH), here["job"][_LENGTH]
    passed = content["position"]["samples_seen"] / content["data"]["training samples"]
    if before != now and length_may_grow and not content["truncated"] and now > passed:
        there["job"].pop(_LENGTH), here["job"].pop(_LENGTH)
        notes.append(f"epochs changes from {before:g} to {now:g}")
    _refuse_another(folder, there, here)
    if content["world_size"] != facts["world_size"]:
        notes.append(
            f"the number of workers changes from {content['world_size']} to {facts['world_size']}"
        )
    for name in sorted(facts["versions"]):
        if content["versions"].get(name) != facts["versions"][name]:
            notes.append(
                f"{name} changes from {content['versions'].get(name)} to {facts['versions'][name]}"
            )
    return ResumePoint(path, content, notes)


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


def load_modules(modules: Modules, content: Mapping[str, Any], path: Path) -> None:
    """Put a checkpoint's parameters, buffers and extra state into the model and the loss. Rank 0
    only.

    Raises:
        CheckpointError: if names, shapes or types are those of other modules; nothing has been
            changed then.
    """
    states = {"": content["model"], "loss.": content.get("loss", {})}
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
    found: ResumePoint | None, learner: Replica, control: ControlChannel, tensors: Collectives
) -> tuple[RunProgress, TrainState]:
    """Bring every rank to rank 0's checkpoint; the weights have been shared already. Every rank
    calls this together.

    Args:
        found: on rank 0; None elsewhere.
        learner: whose optimizer state and running statistics are set; these are scattered
            afterwards.
        control: for what is small.
        tensors: for what is large.
    """
    content = found.content if found is not None else None
    message = b"null" if content is None else json.dumps(_small(content)).encode()
    small = json.loads(control.allgather(message if control.rank == 0 else b"")[0])
    if small is None:
        learner.statistics.to_partial()
        return RunProgress(), TrainState()
    _share_optimizer(small["optimizer"], content, learner, tensors)
    learner.statistics.to_partial()
    if small["parts"] and small["world_size"] == control.size:
        _share_parts(content, learner, tensors, control)
    return RunProgress.from_plain(small["position"]), TrainState(**small["state"])


def _small(content: Mapping[str, Any]) -> dict[str, Any]:
    """All of a checkpoint but its tensors, and what the tensors of the optimizer are like."""
    entries: list[Sequence[Any]] = []
    for name, state in content["optimizer"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                entries.append(
                    (name, key, list(value.shape), str(value.dtype).removeprefix("torch."))
                )
            else:
                entries.append((name, key, value, None))
    return {
        "position": content["position"],
        "state": content["state"],
        "world_size": content["statistics"]["world_size"],
        "parts": bool(content["statistics"]["parts"]),
        "optimizer": entries,
    }


def _share_optimizer(
    entries: Sequence[Sequence[Any]],
    content: Mapping[str, Any] | None,
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
            tensor.copy_(content["optimizer"][name][key])
        learner.update.optimizer.state[weight][key] = tensor
        shared.append((f"optimizer.{name}.{key}", tensor))
    tensors.broadcast_(shared)


def _share_parts(
    content: Mapping[str, Any] | None,
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
        for rank, part in enumerate(content["statistics"]["parts"]):
            rows[rank] = part.view(own.dtype)
    if own.numel():
        tensors.broadcast_([("statistics_parts", rows)])
        learner.statistics.restore_local_stats(rows[control.rank].to(own.device))
