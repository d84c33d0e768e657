"""The English documentation inside Python (`pydoc_data.topics`), split into a training and a test
text.

Contract: pure for one Python version, and without torch. The topics depend on the version: their
          SHA-256 identifies the text, and a job may demand it. Topics are assigned by the hash of
          their names, so that most stay on their side in other versions. Topics repeat paragraphs
          of others (`compound` contains `for`): every paragraph is used once, and one of a test
          topic never for training.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping

from hvdlarge.data.text import Text, splitter

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
    splitter(level)
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
