"""Loads the weights from which a new run starts, by the job's section `init_from`.

Contract: the file is read when a run begins, on rank 0 alone; the broadcast of the initial weights
          shares them. Names are compared with the model's state_dict: a tied tensor is there if one
          of its names is. A tensor takes the model's width: fp64 weights of a file are rounded in a
          model of fp32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hvdlarge.checkpoint.folder import file_sha256
from hvdlarge.checkpoint.weight_files import read_weights
from hvdlarge.config.job import InitFrom
from hvdlarge.exits import JobError
from hvdlarge.models.state import with_versions

_SHOWN = 20  # names in a message
_PATH_SHOWN = 60  # characters, so that the first line of a message stays below 200


def load_initial_weights(section: InitFrom, model: nn.Module) -> list[str]:
    """Load the file of a section into the model. Rank 0 only.

    Args:
        section: of the job.
        model: as it is trained; unchanged if the file does not fit.

    Returns:
        Notes for the user: where the weights are from and, with `strict: false`, what was left out.

    Raises:
        JobError: if the file cannot be read, a prefix or pattern fits no name in it, or its tensors
            do not fit the model.
    """
    path = Path(section.path)
    try:
        saved = read_weights(path)
        fit = compare(renamed(saved, section.prefix, section.map), model)
    except JobError as error:
        raise JobError(f"init_from: {_shown(path)}: {error}") from None
    if (problems := fit.lines()) and section.strict:
        raise JobError(
            "\n".join(
                [
                    f"init_from: {_shown(path)}: {fit.counts()}; strict: false starts without them",
                    *problems,
                    *_hint(fit),
                ]
            )
        )
    if not fit.loaded:
        raise JobError(
            "\n".join([f"init_from: {_shown(path)}: none of its tensors fits the model", *problems])
        )
    try:
        model.load_state_dict(with_versions(fit.loaded, model), strict=False)
    except Exception as error:  # of a module that loads in a way of its own
        raise JobError(f"init_from: {_shown(path)}: {type(error).__name__}: {error}") from None
    notes = [
        f"init_from: {len(fit.loaded):,} tensors are those of {path} (sha256:{file_sha256(path)})"
    ]
    if problems:
        left_out = "; ".join(line.strip() for line in problems)
        notes.append(f"init_from: tensors that do not fit are left out: {left_out}")
    return notes


def renamed(saved: Mapping[str, Any], prefix: str, patterns: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a file under the model's names.

    Args:
        saved: by their names in the file.
        prefix: removed from those that begin with it.
        patterns: the first that matches a name, without the prefix, gives its new one.

    Raises:
        JobError: for a prefix or pattern that no name has, or two entries with the same new name.

    >>> renamed({"module.stem.weight": 1, "module.body.0.bias": 2}, "module.",
    ...         {"body.*.bias": "blocks.*.shift"})
    {'stem.weight': 1, 'blocks.0.shift': 2}
    """
    names = {name: name.removeprefix(prefix) for name in saved}
    if prefix and all(old == new for old, new in names.items()):
        raise JobError(f"no name begins with the prefix {prefix!r}:\n  {_some(names)}")
    unused = dict.fromkeys(patterns)
    for old, name in names.items():
        for pattern, new in patterns.items():
            if (match := re.fullmatch(_expression(pattern), name, re.DOTALL)) is not None:
                unused.pop(pattern, None)
                names[old] = _filled(pattern, new, match.groups())
                break
    if unused:
        pattern = next(iter(unused))
        raise JobError(
            f"map: the pattern {pattern!r} matches no name, or none that an earlier one leaves:\n  "
            f"{_some([name.removeprefix(prefix) for name in saved])}"
        )
    result: dict[str, Any] = {}
    for old, name in names.items():
        if name in result:
            first = next(other for other in names if names[other] == name)
            raise JobError(
                f"two of its names are one in the model\n  {first!r} and {old!r} are both {name!r}"
            )
        result[name] = saved[old]
    return result


