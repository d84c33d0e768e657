"""Accuracy: right answers over all answers, where the targets are classes."""

import pytest
import torch

from hvdlarge.evaluation.accuracy import Accuracy


def test_accuracy_of_classes_counts_right_answers():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
    totals = Accuracy().totals(scores, torch.tensor([1, 0, 0]))
    assert totals.tolist() == [2, 3]
    assert Accuracy().result([2.0, 3.0]) == 2 / 3


def test_accuracy_of_sequences_counts_every_position():
    scores = torch.zeros(2, 3, 4)  # (n, classes, positions)
    scores[:, 1] = 1
    targets = torch.tensor([[1, 1, 0, 2], [1, 1, 1, 1]])
    assert Accuracy().totals(scores, targets).tolist() == [6, 8]


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2)),  # a regression
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64)),  # one score each
        ({"scores": torch.zeros(3, 2)}, torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 2), (torch.zeros(3), torch.zeros(3))),
    ],
    ids=["regression", "one score", "dict", "tuple"],
)
def test_accuracy_of_anything_else_does_not_apply(outputs, targets):
    totals = Accuracy().totals(outputs, targets)
    assert totals.tolist() == [0, 0]
    assert Accuracy().result(totals.tolist()) is None
