"""What a metric promises, and the errors that name the one that does not keep it."""

import math

import pytest
import torch

from hvdlarge.evaluation.accuracy import Accuracy
from hvdlarge.evaluation.metric import build_metric, rankings, result_of, totals_of
from hvdlarge.evaluation.parts import MetricError
from hvdlarge.exits import JobError


class Always:
    """A metric that gives what it is built with."""

    num_totals = 2
    higher_is_better = False

    def __init__(self, value=None):
        self.value = value

    def totals(self, outputs, targets):
        return self.value

    def result(self, totals):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def test_a_metric_is_accepted():
    build_metric("always", "always", Always(), None, None, None)
    build_metric("accuracy", "accuracy", Accuracy(), None, None, None)


@pytest.mark.parametrize(
    ("part", "value"),
    [("totals", None), ("result", 3), ("num_totals", 0), ("num_totals", "2"),
     ("higher_is_better", 1)],
)  # fmt: skip
def test_what_lacks_a_part_of_a_metric_is_refused_by_name(part, value):
    metric = Always()
    setattr(metric, part, value)
    with pytest.raises(JobError, match=rf"evaluate\.metrics: odd must give a metric; .* {part}"):
        build_metric("odd", "odd", metric, None, None, None)


def test_a_function_is_no_metric():
    with pytest.raises(JobError, match="no totals, result, num_totals .* higher_is_better"):
        build_metric("odd", "odd", len, None, None, None)


@pytest.mark.parametrize(
    ("totals", "shown"),
    [(torch.zeros(3), r"not float32\[3\]"), (torch.zeros(()), r"not float32\[\]"),
     (torch.zeros(2, 1), r"not float32\[2, 1\]"), (1.5, "not a float"), (None, "not a NoneType"),
     (torch.zeros(2, dtype=torch.complex64), r"not complex64\[2\]")],
)  # fmt: skip
def test_totals_of_another_shape_are_an_error_that_names_the_metric(totals, shown):
    with pytest.raises(MetricError, match=rf"evaluate\.metrics: odd: totals\(\) .* {shown}"):
        totals_of("odd", Always(totals), None, None)


@pytest.mark.parametrize("value", [float("nan"), "0.5", True, torch.tensor(0.5), [0.5]], ids=str)
def test_a_result_that_is_not_a_number_is_an_error_that_names_the_metric(value):
    with pytest.raises(JobError, match=r"evaluate\.metrics: odd: result\(\[1\.0\]\) is .* number"):
        result_of("odd", Always(value), [1.0])


def test_what_a_result_raises_is_an_error_that_names_the_metric():
    with pytest.raises(JobError, match=r"metrics: odd: result\(\[0\.0\]\) raises ZeroDivisionErr"):
        result_of("odd", Always(ZeroDivisionError("float division by zero")), [0.0])


@pytest.mark.parametrize(
    ("value", "result"), [(None, None), (1, 1.0), (0.25, 0.25), (math.inf, math.inf)]
)
def test_a_result_is_a_number_or_does_not_apply(value, result):
    assert result_of("fine", Always(value), [1.0]) == result


def test_rankings_put_the_metrics_before_the_loss():
    metrics = {"accuracy": Accuracy(), "error": Always()}
    assert list(rankings(None, metrics).items()) == [
        ("accuracy", True),
        ("error", False),
        ("test_loss", False),
    ]
    assert rankings("error", metrics) == {"error": False}
    assert rankings("test_loss", metrics) == {"test_loss": False}
    assert rankings("ema_accuracy", metrics) == {"ema_accuracy": True}
    assert rankings("ema_test_loss", metrics) == {"ema_test_loss": False}
