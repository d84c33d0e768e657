"""Perplexity, mean squared and mean absolute error, against sums written out."""

import math

import pytest
import torch

from hvdlarge.evaluation.errors import MeanAbsoluteError, MeanSquaredError, Perplexity


def over_two_batches(metric, outputs, targets):
    """The metric's result over two uneven micro-batches."""
    first, second = (
        metric.totals(outputs[part], targets[part]) for part in (slice(0, 2), slice(2, None))
    )
    return metric.result((first.double() + second.double()).tolist())


def test_perplexity_is_the_exponential_of_the_mean_over_the_targets_that_count():
    logits = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, -100], [2, 3, 0], [-1, -1, -1], [3, 3, 3], [0, -100, 2]])
    logs = [
        -math.log(float(logits[n, :, t].double().softmax(0)[targets[n, t]]))
        for n in range(5)
        for t in range(3)
        if targets[n, t] >= 0
    ]
    expected = math.exp(sum(logs) / len(logs))
    assert over_two_batches(Perplexity(), logits, targets) == pytest.approx(expected, rel=1e-9)
    assert not Perplexity.higher_is_better


def test_perplexity_beyond_the_largest_float_is_infinite():
    assert Perplexity().result([800.0, 1.0]) == math.inf
    assert math.isnan(Perplexity().result([math.nan, 1.0]))


def test_errors_are_means_over_all_numbers():
    outputs = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 3.0]])
    targets = torch.tensor([[0.0, 4.0], [0.0, -1.0], [2.0, 0.0]])
    assert over_two_batches(MeanSquaredError(), outputs, targets) == pytest.approx(15 / 6)
    assert over_two_batches(MeanAbsoluteError(), outputs, targets) == pytest.approx(7 / 6)


@pytest.mark.parametrize("metric", [Perplexity(), MeanSquaredError(), MeanAbsoluteError()])
@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)),  # broadcasting is no comparison
        (torch.zeros(3, 2), torch.zeros(3)),
        ({"logits": torch.zeros(3)}, torch.zeros(3)),
        (torch.zeros(3, 2), None),
    ],
)
def test_what_cannot_be_compared_has_no_result(metric, outputs, targets):
    assert metric.result(metric.totals(outputs, targets).tolist()) is None
