"""Parts of outputs and targets, of which a metric may get one."""

from __future__ import annotations

from typing import Any

from hvdlarge.exits import PartError
from hvdlarge.models.parts import NoSuchPartError, part_of


class MetricError(PartError):
    """A metric returned totals of a wrong type or shape, or gets a part that is not there. Not a
    RunExit, as a single rank may raise it.
    """


def part(value: Any, name: str | int | None) -> Any:
    """A part of outputs or targets; the whole for None.

    Raises:
        MetricError: if there is none of that name.
    """
    try:
        return value if name is None else part_of(value, name)
    except NoSuchPartError as error:
        raise MetricError(f"evaluate.metrics: {error}") from None
