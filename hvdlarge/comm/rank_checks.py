"""How the ranks come to one mind before training: one verdict, one job, one set of versions.

Every function here is collective over the control channel: every rank calls it together. What fails
on one rank is told to all, so that all leave with one message and one exit code instead of one
leaving and the others waiting for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hvdlarge.comm.interfaces import ControlChannel
from hvdlarge.exits import RanksDisagreeError, RunExit, run_exit

Result = TypeVar("Result")


def on_rank_0(control: ControlChannel, action: Callable[[], Result]) -> Result | None:
    """What `action` returns on rank 0, which alone runs it; None elsewhere. Every rank calls this
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
    """What `action` returns on this rank, if it worked on every rank. Every rank calls this
    together.

    Raises:
        RunExit: on every rank, if `action` raised one on any: with the lowest such rank's
            code, the message naming the ranks unless it was all of them.
    """
    problem, result = None, None
    try:
        result = action()
    except RunExit as error:
        problem = error
    mine = "" if problem is None else f"{problem.code} {problem}"
    heard = [message.decode() for message in control.allgather(mine.encode())]
    for text in heard:
        if text:
            ranks = [str(rank) for rank, other in enumerate(heard) if other == text]
            code, _, message = text.partition(" ")
            everywhere = len(ranks) == len(heard) or not name_ranks
            raise run_exit(
                int(code), message if everywhere else f"on rank {', '.join(ranks)}: {message}"
            )
    return result  # type: ignore[return-value]


def check_equal_across_ranks(control: ControlChannel, facts: Mapping[str, Any], what: str) -> None:
    """Hold the same facts against each other on all ranks. Every rank calls this together.

    Args:
        control: the channel between the ranks.
        facts: JSON values under the names that the user knows, nested as deep as they come.
        what: what they are about, for the message.

    Raises:
        RanksDisagreeError: on every rank, naming the first differing fact, two ranks and both
            values.
    """
    mine = json.dumps(facts, sort_keys=True).encode()
    heard = control.allgather(mine)
    for rank, message in enumerate(heard):
        if message != heard[0]:
            name, ours, theirs = _first_difference(json.loads(heard[0]), json.loads(message))
            raise RanksDisagreeError(
                f"the ranks do not have the same {what}: {name} is {json.dumps(ours)} on rank 0 "
                f"and {json.dumps(theirs)} on rank {rank}"
            )


def disagreement(control: ControlChannel, name: str, value: float) -> RanksDisagreeError:
    """The error to raise when the ranks differ in `name`, with every rank's value. Every rank calls
    this together.
    """
    by_value: dict[float, list[int]] = {}
    for rank, message in enumerate(control.allgather(json.dumps(value).encode())):
        by_value.setdefault(json.loads(message), []).append(rank)
    parts = [
        f"{'nothing' if value == float('-inf') else f'{value:.17g}'} on rank "
        f"{', '.join(map(str, ranks))}"
        for value, ranks in by_value.items()
    ]
    return RanksDisagreeError(f"the ranks disagree about the {name}: {' and '.join(parts)}")


def missing_gradient(
    control: ControlChannel, with_gradient: Sequence[str] | None
) -> RanksDisagreeError:
    """The error to raise when a parameter has a gradient on some ranks only, by its name. Every
    rank calls this together.

    Args:
        control: the channel between the ranks.
        with_gradient: the parameters that got a gradient on this rank; None where the rank has no
            view.
    """
    heard = [
        json.loads(message) for message in control.allgather(json.dumps(with_gradient).encode())
    ]
    views = {rank: set(names) for rank, names in enumerate(heard) if names is not None}
    partly = sorted(set.union(*views.values()) - set.intersection(*views.values()))
    with_it = [str(rank) for rank, names in views.items() if partly[0] in names]
    without = [str(rank) for rank, names in views.items() if partly[0] not in names]
    more = f" (and {len(partly) - 1} more)" if len(partly) > 1 else ""
    return RanksDisagreeError(
        f"the ranks disagree about the set of gradients: the parameter {partly[0]!r}{more} has a "
        f"gradient on rank {', '.join(with_it)} and none on rank {', '.join(without)}; if the "
        "model skips layers on purpose, by chance or by its data, gradients.missing: zero counts "
        "a missing gradient as zero"
    )


def _first_difference(ours: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                return _first_difference(
                    ours.get(key), theirs.get(key), f"{name}.{key}" if name else key
                )
    return name, ours, theirs
