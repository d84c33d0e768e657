"""Text as numbers: files of lines, the tokens of a line, and the vocabulary of a training text.

Contract: pure but for reading files, and without torch, so that a plan can count the windows of a
          text. Ids depend on the training text and the arguments only: tokens are numbered by
          their count, the most frequent first, and those of one count alphabetically.
"""

from __future__ import annotations

import gzip
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

END_OF_LINE, UNKNOWN = "<eos>", "<unk>"  # as in the Penn Treebank of Mikolov et al. (2010)
IGNORED = -100  # a target that does not count; what torch's cross entropy ignores by default


Split = Callable[[str], list[str]]
LEVELS: dict[str, tuple[Split, str]] = {  # what splits a line, and the token of its end
    "words": (str.split, END_OF_LINE),
    "characters": (list, "\n"),
}


def splitter(level: str, line_ends: bool) -> Split:
    """What splits a line into tokens.

    Args:
        level: `words`, which whitespace separates, or `characters`.
        line_ends: whether the end of a line is a token too, `<eos>` or a line feed.

    Raises:
        ValueError: for another level.

    >>> splitter("words", line_ends=True)("no it was n't")
    ['no', 'it', 'was', "n't", '<eos>']
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}: it is {' or '.join(LEVELS)}")
    split, end = LEVELS[level]
    return (lambda line: [*split(line), end]) if line_ends else split


class Text(NamedTuple):
    """Lines, and where they come from."""

    name: str  # for messages
    lines: Sequence[str]


def read_lines(path: str | Path, what: str) -> Text:
    """The lines of a UTF-8 text file, plain or .gz, without their ends.

    Args:
        path: of the file; decompressed if its name ends in `.gz`.
        what: the file's purpose, for messages.

    Raises:
        ValueError: naming the file, if it is missing, empty, damaged, or not UTF-8, then with the
            byte (of the decompressed text) and the line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; expected {what} there") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); expected {what}") from None
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{path}: cannot be read ({reason}); expected {what}") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: byte {error.start} (0x{content[error.start]:02x}, in line {line}) is not "
            f"UTF-8 ({error.reason}); expected {what}, a UTF-8 text"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")  # of editors on Windows
    if not text.strip():
        raise ValueError(f"{path}: holds no text ({len(content)} bytes); expected {what}")
    lines = text.split("\n")
    return Text(str(path), lines[:-1] if lines[-1] == "" else lines)


class Vocabulary:
    """Tokens by number.

    Args:
        tokens: distinct; their ids are 0, 1, …
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self._ids = {token: number for number, token in enumerate(self.tokens)}
        self._unknown = self._ids.get(UNKNOWN)

    @classmethod
    def of(
        cls,
        counts: Mapping[str, int],
        min_count: int = 1,
        max_size: int | None = None,
        reserved: Sequence[str] = (),
        with_unknown: bool = False,
    ) -> Vocabulary:
        """The vocabulary of counted tokens.

        Args:
            counts: of each token of the training text.
            min_count: rarer tokens are left out; above 1, the vocabulary has `<unk>`.
            max_size: maximum number of tokens, reserved ones and `<unk>` included: the rarest are
                left out, of equally rare ones the alphabetically last. None: no maximum.
            reserved: tokens that get the first ids, whether they occur or not.
            with_unknown: whether it has `<unk>` in any case; otherwise where the text has it too.

        Raises:
            ValueError: for a min_count below 1, or a max_size without room for a token.

        >>> Vocabulary.of(Counter("abracadabra"), min_count=2).tokens
        ['a', '<unk>', 'b', 'r']
        """
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        with_unknown = with_unknown or min_count > 1 or max_size is not None or UNKNOWN in counts
        always = {*reserved, *([UNKNOWN] if with_unknown else [])}
        if max_size is not None and max_size <= len(always):
            raise ValueError(f"max_size must be at least {len(always) + 1}, got {max_size}")
        candidates = [token for token in counts if token not in always]
        kept = [token for token in candidates if counts[token] >= min_count]
        kept.sort(key=lambda token: (-counts[token], token))
        if max_size is not None:
            del kept[max_size - len(always) :]
        total = {token: counts[token] for token in kept}
        if with_unknown and UNKNOWN not in reserved:  # stands for all that are left out
            left_out = sum(counts[token] for token in candidates) - sum(total.values())
            total[UNKNOWN] = counts.get(UNKNOWN, 0) + left_out
        by_count = sorted(total, key=lambda token: (-total[token], token))
        return cls([*reserved, *by_count])

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, tokens: Iterable[str]) -> list[int]:
        """The tokens' ids, that of `<unk>` for unknown ones.

        Raises:
            KeyError: with the first unknown token, where the vocabulary has no `<unk>`.
        """
        if self._unknown is None:
            return [self._ids[token] for token in tokens]
        return [self._ids.get(token, self._unknown) for token in tokens]


def count_tokens(text: Text, split: Split) -> Counter[str]:
    """How often each token of a text occurs."""
    counts = Counter[str]()
    for line in text.lines:
        counts.update(split(line))
    return counts


def encode(
    text: Text, split: Split, vocabulary: Vocabulary, origin: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids of a text, one line after the other, shape (tokens,), and where each line ends in
    them, shape (lines,).

    Args:
        text: to be encoded.
        split: splits a line into tokens.
        vocabulary: of the training text.
        origin: name of the training text, for messages.

    Raises:
        ValueError: naming the text, line and token that the vocabulary does not have.
    """
    ids, ends = array("q"), array("q")
    for number, line in enumerate(text.lines, start=1):
        try:
            ids.extend(vocabulary.ids(split(line)))
        except KeyError as error:
            raise ValueError(
                f"{text.name}, line {number}: {error.args[0]!r} does not occur in {origin}, whose "
                f"vocabulary of {len(vocabulary)} has no {UNKNOWN}: set min_count: 2 or max_size, "
                f"so that rare and unknown ones are {UNKNOWN}"
            ) from None
        ends.append(len(ids))
    return np.array(ids, dtype=np.int64), np.array(ends, dtype=np.int64)


