"""Parallel text for translation: pairs of lines, a vocabulary for each side, and their padding.

Contract: pairs stay in the engine's order of samples. They are not sorted or bucketed by length,
          which would change which samples a step sees; a micro-batch is as long as its longest
          sentence, and `max_length` leaves longer pairs out of the training set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from hvdlarge.data.pydoc_text import read_phrases
from hvdlarge.data.text import (
    IGNORED,
    UNKNOWN,
    Split,
    Text,
    Vocabulary,
    count_tokens,
    encode,
    not_longer,
    read_aligned,
    splitter,
)

PADDING, START, END = 0, 2, 3  # ids; 1 is <unk>
RESERVED = ("<pad>", UNKNOWN, "<s>", "</s>")

Pair = tuple[torch.Tensor, torch.Tensor]  # ids of source and target, shape (tokens,) each


class Sentences:
    """The ids of many sentences, one after the other.

    Args:
        text: a sentence in each line.
        split: splits it into tokens.
        vocabulary: of the tokens, which has `<unk>`.
    """

    def __init__(self, text: Text, split: Split, vocabulary: Vocabulary) -> None:
        ids, ends = encode(text, split, vocabulary, text.name)
        self._ids, self._ends = torch.from_numpy(ids).int(), torch.from_numpy(ends)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = int(self._ends[index - 1]) if index else 0
        return self._ids[begin : int(self._ends[index])].long()


class ParallelText(Dataset):
    """Pairs of sentences, as ids without the tokens that begin and end a sentence; `pad` makes a
    batch of them.

    Args:
        pair: source and target, of the same number of lines.
        split: splits a line into tokens.
        vocabularies: of source and target.
    """

    def __init__(
        self, pair: tuple[Text, Text], split: Split, vocabularies: tuple[Vocabulary, Vocabulary]
    ) -> None:
        self.vocabularies = vocabularies
        self._source, self._target = (
            Sentences(text, split, vocabulary)
            for text, vocabulary in zip(pair, vocabularies, strict=True)
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._source[index], self._target[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Pair]:
        return [self[index] for index in indices]


def pad(samples: Sequence[Pair]) -> tuple[Pair, torch.Tensor]:
    """A batch of pairs: what a model is called with, as `model(source, target_in)`, and targets.

    Args:
        samples: ids of source and target, shape (tokens,) each.

    Returns:
        ((source, target_in), targets): the source and `</s>`; `<s>` and the target; the target and
        `</s>`. Source and target_in are filled up with 0, targets with −100, so that the loss
        `{name: cross_entropy, args: {ignore_index: -100}}` averages over the tokens of the step.
    """
    start, end = torch.tensor([START]), torch.tensor([END])

    def padded(sentences: Sequence[torch.Tensor], filling: int) -> torch.Tensor:
        return pad_sequence(list(sentences), batch_first=True, padding_value=filling)

    source = padded([torch.cat([source, end]) for source, _ in samples], PADDING)
    target_in = padded([torch.cat([start, target]) for _, target in samples], PADDING)
    targets = padded([torch.cat([target, end]) for _, target in samples], IGNORED)
    return (source, target_in), targets


def parallel_text(
    folder: str,
    train: Sequence[str],
    test: Sequence[str] | None = None,
    level: str = "words",
    min_count: int = 1,
    max_size: int | None = None,
    max_length: int | None = None,
) -> tuple[ParallelText, ParallelText | None]:
    """Two files of lines, UTF-8, plain or .gz, of which line i of the second translates line i of
    the first. The job needs `data: {collate: "hvdlarge.data.translation:pad"}`.

    Args:
        folder: of the files.
        train: names of the training files, source and target.
        test: likewise for testing; None: no test set.
        level: `words`, which whitespace separates, as for text that a tokeniser has split into
            words or subwords, or `characters`.
        min_count: tokens that occur less often in the training pairs are `<unk>`.
        max_size: of each vocabulary, `<pad>`, `<unk>`, `<s>` and `</s>` included.
        max_length: training pairs with more tokens on a side are left out; test pairs never are.

    Returns:
        Training and test set of pairs of ids.

    Raises:
        ValueError: naming the file, if it is missing, empty, not UTF-8, or of another number of
            lines than the other.
    """
    split = splitter(level, line_ends=False)
    training = not_longer(read_aligned(folder, train, "training"), split, max_length)
    testing = None if test is None else read_aligned(folder, test, "test")
    return _sets(training, testing, split, min_count, max_size)


def pydoc_phrases(
    level: str = "characters",
    words: int = 3,
    min_count: int = 1,
    max_size: int | None = None,
    sha256: str | None = None,
) -> tuple[ParallelText, ParallelText]:
    """Phrases of the documentation inside Python, to learn a translation without a download: the
    target is the source's words in the reverse order, with each letter rotated by 13 places. The
    phrases depend on the Python version. The job needs a `data.collate`, as for `parallel_text`.

    Args:
        level: `characters`: 27 tokens on each side, beside the reserved ones; or `words`.
        words: of a phrase.
        min_count: see `parallel_text`.
        max_size: see `parallel_text`.
        sha256: digest of the topics that the job expects; None: of any Python version.

    Returns:
        Training and test set of pairs of ids, split by topics; no phrase occurs twice.

    Raises:
        ValueError: for topics of another digest, naming it.
    """
    split = splitter(level, line_ends=False)
    training, testing = read_phrases(words, sha256)
    training_set, test_set = _sets(training, testing, split, min_count, max_size)
    assert test_set is not None
    return training_set, test_set


def _sets(
    training: tuple[Text, Text], testing: tuple[Text, Text] | None, split: Split, min_count: int,
    max_size: int | None,
) -> tuple[ParallelText, ParallelText | None]:  # fmt: skip
    source, target = (
        Vocabulary.of(count_tokens(text, split), min_count, max_size, RESERVED) for text in training
    )
    vocabularies = source, target
    return (
        ParallelText(training, split, vocabularies),
        None if testing is None else ParallelText(testing, split, vocabularies),
    )
