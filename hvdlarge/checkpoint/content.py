"""What a checkpoint holds, described once: the saver fills it in, a resume reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from hvdlarge.schedule.plan import RunProgress
from hvdlarge.train_state import TrainState


@dataclass(frozen=True)
class RunFacts:
    """What a run must agree with to go on from a checkpoint, or what its user should know."""

    job: Mapping[str, Any]  # what decides the weights: `Job.resume_signature()`
    data: Mapping[str, int | None]  # sizes of the data sets, in samples
    versions: Mapping[str, str | None]
    world_size: int  # workers


@dataclass(frozen=True)
class CheckpointContent:
    """The state of a run between two steps."""

    facts: RunFacts
    model: Mapping[str, Any]  # its plain state_dict, on the CPU
    loss: Mapping[str, Any]  # likewise, of a loss that is a module; else empty
    optimizer: Mapping[str, Mapping[str, Any]]  # state by parameter name: tensors, numbers
    progress: RunProgress
    truncated: bool  # whether the last step was cut short by the end of the run
    state: TrainState
    # Each rank's own part of the running statistics, as bytes, where these are not the sum of all
    local_stats: tuple[torch.Tensor, ...]
    log_offsets: Mapping[str, int]  # where each log ends, in bytes

    def to_plain(self) -> dict[str, Any]:
        """As tensors and builtins, which `torch.load(weights_only=True)` accepts."""
        return {
            **{field.name: _plain(getattr(self.facts, field.name)) for field in fields(RunFacts)},
            "model": dict(self.model),
            "loss": dict(self.loss),
            "optimizer": dict(self.optimizer),
            "position": self.progress.to_plain(),
            "truncated": self.truncated,
            "state": {**vars(self.state), "results": dict(self.state.results)},
            "statistics": {"world_size": self.facts.world_size, "parts": list(self.local_stats)},
            "logs": dict(self.log_offsets),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> CheckpointContent:
        """The content that `to_plain` wrote down.

        Raises:
            KeyError, TypeError: for a part that is missing, or has another form.
        """
        return cls(
            facts=RunFacts(**{field.name: plain[field.name] for field in fields(RunFacts)}),
            model=plain["model"],
            loss=plain.get("loss", {}),
            optimizer=plain["optimizer"],
            progress=RunProgress.from_plain(plain["position"]),
            truncated=plain["truncated"],
            state=TrainState(**plain["state"]),
            local_stats=tuple(plain["statistics"]["parts"]),
            log_offsets=plain["logs"],
        )


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
