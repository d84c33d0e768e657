"""hvdlarge: synchronous large-batch training with PyTorch on Horovod and MPI."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# What `from hvdlarge import …` gives, and where it lives. Nothing is imported before it is asked
# for: `hvdlarge.plan` and `hvdlarge.doctor` work without torch.
_PUBLIC = {
    "run_job": "hvdlarge.api",
    "LARS": "hvdlarge.optim.lars",
    "LAMB": "hvdlarge.optim.lamb",
    "parameter_groups": "hvdlarge.optim.param_groups",
    "LRSchedule": "hvdlarge.schedule.lr",
    "AdaBatchGrowth": "hvdlarge.schedule.growth",
    "LegwWarmup": "hvdlarge.schedule.warmup",
    "permute": "hvdlarge.data.order",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
