"""Text for language models: windows of tokens, and for each token the one that follows it.

Formula:  sample i of a text t: inputs t[i·L], …, t[i·L + L − 1], targets t[i·L + 1], …, t[i·L + L];
          L = length
Source:   Mikolov, Karafiát, Burget, Černocký, Khudanpur, "Recurrent Neural Network Based Language
          Model" (2010), for the files of the Penn Treebank: words in lines, `<unk>` for rare ones.
Contract: windows are independent samples, in the engine's order of samples, and a recurrent model
          starts each with a state of zeros. With `data.lanes` it continues the window before
          (lanes.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hvdlarge.data.in_memory import InMemory
from hvdlarge.data.pydoc_text import read_topics
from hvdlarge.data.text import (
    IGNORED,
    Split,
    Text,
    Vocabulary,
    count_tokens,
    encode,
    num_windows,
    read_lines,
    splitter,
)
from hvdlarge.data.text_sizes import TEST_FILE, TRAINING_FILE


class TextWindows(InMemory):
    """Windows of a text; inputs and targets are views of the same tokens.

    Args:
        tokens: of the text, shape (tokens,).
        length: L, tokens of a window.
        last: what becomes of the tokens after the last whole window: `drop`, or `pad`: one more
            window, whose inputs are filled up with token 0 and whose targets with −100.
        vocabulary: of the tokens.
        name: of the text, for messages.

    Raises:
        ValueError: if no window is left.
    """

    def __init__(
        self, tokens: NDArray[np.int64], length: int, last: str, vocabulary: Vocabulary, name: str
    ) -> None:
        number = num_windows(len(tokens), length, last, name)
        inputs, targets = torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])
        missing = number * length - len(targets)
        if missing > 0:
            inputs = torch.nn.functional.pad(inputs, (0, missing))
            targets = torch.nn.functional.pad(targets, (0, missing), value=IGNORED)
        shape = (number, length)
        super().__init__(
            inputs[: number * length].view(shape), targets[: number * length].view(shape)
        )
        self.vocabulary = vocabulary


def text_files(
    folder: str,
    train: str = TRAINING_FILE,
    test: str | None = TEST_FILE,
    level: str = "words",
    length: int = 35,
    min_count: int = 1,
    max_size: int | None = None,
    last: str = "drop",
) -> tuple[TextWindows, TextWindows | None]:
    """Text files in the form of the Penn Treebank's: UTF-8, plain or .gz, in the lines of which
    whitespace separates the words.

    Args:
        folder: of the files.
        train: name of the training text, from which the vocabulary is taken.
        test: name of the text that is evaluated (`ptb.test.txt` for the test set); None: none.
        level: `words`, where the end of each line is the word `<eos>`, or `characters`, where it is
            a line feed.
        length: tokens of a window.
        min_count: tokens that occur less often in the training text are `<unk>`.
        max_size: of the vocabulary: so many of the most frequent tokens; all others are `<unk>`.
        last: `drop` leaves out the tokens after the last whole window, `pad` makes one more window
            of them, whose missing targets are −100: `cross_entropy` then needs `ignore_index`.

    Returns:
        Training and test set; inputs and targets (n, length) int64.

    Raises:
        ValueError: naming the file, if it is missing, empty, not UTF-8 or too short, or has a token
            that the vocabulary lacks while it has no `<unk>`: it has one if the training text has,
            or if `min_count` is above 1 or `max_size` is set.
    """
    training_text = read_lines(Path(folder, train), "the training text")
    test_text = None if test is None else read_lines(Path(folder, test), "the test text")
    split = splitter(level, line_ends=True)
    vocabulary = Vocabulary.of(count_tokens(training_text, split), min_count, max_size)
    return _sets(training_text, test_text, split, length, last, vocabulary)


def pydoc_text(
    level: str = "words",
    length: int = 35,
    min_count: int = 1,
    max_size: int | None = None,
    last: str = "drop",
    sha256: str | None = None,
) -> tuple[TextWindows, TextWindows]:
    """The English documentation of Python's language reference that is shipped inside Python: some
    70,000 words without a download. The text depends on the Python version.

    Args:
        level: `words` (in lower case; punctuation marks are words) or `characters`.
        length: tokens of a window.
        min_count: tokens that occur less often in the training text are `<unk>`.
        max_size: of the vocabulary, which always has `<unk>`: with it, a model of one size fits any
            Python version.
        last: see `text_files`.
        sha256: digest of the topics that the job expects; None: of any Python version.

    Returns:
        Training and test set, split by topics; inputs and targets (n, length) int64.

    Raises:
        ValueError: for topics of another digest, naming it.
    """
    training_text, test_text = read_topics(level, sha256)
    split = splitter(level, line_ends=True)
    counts = count_tokens(training_text, split)
    vocabulary = Vocabulary.of(counts, min_count, max_size, with_unknown=True)
    training_set, test_set = _sets(training_text, test_text, split, length, last, vocabulary)
    assert test_set is not None
    return training_set, test_set


def _sets(
    training_text: Text, test_text: Text | None, split: Split, length: int, last: str,
    vocabulary: Vocabulary,
) -> tuple[TextWindows, TextWindows | None]:  # fmt: skip
    def windows(text: Text) -> TextWindows:
        tokens, _ = encode(text, split, vocabulary, training_text.name)
        return TextWindows(tokens, length, last, vocabulary, text.name)

    return windows(training_text), None if test_text is None else windows(test_text)