def _expression(pattern: str) -> str:
    wildcards = {"*": "(.*)", "?": "(.)"}
    return "".join(wildcards.get(letter) or re.escape(letter) for letter in pattern)


def _filled(pattern: str, new: str, matched: Sequence[str]) -> str:
    """The new name, with its wildcards replaced by what those of the pattern have matched."""
    kinds = [letter for letter in pattern if letter in "*?"]
    queues = {kind: [m for k, m in zip(kinds, matched, strict=True) if k == kind] for kind in "*?"}
    letters = []
    for letter in new:
        if letter in queues:
            if not queues[letter]:
                raise JobError(f"map: {new!r} has more wildcards than the pattern {pattern!r}")
            letters.append(queues[letter].pop(0))
        else:
            letters.append(letter)
    return "".join(letters)


class Fit(NamedTuple):
    """How the tensors of a file fit a model."""

    loaded: dict[str, Any]  # what fits, by the model's names
    missing: list[str]  # in the file
    unexpected: list[str]
    misshapen: list[str]  # with both shapes

    def counts(self) -> str:
        """The numbers of what does not fit."""
        parts = [
            (len(self.missing), "missing"),
            (len(self.unexpected), "unexpected"),
            (len(self.misshapen), "of another shape or type"),
        ]
        return "tensors do not fit: " + ", ".join(
            f"{count:,} {what}" for count, what in parts if count
        )

    def lines(self) -> list[str]:
        """What does not fit, by name; a line for each kind."""
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape or type": self.misshapen,
        }
        return [f"  {kind}: {_some(names, _SHOWN)}" for kind, names in kinds.items() if names]


def compare(named: Mapping[str, Any], model: nn.Module) -> Fit:
    """Compare the entries of a file, by the model's names, with the model's state_dict.

    Raises:
        JobError: for two names of one tied tensor with different values, or values that are not
            finite.
    """
    current = model.state_dict(keep_vars=True)
    loaded: dict[str, Any] = {}
    misshapen = []
    source: dict[int, str] = {}  # the name that gives a tensor its values
    for name, value in named.items():
        if name not in current:
            continue
        target = current[name]
        if _kind(value) != _kind(target):
            misshapen.append(f"{name} ({_form(value)} in the file, {_form(target)} in the model)")
            continue
        loaded[name] = value
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_floating_point() or value.is_complex():
            # A buffer may hold infinities on purpose, as the mask of an attention does
            is_trained = isinstance(target, nn.Parameter)
            wrong = ~torch.isfinite(value) if is_trained else torch.isnan(value)
            if wrong.any():
                raise JobError(f"its tensor {name!r} is not finite")
        first = source.setdefault(id(target), name)
        if not torch.equal(loaded[first].to(value.dtype), value):
            raise JobError(
                f"two of its tensors differ that are one in the model\n  {first!r} and {name!r}"
            )
    missing = [
        name for name, target in current.items() if name not in named and id(target) not in source
    ]
    return Fit(loaded, missing, [name for name in named if name not in current], misshapen)


def _kind(value: Any) -> Any:
    """What a value of the file and its place in the model must have in common."""
    if not isinstance(value, torch.Tensor):
        return "extra state"
    number = "float" if value.is_floating_point() else "complex" if value.is_complex() else None
    return tuple(value.shape), number or value.dtype


def _form(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return "extra state"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _hint(fit: Fit) -> list[str]:
    """A line with the prefix that names of the file have and the model's lack, if there is one."""
    for wanted in fit.missing:
        for found in fit.unexpected:
            if found.endswith(f".{wanted}"):
                return [f"  did you mean init_from.prefix: {found.removesuffix(wanted)} ?"]
    return []


def _some(names: Mapping[str, Any] | Sequence[str], count: int = 5) -> str:
    first = list(names)
    more = f" and {len(first) - count:,} more" if len(first) > count else ""
    return ", ".join(first[:count]) + more


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= _PATH_SHOWN else f"…{text[1 - _PATH_SHOWN :]}"
