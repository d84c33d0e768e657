"""Accuracy: right answers over all answers, where the targets are classes."""

import pytest
import torch

from hvdlarge.evaluation.accuracy import F1, Accuracy, Top5, are_classes
from hvdlarge.evaluation.errors import Perplexity
from hvdlarge.evaluation.parts import MetricError
from hvdlarge.models.losses import CrossEntropyLoss


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


def test_padding_does_not_count():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 0.0]])
    totals = Accuracy().totals(logits, torch.tensor([0, 0, -100]))
    assert Accuracy().result(totals.tolist()) == 0.5


def test_top5_counts_targets_among_the_five_highest_logits():
    logits = torch.arange(8.0).repeat(3, 1)  # 3 to 7 are the five highest
    totals = Top5().totals(logits, torch.tensor([3, 7, 2]))
    assert totals.tolist() == [2, 3]
    assert (
        Top5().result(Top5().totals(torch.zeros(3, 5), torch.zeros(3, dtype=int)).tolist()) is None
    )


PREDICTED = [0, 0, 1, 1, 1, 3, 0]
ACTUAL = [0, 1, 1, 1, 0, 0, -100]


@pytest.mark.parametrize(
    ("average", "expected"),
    # classes 0, 1, 3 occur: 2·1/(2+3), 2·2/(3+3), 0; micro: 3 right of 6
    [("macro", (2 / 5 + 2 / 3 + 0) / 3), ("micro", 0.5)],
)
def test_f1_is_that_of_the_classes_that_occur(average, expected):
    metric = F1(num_classes=4, average=average)
    logits = torch.nn.functional.one_hot(torch.tensor(PREDICTED), 4).float()
    targets = torch.tensor(ACTUAL)
    totals = metric.totals(logits[:3], targets[:3]) + metric.totals(logits[3:], targets[3:])
    assert metric.result(totals.tolist()) == pytest.approx(expected)


def test_f1_of_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="num_classes is 3, the outputs have 4 classes"):
        F1(3).totals(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)),  # one column is no choice
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool)),
    ],
)
def test_nothing_is_called_accuracy_that_is_not(outputs, targets):
    assert Accuracy().result(Accuracy().totals(outputs, targets).tolist()) is None


CLASSIFICATION = {
    "accuracy": Accuracy,
    "top5": Top5,
    "f1": lambda **given: F1(7, **given),
    "perplexity": Perplexity,
}


@pytest.mark.parametrize("kind", CLASSIFICATION.values(), ids=CLASSIFICATION)
@pytest.mark.parametrize("ignored", [255, 0, -100, None])
def test_ignored_targets_are_those_of_the_loss(kind, ignored):
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(20) % 7
    if ignored is not None:
        targets[4:9] = ignored
    counted = targets != (-1 if ignored is None else ignored)
    metric = kind(ignore_index=ignored)
    result = metric.result(metric.totals(logits, targets).tolist())
    assert result == kind().result(kind().totals(logits[counted], targets[counted]).tolist())
    if ignored is not None:
        _, weight = CrossEntropyLoss(ignore_index=ignored)(logits, targets)
        assert weight == counted.sum()


@pytest.mark.parametrize("kind", CLASSIFICATION.values(), ids=CLASSIFICATION)
def test_a_target_that_is_no_class_is_an_error(kind):
    targets = torch.tensor([0, 255, 6])
    with pytest.raises(MetricError, match=r"a target is 255, .* 7 classes.*ignore_index: 255\}"):
        kind(ignore_index=254).totals(torch.zeros(3, 7), targets)


def test_outputs_of_one_dimension_are_no_classes():
    assert not are_classes(torch.randn(3), torch.tensor(1))
    assert Accuracy().totals(torch.randn(3), torch.tensor(1)).tolist() == [0, 0]
