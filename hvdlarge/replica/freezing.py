"""Freezes parameters by patterns of their names, before anything is derived from what is trained.

Contract: a frozen parameter gets no gradient, no update and no weight decay. Modules keep their
          modes: a frozen batch normalisation normalises by its micro-batch and its running
          statistics follow, unless the model's own `train` keeps it in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from hvdlarge.config.nearest import nearest
from hvdlarge.exits import JobError
from hvdlarge.models.state import Modules

_SHOWN = 8


def freeze(modules: Modules, patterns: Sequence[str]) -> None:
    """Let parameters require no gradient.

    Args:
        modules: the model, and the loss if it is a module.
        patterns: with `*` and `?`, for full names; a tied parameter is found by any of its names.

    Raises:
        JobError: for a pattern that matches nothing, naming the nearest parameters, or if nothing
            is left to train.
    """
    named = [
        (prefix + name, parameter)
        for prefix, root in modules.items()
        for name, parameter in root.named_parameters(remove_duplicate=False)
    ]
    for pattern in patterns:
        matching = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
        if not matching:
            # A pattern is shorter than the names that it is meant for
            word, names = pattern.replace("*", "").replace("?", ""), [name for name, _ in named]
            like = nearest(word, names, "the first names are", likeness=0.4, most=_SHOWN)
            raise JobError(f"model.freeze: the pattern {pattern!r} matches no parameter; {like}")
        for parameter in matching:
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for _, parameter in named):
        raise JobError("model.freeze: every parameter is frozen: nothing is left to train")
