"""Raises errors on all ranks together, and checks that ranks agree.

Every function here is collective: every rank calls it together. An error on one rank is sent to
all, so that all exit with the same message and code instead of waiting for the one that failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.exits import RanksDisagreeError, RunExit, run_exit

Result = TypeVar("Result")


def on_rank_0(control: ControlChannel, action: Callable[[], Result]) -> Result | None:
    """Run `action` on rank 0 only; returns its result there, None elsewhere. Every rank calls this
    together.

    Raises:
        RunExit: on every rank, if `action` raised one.
    """
    return raise_on_all_ranks(
        control, action if control.rank == 0 else lambda: None, name_ranks=False
    )


def raise_on_all_ranks(
    control: ControlChannel, action: Callable[[], Result], name_ranks: bool = True
) -> Result:
    """Run `action`; returns this rank's result if it succeeded on every rank. Every rank calls this
    together.

    Args:
        control: the channel between the ranks.
        action: may raise a `RunExit`.
        name_ranks: whether the message names the ranks that raised, unless all did.

    Raises:
        RunExit: on every rank, if `action` raised one on any: that of the lowest such rank.
    """
    problem, result = None, None
    try:
        result = action()
    except RunExit as error:
        problem = error
    local = "" if problem is None else f"{problem.code} {problem}"
    answers = [
        message.decode(errors="surrogateescape")  # names of files need not be UTF-8
        for message in control.allgather(local.encode(errors="surrogateescape"))
    ]
    for answer in filter(None, answers):
        ranks = [str(rank) for rank, other in enumerate(answers) if other == answer]
        code, _, message = answer.partition(" ")
        if name_ranks and len(ranks) < len(answers):
            message = f"on rank {', '.join(ranks)}: {message}"
        raise run_exit(int(code), message)
    return result  # type: ignore[return-value]


def check_equal_across_ranks(control: ControlChannel, facts: Mapping[str, Any], what: str) -> None:
    """Check that `facts` are the same on all ranks. Every rank calls this together.

    Args:
        control: the channel between the ranks.
        facts: JSON values by the names that the user knows; may be nested.
        what: describes them in the message.

    Raises:
        RanksDisagreeError: on every rank, naming the first difference and the values of two ranks.
    """
    messages = control.allgather(json.dumps(facts, sort_keys=True).encode())
    for rank, message in enumerate(messages):
        if message != messages[0]:
            name, first, other = _first_difference(json.loads(messages[0]), json.loads(message))
            raise RanksDisagreeError(
                f"the ranks do not have the same {what}: {name} is {json.dumps(first)} on rank 0 "
                f"and {json.dumps(other)} on rank {rank}"
            )


def disagreement(control: ControlChannel, name: str, value: str) -> RanksDisagreeError:
    """The error for ranks that differ in `name`, with every rank's value as a text. Every rank
    calls this together.
    """
    ranks_by_value: dict[str, list[int]] = {}
    for rank, message in enumerate(control.allgather(value.encode())):
        ranks_by_value.setdefault(message.decode(), []).append(rank)
    values = [
        f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in ranks_by_value.items()
    ]
    return RanksDisagreeError(f"the ranks disagree about the {name}: {' and '.join(values)}")


def missing_gradient(
    control: ControlChannel, with_gradient: Sequence[str] | None
) -> RanksDisagreeError:
    """The error for a parameter that has a gradient on some ranks only. Every rank calls this
    together.

    Args:
        control: the channel between the ranks.
        with_gradient: names of the parameters that got a gradient on this rank; None on an idle
            worker.
    """
    answers = [
        json.loads(message) for message in control.allgather(json.dumps(with_gradient).encode())
    ]
    names_of = {rank: set(names) for rank, names in enumerate(answers) if names is not None}
    differing = sorted(set.union(*names_of.values()) - set.intersection(*names_of.values()))
    present = [str(rank) for rank, names in names_of.items() if differing[0] in names]
    missing = [str(rank) for rank, names in names_of.items() if differing[0] not in names]
    others = [repr(name) for name in differing[1:4]] + ["…"] * (len(differing) > 4)
    more = f" (and {len(differing) - 1} more: {', '.join(others)})" if others else ""
    return RanksDisagreeError(
        f"the ranks disagree about the set of gradients: the parameter {differing[0]!r}{more} has "
        f"a gradient on rank {', '.join(present)} and none on rank {', '.join(missing)}; if the "
        "model skips layers on purpose, by chance or by its data, gradients.missing: zero counts "
        "a missing gradient as zero"
    )


def _first_difference(first: Any, other: Any, name: str = "") -> tuple[str, Any, Any]:
    if isinstance(first, dict) and isinstance(other, dict):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                return _first_difference(
                    first.get(key), other.get(key), f"{name}.{key}" if name else key
                )
    return name, first, other
