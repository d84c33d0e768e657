"""Suggests what a user meant by an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(
    word: str,
    known: Iterable[str],
    otherwise: str = "known:",
    likeness: float = 0.6,
    most: int | None = None,
) -> str:
    """The known name that is most like an unknown one, or all of them; empty if there are none.

    Args:
        word: what the user has written.
        known: names, in the order in which to list them.
        otherwise: introduces the list.
        likeness: how like a name must be, from 0 to 1.
        most: names to list; None: all.

    >>> nearest("convnt", ["mlp", "convnet"])
    "did you mean 'convnet'?"
    >>> nearest("zzz", ["mlp", "convnet"], "built in are")
    'built in are mlp, convnet'
    """
    known = list(known)
    if close := difflib.get_close_matches(word, known, n=1, cutoff=likeness):
        return f"did you mean {close[0]!r}?"
    return f"{otherwise} {', '.join(known[:most])}" if known else ""
