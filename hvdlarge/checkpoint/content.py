"""The content of a checkpoint, defined once for the saver and for a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.plan import RunProgress


@dataclass(frozen=True)
class RunFacts:
    """What identifies a run: on resume `job` and `data` must match, other changes are reported."""

    job: Mapping[str, Any]  # the keys that decide the weights: `Job.resume_signature()`
    data: Mapping[str, int | None]  # sizes of the data sets, in samples
    versions: Mapping[str, str | None]
    world_size: int  # workers


@dataclass(frozen=True)
class CheckpointContent:
    """The state of a run between two steps."""

    facts: RunFacts
    model: Mapping[str, Any]  # its plain state_dict, on the CPU
    loss: Mapping[str, Any]  # the state_dict of a loss that is a module, else empty
    optimizer: Mapping[str, Mapping[str, Any]]  # state by parameter name: tensors and numbers
    progress: RunProgress
    truncated: bool  # whether the last step was cut short by the end of the run
    state: TrainState
    # Each rank's partial running statistics, as bytes; empty in a scheduled checkpoint
    local_stats: tuple[torch.Tensor, ...]
    log_offsets: Mapping[str, int]  # the length of each log, in bytes
    # The state_dicts of model and loss with the averaged weights; empty without `ema` in the job
    ema: Mapping[str, Any] = field(default_factory=dict)
    ema_loss: Mapping[str, Any] = field(default_factory=dict)
    # The states that the model carries along the lanes of a text; empty without `data.lanes`
    carried: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """The content as tensors and builtins, which `torch.load(weights_only=True)` accepts."""
        averaged = {"ema": dict(self.ema), "ema_loss": dict(self.ema_loss)} if self.ema else {}
        return {
            **{fact.name: _plain(getattr(self.facts, fact.name)) for fact in fields(RunFacts)},
            "model": dict(self.model),
            "loss": dict(self.loss),
            "optimizer": dict(self.optimizer),
            "progress": self.progress.to_plain(),
            "truncated": self.truncated,
            "state": {**vars(self.state), "results": dict(self.state.results)},
            "statistics": {"world_size": self.facts.world_size, "parts": list(self.local_stats)},
            "logs": dict(self.log_offsets),
            **averaged,
            **({"carried": dict(self.carried)} if self.carried else {}),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> CheckpointContent:
        """The inverse of `to_plain`.

        Raises:
            KeyError, TypeError: if an entry is missing or malformed.
        """
        return cls(
            facts=RunFacts(**{fact.name: plain[fact.name] for fact in fields(RunFacts)}),
            model=plain["model"],
            loss=plain["loss"],
            optimizer=plain["optimizer"],
            progress=RunProgress.from_plain(plain["progress"]),
            truncated=plain["truncated"],
            state=TrainState(**plain["state"]),
            local_stats=tuple(plain["statistics"]["parts"]),
            log_offsets=plain["logs"],
            ema=plain.get("ema", {}),
            ema_loss=plain.get("ema_loss", {}),
            carried=plain.get("carried", {}),
        )


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
