"""Hooks: code of the user's own that is called between the steps of a run, on every rank together.

Contract: a hook reads and reports; it changes nothing that a run computes. What it may do and may
          not do is in docs/hooks.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.comm.rank_checks import raise_on_all_ranks
from hvdlarge.config.nearest import nearest
from hvdlarge.config.part_errors import describe
from hvdlarge.exits import JobError
from hvdlarge.models.state import Modules, named_buffers, named_modules, named_parameters
from hvdlarge.resilience.out_of_memory import is_out_of_memory
from hvdlarge.resilience.watchdog import Watchdog


@dataclass(frozen=True)
class RunView:
    """A run, at its start or its end."""

    name: str
    folder: Path  # of the run; rank 0 writes to it
    rank: int
    world_size: int  # workers
    epochs: float  # length of the run, in epochs
    training_samples: int
    step: int  # steps taken before this start; above 0 in a resumed run
    samples_seen: int  # likewise, in samples
    results: Mapping[str, float]  # last logged loss and last evaluation, by name; read-only
    model: torch.nn.Module


@dataclass(frozen=True)
class StepView:
    """A step that was taken, or skipped by the policy for gradients that are not finite."""

    step: int  # its number, from 0
    epoch: float  # after it, in epochs
    samples_seen: int  # after it, in samples
    global_batch: int  # samples
    lr: float
    # Mean over its global batch; None in the steps that are not logged (log.every_steps)
    loss: float | None
    results: Mapping[str, float]  # last logged loss and last evaluation, by name; read-only
    model: torch.nn.Module
    rank: int
    world_size: int  # workers


class Hook:
    """The calls that a hook may receive; each does nothing here. Deriving from this is optional.

    Each is called on every rank together, without gradients being recorded.
    """

    def on_start(self, run: RunView) -> None:
        """Before the first step of each start of the run."""

    def after_step(self, step: StepView) -> None:
        """After each step."""

    def after_evaluation(self, step: StepView) -> None:
        """After an evaluation, which follows `step`; `step.results` holds its results."""

    def after_checkpoint(self, step: StepView) -> None:
        """After the state that follows `step` was handed over to be written. The file may still be
        on its way; it is complete when `on_end` is called.
        """

    def on_end(self, run: RunView, finished: bool) -> None:
        """After the summary is written, or, if not `finished`, after the checkpoint of an orderly
        stop. Not called when an error ends the run.
        """


EVENTS = ("on_start", "after_step", "after_evaluation", "after_checkpoint", "on_end")


def check_hook(name: str, hook: Any) -> None:
    """Check that an object is a hook.

    Args:
        name: as the job has it.
        hook: the object.

    Raises:
        JobError: if it has none of the calls, one that cannot be called with its arguments, or one
            that is not known.
    """
    for event in filter(lambda each: each.startswith(("on_", "after_", "before_")), dir(hook)):
        if event not in EVENTS and callable(getattr(hook, event)):
            raise JobError(
                f"hooks: {name} has {event}, which is never called; {nearest(event, EVENTS)}"
            )
    calls = [event for event in EVENTS if _method(hook, event) is not None]
    if not calls:
        raise JobError(f"hooks: {name} has none of {', '.join(EVENTS)}")
    for event in calls:
        given = list(inspect.signature(getattr(Hook, event)).parameters)[1:]
        method = _method(hook, event)
        try:
            inspect.signature(method).bind(*given)  # type: ignore[arg-type]
        except TypeError as error:
            raise JobError(
                f"hooks: {name}: {event} is called with ({', '.join(given)}): {error}"
            ) from None


def _method(hook: Any, event: str) -> Callable[..., None] | None:
    """What a hook has to do at an event; None for nothing."""
    method = getattr(hook, event, None)
    is_empty = getattr(type(hook), event, None) is getattr(Hook, event)
    return None if is_empty or not callable(method) else method


class NoHooks:
    """A job without hooks."""

    def call(self, event: str, arguments: Callable[[], Sequence[Any]]) -> None:
        """Do nothing."""


class Hooks:
    """The hooks of a run, on one rank.

    Args:
        hooks: objects with the calls of `Hook`, each with the name that the job has for it.
        control: the channel between the ranks.
        watchdog: of this rank; names the hook that is running.
        modules: the model, and the loss if it is a module; a hook must leave them as they are.
    """

    def __init__(
        self,
        hooks: Sequence[tuple[str, Any]],
        control: ControlChannel,
        watchdog: Watchdog,
        modules: Modules,
    ) -> None:
        self._control, self._watchdog, self._modules = control, watchdog, modules
        self._calls = {
            event: [
                (name, method)
                for name, hook in hooks
                if (method := _method(hook, event)) is not None
            ]
            for event in EVENTS
        }

    def call(self, event: str, arguments: Callable[[], Sequence[Any]]) -> None:
        """Call every hook that has something to do at an event. Every rank calls this together.

        Args:
            event: one of EVENTS.
            arguments: gives those of the call; not asked if no hook wants it.

        Raises:
            JobError: on every rank, if a hook raised on any, or changed the modes of the model, or
                a tensor of it in place; a change through `.data` is not seen.
        """
        if not self._calls[event]:
            return
        values = arguments()

        def call_each() -> None:
            for name, method in self._calls[event]:
                with self._watchdog.during(f"hook {name}"):
                    self._run(name, event, method, values)

        # The phase of a rank that waits for another one's hooks to return
        names = ", ".join(name for name, _ in self._calls[event])
        with self._watchdog.during(f"waiting for hook {names}"):
            raise_on_all_ranks(self._control, call_each)

    def _run(
        self, name: str, event: str, method: Callable[..., None], values: Sequence[Any]
    ) -> None:
        tensors = [
            (what, tensor)
            for what, tensor in (*named_parameters(self._modules), *named_buffers(self._modules))
            if not tensor.is_inference()  # read-only here, and without a version
        ]
        versions = [tensor._version for _, tensor in tensors]
        modes = [(part, module, module.training) for part, module in named_modules(self._modules)]
        try:
            with torch.no_grad():
                method(*values)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise JobError(f"hooks: {name}: {event} raises {describe(error)}") from None
        for (what, tensor), version in zip(tensors, versions, strict=True):
            if tensor._version != version:
                raise JobError(
                    f"hooks: {name}: {event} changes {what!r}; a hook must leave weights and "
                    "buffers as they are"
                )
        for part, module, training in modes:
            if module.training != training:
                raise JobError(
                    f"hooks: {name}: {event} leaves {part or 'the model'!r} in "
                    f"{'evaluation' if training else 'training'} mode; put it back"
                )
