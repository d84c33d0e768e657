"""Parts of outputs, targets and batches: items of a dict or tuple, or attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class NoSuchPartError(Exception):
    """There is no part of that name."""


def part_of(value: Any, name: str | int) -> Any:
    """A part of a value: an item of a dict, tuple or list, or an attribute of anything else.

    Raises:
        NoSuchPartError: if there is none, naming the keys that are there.

    >>> part_of({"logits": 1, "loss": 2}, "logits"), part_of((3, 4), -1), part_of(5j, "imag")
    (1, 4, 5.0)
    >>> part_of({"logits": 1, "loss": 2}, "logit")
    Traceback (most recent call last):
    ...
    hvdlarge.models.parts.NoSuchPartError: there is no 'logit' in a dict with logits, loss
    """
    if isinstance(name, str) and not isinstance(value, Mapping) and hasattr(value, name):
        return getattr(value, name)
    has_items = isinstance(value, (Mapping, tuple, list))  # a tensor's would be samples
    try:
        if not has_items:
            raise TypeError
        return value[name]
    except (KeyError, IndexError, TypeError):
        keys = f" with {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
        raise NoSuchPartError(f"there is no {name!r} in a {type(value).__name__}{keys}") from None
