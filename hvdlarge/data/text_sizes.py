"""How many training samples the built-in text sets have, for a plan: without torch, and for the
Penn Treebank without its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdlarge.data.pydoc_text import read_phrases, read_topics
from hvdlarge.data.text import (
    count_tokens,
    not_longer,
    num_windows,
    read_aligned,
    read_lines,
    splitter,
)

TRAINING_FILE, TEST_FILE = "ptb.train.txt", "ptb.valid.txt"  # of Mikolov et al. (2010)
_PTB_TRAINING_WORDS = 929_589  # with one <eos> for each of the 42,068 lines


def text_file_windows(
    folder: str,
    train: str = TRAINING_FILE,
    level: str = "words",
    length: int = 35,
    last: str = "drop",
    **others: Any,
) -> int | None:
    """Samples of `text_files`, with its arguments: counted if the file exists; else that of the
    Penn Treebank, if the file has its name and is read as words; else None.
    """
    path = Path(folder, train)
    if path.exists():
        text = read_lines(path, "the training text")
        tokens = count_tokens(text, splitter(level, line_ends=True)).total()
    elif (train, level) == (TRAINING_FILE, "words"):
        tokens = _PTB_TRAINING_WORDS
    else:
        return None
    return num_windows(tokens, length, last, str(path))


def pydoc_windows(
    level: str = "words",
    length: int = 35,
    last: str = "drop",
    sha256: str | None = None,
    **others: Any,
) -> int:
    """Samples of `pydoc_text`, with its arguments, in this version of Python."""
    text, _ = read_topics(level, sha256)
    tokens = count_tokens(text, splitter(level, line_ends=True)).total()
    return num_windows(tokens, length, last, text.name)


def parallel_text_pairs(
    folder: str,
    train: Sequence[str],
    level: str = "words",
    max_length: int | None = None,
    **others: Any,
) -> int:
    """Samples of `parallel_text`, with its arguments, where the files are at hand."""
    pair = read_aligned(folder, train, "training")
    return len(not_longer(pair, splitter(level, line_ends=False), max_length)[0].lines)


def pydoc_phrase_pairs(words: int = 3, sha256: str | None = None, **others: Any) -> int:
    """Samples of `pydoc_phrases`, with its arguments, in this version of Python."""
    return len(read_phrases(words, sha256)[0][0].lines)
