"""hvdlarge: synchronous large-batch training with PyTorch on Horovod and MPI."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# isort: off
if TYPE_CHECKING:  # the names below, for type checkers
    from hvdlarge.api import run_job as run_job
    from hvdlarge.data.in_memory import InMemory as InMemory
    from hvdlarge.data.order import permute as permute
    from hvdlarge.exits import JobError as JobError, RunExit as RunExit
    from hvdlarge.optim.lamb import LAMB as LAMB
    from hvdlarge.optim.lars import LARS as LARS
    from hvdlarge.optim.lr_scheduler import LRScheduler as LRScheduler
    from hvdlarge.optim.param_groups import parameter_groups as parameter_groups
    from hvdlarge.schedule.decay import (
        ConstantDecay as ConstantDecay,
        CosineDecay as CosineDecay,
        ExponentialDecay as ExponentialDecay,
        MultistepDecay as MultistepDecay,
        OneCycle as OneCycle,
        PolynomialDecay as PolynomialDecay,
    )
    from hvdlarge.schedule.growth import AdaBatchGrowth as AdaBatchGrowth
    from hvdlarge.schedule.lr import LRSchedule as LRSchedule
    from hvdlarge.schedule.warmup import LegwWarmup as LegwWarmup, LinearWarmup as LinearWarmup
# isort: on

__version__ = "0.1.0"

# What `from hvdlarge import …` gives, and where it lives. Nothing is imported before it is asked
# for: `hvdlarge.plan` and `hvdlarge.doctor` work without torch.
_PUBLIC = {
    "run_job": "hvdlarge.api",
    "JobError": "hvdlarge.exits",
    "RunExit": "hvdlarge.exits",
    "LARS": "hvdlarge.optim.lars",
    "LAMB": "hvdlarge.optim.lamb",
    "parameter_groups": "hvdlarge.optim.param_groups",
    "LRScheduler": "hvdlarge.optim.lr_scheduler",
    "LRSchedule": "hvdlarge.schedule.lr",
    "LegwWarmup": "hvdlarge.schedule.warmup",
    "LinearWarmup": "hvdlarge.schedule.warmup",
    "ConstantDecay": "hvdlarge.schedule.decay",
    "CosineDecay": "hvdlarge.schedule.decay",
    "ExponentialDecay": "hvdlarge.schedule.decay",
    "MultistepDecay": "hvdlarge.schedule.decay",
    "OneCycle": "hvdlarge.schedule.decay",
    "PolynomialDecay": "hvdlarge.schedule.decay",
    "AdaBatchGrowth": "hvdlarge.schedule.growth",
    "InMemory": "hvdlarge.data.in_memory",
    "permute": "hvdlarge.data.order",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
