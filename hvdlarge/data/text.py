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


def words(line: str) -> list[str]:
    """The words of a line, which whitespace separates, and the end of the line as one more.

    >>> words("no it was n't")
    ['no', 'it', 'was', "n't", '<eos>']
    """
    return [*line.split(), END_OF_LINE]


def characters(line: str) -> list[str]:
    """The characters of a line, and the end of the line as one more."""
    return [*line, "\n"]


LEVELS: dict[str, Callable[[str], list[str]]] = {"words": words, "characters": characters}


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
            max_size: most tokens, all of these included: the rarest are left out, of equally rare
                ones the alphabetically last; the vocabulary then has `<unk>`. None: any number.
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


def count_tokens(text: Text, level: str) -> Counter[str]:
    """How often each token of a text occurs.

    Raises:
        ValueError: for an unknown level.
    """
    split, counts = splitter(level), Counter[str]()
    for line in text.lines:
        counts.update(split(line))
    return counts


def encode(text: Text, level: str, vocabulary: Vocabulary, origin: str) -> NDArray[np.int64]:
    """The ids of a text, one line after the other, shape (tokens,).

    Args:
        text: to be encoded.
        level: `words` or `characters`.
        vocabulary: of the training text.
        origin: name of the training text, for messages.

    Raises:
        ValueError: naming the text, line and token that the vocabulary does not have.
    """
    split, ids = splitter(level), array("q")
    for number, line in enumerate(text.lines, start=1):
        try:
            ids.extend(vocabulary.ids(split(line)))
        except KeyError as error:
            raise ValueError(
                f"{text.name}, line {number}: {error.args[0]!r} does not occur in {origin}, whose "
                f"vocabulary of {len(vocabulary)} has no {UNKNOWN}: set min_count: 2 or max_size, "
                f"so that rare and unknown ones are {UNKNOWN}"
            ) from None
    return np.array(ids, dtype=np.int64)


def splitter(level: str) -> Callable[[str], list[str]]:
    """What splits a line into tokens.

    Raises:
        ValueError: for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}: it is {' or '.join(LEVELS)}")
    return LEVELS[level]


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
