"""States of metrics as torchmetrics keeps them, combined over workers."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from own_states import Collected, Counted, Extremes, Separate, Shaped

from hvdlarge.comm.solo import SoloCollectives
from hvdlarge.evaluation.parts import MetricError
from hvdlarge.evaluation.states import StateMetric
from hvdlarge.exits import JobError


def metric_of(kind):
    return StateMetric("own", kind(), (None, None), None)


class InStep:
    """Collectives of one of several workers that run in threads."""

    def __init__(self, rank, barrier, sent):
        self.rank, self.barrier, self.sent = rank, barrier, sent

    def gather(self, tensor, name):
        self.sent[self.rank] = name, tensor.clone()
        self.barrier.wait()
        names, tensors = zip(*self.sent, strict=True)
        self.barrier.wait()
        assert len(set(names)) == 1
        assert len({each.dtype for each in tensors}) == 1
        assert {each.dtype for each in tensors} <= HOROVODS
        return torch.stack(tensors)

    def sum(self, tensor, name):
        return self.gather(tensor, name).sum(dim=0)


HOROVODS = {torch.uint8, torch.int64, torch.float64}  # among others


def together(kind, batches_of_workers):
    """The result on each of several workers, or what it raised."""
    count = len(batches_of_workers)
    barrier, sent = threading.Barrier(count, timeout=20), [None] * count

    def work(rank):
        metric = metric_of(kind)
        metric.begin(torch.device("cpu"))
        for outputs in batches_of_workers[rank]:
            metric.update(outputs, outputs)
        try:
            metric.combine(InStep(rank, barrier, sent))
            return metric.result()
        except JobError as error:
            return str(error)

    with ThreadPoolExecutor(count) as workers:
        return list(workers.map(work, range(count)))


BATCHES = list(torch.tensor([3.0, -1.0, 4.0, 1.5, 9.0, 2.5]).reshape(3, 2, 1).expand(3, 2, 3))


@pytest.mark.parametrize("kind", [Counted, Extremes, Shaped, Separate, Collected])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_states_of_several_workers_are_those_of_one(kind, dtype):
    batches = [batch.to(dtype) for batch in BATCHES]
    if kind is Collected:
        batches = [batch[:, 0] for batch in batches]
    (alone,) = together(kind, [batches])
    for shared in ([batches, []], [[], batches], [batches[:1], batches[1:]], [[], batches, [], []]):
        assert together(kind, shared) == [alone] * len(shared)


def test_shapes_that_do_not_fit_are_an_error_on_every_worker():
    shared = [[torch.zeros(1, 2)], [torch.zeros(1, 3)], []]
    for kind, state in ((Shaped, "total"), (Collected, "values")):
        results = together(kind, shared)
        assert len(set(results)) == 1
        assert f"own: its state {state!r} has shapes that cannot be combined" in results[0]
        assert "[2] and [3]" in results[0] or "[1, 2] and [1, 3]" in results[0]


def test_what_cannot_be_combined_is_known_before_the_first_step():
    class Lists(Counted):
        defaults = {"count": []}

    class Started(Counted):
        defaults = {"count": torch.tensor([0.0, 5.0])}

    class Texts(Counted):
        def update(self, outputs, targets):
            self.count = "three"

    class Grouped(Separate):
        reductions = Collected.reductions

    with pytest.raises(JobError, match="own: its state 'count' is a list, and is combined by"):
        metric_of(Lists)
    with pytest.raises(JobError, match="own: its state 'count' .* does not start at 0"):
        metric_of(Started)
    with pytest.raises(MetricError, match="own: its state 'count' is a str, not a tensor"):
        metric_of(Texts).try_out(torch.ones(2), None, torch.device("cpu"))
    assert metric_of(Grouped).try_out(torch.ones(2), None, torch.device("cpu")) == 2

    class Counting(Collected):
        def compute(self):
            return torch.tensor(float(len(self.values)))

        def update(self, outputs, targets):
            self.values.extend(outputs)

    with pytest.raises(JobError, match="gives 2 before its states are combined and 1 afterwards"):
        metric_of(Counting).try_out(torch.ones(2), None, torch.device("cpu"))


def test_an_evaluation_forgets_the_one_before():
    metric = metric_of(Counted)
    for _ in range(2):
        metric.begin(torch.device("cpu"))
        metric.update(torch.ones(3), None)
        metric.combine(SoloCollectives())
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
