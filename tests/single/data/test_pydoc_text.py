"""The documentation in Python: the same split everywhere, and no paragraph on both sides."""

from pydoc_data.topics import topics

import pytest

from hvdlarge.config import registry
from hvdlarge.data import pydoc_text
from hvdlarge.exits import JobError


def test_no_paragraph_is_used_twice():
    train, test = pydoc_text.read_topics("characters")
    lines = [*train.lines, *test.lines]
    assert len(set(lines)) == len(lines) > 1000
    every = {" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n")}
    assert set(lines) <= every - {""}


def test_words_are_those_of_the_paragraphs():
    train, _ = pydoc_text.read_topics("characters")
    in_words, _ = pydoc_text.read_topics("words")
    assert in_words.lines[0] == pydoc_text.spaced_words(train.lines[0])
    assert len(in_words.lines) == len(train.lines)
    joined = "".join(in_words.lines).replace(" ", "")
    assert joined == "".join(train.lines).replace(" ", "").lower()


def test_topics_keep_their_side_when_others_are_added():
    made = {f"topic {number}": f"text {number}\n\nshared" for number in range(100)}
    chosen = pydoc_text._test_topics(made)
    assert 10 <= len(chosen) <= 11
    more = made | {"one more": "text"}
    assert len(set(pydoc_text._test_topics(more)) ^ set(chosen)) <= 2
    assert pydoc_text._test_topics(dict(reversed(made.items()))) == chosen


def test_a_job_may_demand_one_text():
    digest = pydoc_text.digest_of(topics)
    assert pydoc_text.digest_of(topics | {"assert": "other"}) != digest
    registry.instantiate("data.name", "pydoc_text", {"sha256": digest}, registry.DATA_SETS)
    with pytest.raises(JobError, match=rf"Python 3\S+ has the SHA-256 {digest}, .*expects other"):
        registry.instantiate("data.name", "pydoc_text", {"sha256": "other"}, registry.DATA_SETS)
    assert registry.training_samples("pydoc_text", {"sha256": "other"}) is None
