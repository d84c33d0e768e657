"""Suggests what a user meant by an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], otherwise: str = "known:") -> str:
    """The known name that is most like an unknown one, or all of them; empty if there are none.

    Args:
        word: what the user has written.
        known: names, in the order in which to list them.
        otherwise: introduces the list.

    >>> nearest("convnt", ["mlp", "convnet"])
    "did you mean 'convnet'?"
    >>> nearest("zzz", ["mlp", "convnet"], "built in are")
    'built in are mlp, convnet'
    """
    known = list(known)
    if close := difflib.get_close_matches(word, known, n=1):
        return f"did you mean {close[0]!r}?"
    return f"{otherwise} {', '.join(known)}" if known else ""