def read_aligned(folder: str, files: Sequence[str], what: str) -> tuple[Text, Text]:
    """Two files of the same number of lines, of which line i of the second translates line i of the
    first.

    Args:
        folder: of the files.
        files: the names of both.
        what: `training` or `test`.

    Raises:
        ValueError: naming the files, if they differ in their lines; and as `read_lines`.
    """
    if isinstance(files, str) or len(files) != 2:
        raise ValueError(f"{what} files are a list of two names, source and target, not {files!r}")
    source, target = (
        read_lines(Path(folder, file), f"the {side} of the {what} pairs")
        for file, side in zip(files, ("source", "target"), strict=True)
    )
    if len(source.lines) != len(target.lines):
        raise ValueError(
            f"{source.name} has {len(source.lines):,} lines and {target.name} "
            f"{len(target.lines):,}: each line of one must translate that of the other"
        )
    return source, target


def not_longer(pair: tuple[Text, Text], split: Split, max_length: int | None) -> tuple[Text, Text]:
    """The pairs of lines of which neither has more than `max_length` tokens; all for None.

    Raises:
        ValueError: if none is left.
    """
    source, target = pair
    if max_length is None:
        return pair
    kept = [
        lines
        for lines in zip(source.lines, target.lines, strict=True)
        if max(len(split(line)) for line in lines) <= max_length
    ]
    if not kept:
        raise ValueError(
            f"max_length is {max_length}, and every pair of {source.name} and {target.name} has "
            "more tokens"
        )
    sources, targets = zip(*kept, strict=True)
    return Text(source.name, sources), Text(target.name, targets)


def num_windows(tokens: int, length: int, last: str, name: str) -> int:
    """Windows of a text: ⌊(tokens − 1) / length⌋, and with `last: pad` the rest as one more.

    Args:
        tokens: of the text; each but the first is a target once.
        length: inputs, and targets, of a window.
        last: `drop` leaves a short last window out, `pad` fills it up.
        name: of the text, for messages.

    Raises:
        ValueError: for other values, or a text of which no window is left.

    >>> num_windows(929_589, 35, "drop", "the Penn Treebank"), num_windows(8, 3, "pad", "seven")
    (26559, 3)
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if last not in ("drop", "pad"):
        raise ValueError(f"last is {last!r}: it is drop or pad")
    whole, rest = divmod(tokens - 1, length)
    number = whole + (last == "pad" and rest > 0)
    if tokens < 2 or not number:
        raise ValueError(
            f"{name}: {tokens} tokens are too few for a window of {length} and the token after it"
        )
    return number
