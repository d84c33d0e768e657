"""Ranks that differ: what the message names."""

import json

import pytest

from hvdlarge.comm.rank_checks import disagreement, missing_gradient


class Answers:
    """The control channel of ranks whose answers are known."""

    def __init__(self, *answers):
        self.answers = [json.dumps(answer).encode() for answer in answers]

    def allgather(self, message):
        return self.answers


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([["a", "b"], ["a"], None], "the parameter 'b' has a gradient on rank 0 and none on rank 1;"),
        ([["a"], ["a", "b", "c"]], "the parameter 'b' (and 1 more: 'c') has a gradient on rank 1 and none on rank 0;"),
        ([[], list("abcdef")], "the parameter 'a' (and 5 more: 'b', 'c', 'd', …) has a gradient on rank 1"),
    ],
)  # fmt: skip
def test_gradients_that_are_missing_on_some_ranks_are_named(answers, words):
    message = str(missing_gradient(Answers(*answers), answers[0]))
    assert words in message
    assert "gradients.missing: zero" in message


def test_values_that_differ_are_told_with_their_ranks():
    channel = Answers()
    channel.answers = [b"0.1", b"0.1", b"0.2"]
    message = str(disagreement(channel, "lr", "0.1"))
    assert message == "the ranks disagree about the lr: 0.1 on rank 0, 1 and 0.2 on rank 2"
