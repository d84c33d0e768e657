"""States of metrics as torchmetrics keeps them, combined over workers."""

import pytest
import torch
from own_states import Collected, Counted, Extremes

from hvdlarge.evaluation.states import StateMetric
from hvdlarge.exits import JobError


class Workers:
    """Collectives of several workers, called one after the other: the second call of a name sees the first."""

    def __init__(self, others):
        self.others = others  # by name, the tensors of the other workers

    def sum(self, tensor, name):
        return sum(self.others.get(name, []), tensor)

    def gather(self, tensor, name):
        return torch.stack([tensor, *self.others.get(name, [])])


class Recorder(Workers):
    """Keeps what a worker sends."""

    def __init__(self):
        super().__init__({})
        self.sent = {}

    def sum(self, tensor, name):
        self.sent[name] = tensor.clone()
        return tensor

    gather = lambda self, tensor, name: self.sum(tensor, name).unsqueeze(0)  # noqa: E731


def metric_of(kind):
    return StateMetric("own", kind(), (None, None), None)


@pytest.mark.parametrize("kind", [Counted, Extremes])
def test_states_of_two_workers_are_those_of_one(kind):
    values = torch.tensor([3.0, -1.0, 4.0, 1.5, 9.0])
    alone = metric_of(kind)
    alone.begin(torch.device("cpu"))
    alone.update(values, values)
    alone.combine(Workers({}))
    other, sent = metric_of(kind), Recorder()
    other.begin(torch.device("cpu"))
    other.update(values[3:], values[3:])
    other.combine(sent)
    own = metric_of(kind)
    own.begin(torch.device("cpu"))
    own.update(values[:3], values[:3])
    own.combine(Workers({name: [tensor] for name, tensor in sent.sent.items()}))
    assert own.result() == alone.result()


def test_an_evaluation_forgets_the_one_before():
    metric = metric_of(Counted)
    for _ in range(2):
        metric.begin(torch.device("cpu"))
        metric.update(torch.ones(3), None)
        metric.combine(Workers({}))
        assert metric.result() == 3.0


def test_a_state_that_depends_on_the_number_of_workers_is_refused():
    class Averaged(Counted):
        def __init__(self):
            super().__init__()
            self._reductions["count"] = torch.mean

    with pytest.raises(JobError, match="own: its state 'count' is combined by mean, which depends"):
        metric_of(Averaged)


@pytest.mark.parametrize("value", [torch.zeros(2), torch.tensor(float("nan")), {"a": 1}])
def test_a_result_that_is_not_one_number_is_refused(value):
    class Odd(Counted):
        def compute(self):
            return value

    metric = metric_of(Odd)
    metric.begin(torch.device("cpu"))
    with pytest.raises(JobError, match=r"own: compute\(\) gives .*: a result is one number"):
        metric.result()


def test_samples_are_concatenated_in_the_order_of_the_ranks():
    metric = metric_of(Collected)
    metric.begin(torch.device("cpu"))
    metric.update(torch.tensor([1.0, 2.0]), None)
    sent = Recorder()
    metric.combine(sent)
    assert metric.result() == 1 * 1.0 + 2 * 2.0
    idle = metric_of(Collected)  # as rank 0, whose peer has the samples
    idle.begin(torch.device("cpu"))
    others = {"evaluation.own.values.shape": [sent.sent["evaluation.own.values.shape"]],
              "evaluation.own.values": [sent.sent["evaluation.own.values"]]}  # fmt: skip
    idle.combine(Workers(others))
    assert idle.result() == 5.0


class Holding(Counted):
    """As torchmetrics' compositions and wrappers, which keep their states in others."""

    def __init__(self):
        super().__init__()
        self.other = Counted()


class Stateless(Counted):
    def __init__(self):
        super().__init__()
        self._reductions = {}


@pytest.mark.parametrize(
    ("kind", "words"), [(Holding, "holds other metrics"), (Stateless, "has no states of its own")]
)
def test_a_metric_whose_states_are_not_its_own_is_refused(kind, words):
    with pytest.raises(JobError, match=f"own: this {kind.__name__} {words}"):
        metric_of(kind)
