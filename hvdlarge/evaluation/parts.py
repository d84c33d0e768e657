"""Parts of outputs and targets, of which a metric may get one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlarge.exits import PartError


class MetricError(PartError):
    """A metric returned totals of a wrong type or shape, or gets a part that is not there. Not a
    RunExit, as a single rank may raise it.
    """


def part(value: Any, name: str | int | None) -> Any:
    """A part of outputs or targets: an item of a dict or tuple, or an attribute.

    Raises:
        MetricError: if there is none of that name.
    """
    if name is None:
        return value
    if isinstance(name, str) and not isinstance(value, Mapping) and hasattr(value, name):
        return getattr(value, name)
    try:
        return value[name]
    except (KeyError, IndexError, TypeError):
        keys = f" with {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
        raise MetricError(
            f"evaluate.metrics: there is no {name!r} in a {type(value).__name__}{keys}"
        ) from None
