"""The English documentation inside Python (`pydoc_data.topics`), split into a training and a test
text.

Contract: pure for one Python version, and without torch. The topics depend on the version: their
          SHA-256 identifies the text, and a job may demand it. Topics are assigned by the hash of
          their names, so that most stay on their side in other versions. Topics repeat paragraphs
          of others (`compound` contains `for`): every paragraph is used once, and one of a test
          topic never for training.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping

from hvdlarge.data.text import LEVELS, Text

_TEST_SHARE = 0.1  # of the characters, before repeated paragraphs are left out


def read_topics(level: str, sha256: str | None = None) -> tuple[Text, Text]:
    """The training text and the test text, a paragraph in each line.

    Args:
        level: `words` separates them and punctuation marks by spaces, in lower case; `characters`
            leaves paragraphs as they are, but for their line breaks and indentations.
        sha256: digest of the topics that is expected; None: any.

    Raises:
        ValueError: for another level, or topics of another digest.
        ModuleNotFoundError: if this Python comes without its documentation.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}: it is {' or '.join(LEVELS)}")
    topics = _topics()
    digest = digest_of(topics)
    name = f"the documentation in Python {platform.python_version()}"
    if sha256 is not None and sha256 != digest:
        raise ValueError(f"{name} has the SHA-256 {digest}, and the job expects {sha256}")
    test_names = _test_topics(topics)
    seen: set[str] = set()
    test = list(_new_paragraphs((topics[topic] for topic in test_names), seen))
    rest = sorted(topics.keys() - set(test_names))
    training = list(_new_paragraphs((topics[topic] for topic in rest), seen))
    if level == "words":
        training, test = ([spaced_words(line) for line in lines] for lines in (training, test))
    return Text(f"{name}, training topics", training), Text(f"{name}, test topics", test)


def read_phrases(words: int, sha256: str | None = None) -> list[tuple[Text, Text]]:
    """Pairs made from the documentation, to learn a translation without a download: the source is
    a phrase, the target its words in the reverse order, with each letter rotated by 13 places.

    Args:
        words: per phrase, made of the letters a to z; a paragraph gives as many whole phrases
            as it has.
        sha256: see `read_topics`.

    Returns:
        Source and target, for training and for testing; no phrase occurs twice.

    Raises:
        ValueError: for words below 1, and as `read_topics`.
    """
    if words < 1:
        raise ValueError(f"words must be at least 1, got {words}")
    seen: set[str] = set()
    pairs = []
    for text in reversed(read_topics("characters", sha256)):  # phrases of the test text first
        phrases = list(_new_phrases(text.lines, words, seen))
        translated = [" ".join(reversed(rotated(phrase).split())) for phrase in phrases]
        pairs.append((Text(text.name, phrases), Text(f"{text.name}, translated", translated)))
    return pairs[::-1]


def rotated(text: str) -> str:
    """The text with the letters a to z rotated by 13 places.

    >>> rotated("a name")
    'n anzr'
    """
    return codecs.encode(text, "rot13")


def digest_of(topics: Mapping[str, str]) -> str:
    """The SHA-256 of topics and their names, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(topics.items())).encode()).hexdigest()


def spaced_words(paragraph: str) -> str:
    """Words and punctuation marks in lower case, separated by spaces.

    >>> spaced_words("In f(x), x is bound.")
    'in f ( x ) , x is bound .'
    """
    return " ".join(re.findall(r"\w+|[^\w\s]", paragraph.lower()))


def _topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "this Python comes without its documentation, the module pydoc_data, which the "
            "distribution may have in a package of its own"
        ) from None
    return topics


def _test_topics(topics: Mapping[str, str]) -> list[str]:
    """Topics in the order of the hashes of their names, until they hold the share for testing."""
    by_hash = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    wanted = _TEST_SHARE * sum(map(len, topics.values()))
    chosen: list[str] = []
    while sum(len(topics[name]) for name in chosen) < wanted:
        chosen.append(by_hash[len(chosen)])
    return sorted(chosen)


def _new_paragraphs(texts: Iterable[str], seen: set[str]) -> Iterable[str]:
    """Paragraphs, on one line each, that are not in `seen`, which is extended."""
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            if line and line not in seen:
                seen.add(line)
                yield line


def _new_phrases(lines: Iterable[str], words: int, seen: set[str]) -> Iterable[str]:
    """Phrases that are not in `seen`, which is extended."""
    for line in lines:
        found = re.findall(r"\b[a-z]+\b", line.lower())
        for first in range(0, len(found) - words + 1, words):
            phrase = " ".join(found[first : first + words])
            if phrase not in seen:
                seen.add(phrase)
                yield phrase
