"""An evaluation: its figures against a plain loop, one sum in all, and metrics that fail."""

import sys

import pytest
import torch
from support.comparing import read_lines

from hvdlarge import InMemory, run_job
from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job
from hvdlarge.data.samples import SampleForm
from hvdlarge.data.transforms import Transforms
from hvdlarge.evaluation.parts import MetricError
from hvdlarge.exits import JobError, OutOfMemory
from hvdlarge.optim.precision import Precision
from hvdlarge.training import build

JOB = """
name: evaluated
epochs: 1
data: {name: digits}
model: {name: convnet, args: {width: 2}}
batch: {base: 8, micro: 4}
lr: {base: 1}
evaluate: {micro_batch: 7}
"""
OWN = """
import torch

class Wrong:
    num_totals = 1
    higher_is_better = False

    def totals(self, outputs, targets):
        return (outputs.argmax(dim=1) != targets).sum().reshape(1)

    def result(self, totals):
        return totals[0]

class Shapeless(Wrong):
    def totals(self, outputs, targets):
        return (outputs.argmax(dim=1) != targets).sum()

class Greedy(Wrong):
    def totals(self, outputs, targets):
        raise MemoryError("no room")

class GreedyAtTheEnd(Wrong):
    def result(self, totals):
        raise MemoryError("no room")

class GreedyStates(torch.nn.Module):
    _reductions, _defaults, device = {"count": None}, {"count": []}, torch.device("cpu")
    _update_count, higher_is_better, where = 0, True, "compute"

    def reset(self):
        self.count = []

    def update(self, outputs, targets):
        self.count.append(outputs)
        if self.where == "update":
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def compute(self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

class GreedyUpdates(GreedyStates):
    where = "update"

class NotANumber(Wrong):
    def result(self, totals):
        return totals[0] * float("nan")
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_metrics", None)


class CountedSums(SoloCollectives):
    """Counts the sums."""

    def __init__(self):
        self.sums = []

    def sum(self, tensor, name):
        self.sums.append((name, tensor.dtype, tuple(tensor.shape)))
        return super().sum(tensor, name)


def evaluate(*metrics, prepare=lambda model: None):
    """(results, sums, model, test set) of an untrained net."""
    job = parse_job(JOB, "job", [f"evaluate.metrics=[{', '.join(map(repr, metrics))}]"])
    precision = Precision(job.precision, torch.device("cpu"))
    objective, optimizer, _ = build.build_learning(job, precision)
    components = build.Components(objective, None, None, {}, None, optimizer)
    replica = build.build_replica(job, components, SoloChannel(), SoloCollectives())
    prepare(replica.objective.model)
    _, test_set = build.load_data(job.data, job.seed)
    found, tensors = build.build_metrics(job), CountedSums()
    evaluation = build.build_evaluation(
        job.data, job.evaluate, found, SampleForm(), test_set, 0, 1, Transforms()
    )
    return evaluation.run(replica, tensors), tensors.sums, replica.objective.model, test_set


def test_results_are_those_of_a_plain_loop_in_one_sum():
    results, sums, model, test_set = evaluate("accuracy", "own_metrics:Wrong")
    inputs, targets = test_set.batch(torch.arange(len(test_set)))
    with torch.no_grad():
        outputs = model.eval()(inputs)
    right = (outputs.argmax(dim=1) == targets).sum().item()
    loss = torch.nn.functional.cross_entropy(outputs.double(), targets).item()
    assert list(results) == ["test_loss", "accuracy", "Wrong"]
    assert results["test_loss"] == pytest.approx(loss, rel=1e-6)
    assert results["accuracy"] == right / 360
    assert results["Wrong"] == 360 - right
    assert sums == [("evaluation", torch.float64, (5,))]


def test_an_evaluation_without_metrics_gives_the_loss():
    results, sums, *_ = evaluate()
    assert list(results) == ["test_loss"]
    assert sums == [("evaluation", torch.float64, (2,))]


def test_metrics_do_not_change_each_other():
    alone, *_ = evaluate("accuracy")
    together, *_ = evaluate("own_metrics:Wrong", "accuracy")
    assert {name: together[name] for name in alone} == alone


def test_totals_of_another_shape_end_the_evaluation():
    with pytest.raises(MetricError, match=r"metrics: Shapeless: totals\(\) .* 1 real numbers, not"):
        evaluate("own_metrics:Shapeless")


def test_a_result_that_is_not_a_number_ends_the_evaluation():
    with pytest.raises(JobError, match="metrics: NotANumber: .* is nan"):
        evaluate("own_metrics:NotANumber")


def test_a_diverged_model_is_reported_by_its_loss_and_not_by_a_metric():
    def diverge(model):
        torch.nn.init.constant_(model.classifier.weight, float("nan"))

    results, *_ = evaluate("own_metrics:NotANumber", prepare=diverge)
    assert list(results) == ["test_loss"]
    assert results["test_loss"] != results["test_loss"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "unknown name 'acuracy'; did you mean 'accuracy'"),
        ("own_metrics:NoMetric", "has no 'NoMetric'"),
        ("builtins:dict", "builtins:dict must give a metric; this dict has no totals"),
    ],
)
def test_what_is_no_metric_is_the_jobs_error(name, message):
    job = parse_job(JOB, "job", [f"evaluate.metrics=[{name!r}]"])
    with pytest.raises(JobError, match=f"evaluate.metrics: .*{message}"):
        build.build_metrics(job)


RUN = {
    "name": "run",
    "epochs": 1,
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "batch": {"base": 479, "micro": 479},  # whole steps, so that more epochs may follow
    "lr": {"base": 1.0},
}


def test_a_run_goes_on_with_other_metrics_and_the_best_by_one_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run_job(RUN)
    assert "accuracy" in first
    second = run_job(
        RUN, "epochs=2", "evaluate.metrics=['own_metrics:Wrong']", "checkpoint.best=Wrong"
    )
    assert "accuracy" not in second
    assert 0 < second["Wrong"] < 360
    lines = read_lines(tmp_path / "runs/run/metrics.jsonl")
    assert [(line.get("accuracy"), line.get("Wrong")) for line in lines if "test_loss" in line] == [
        (first["accuracy"], None),
        (None, second["Wrong"]),
    ]
    best = torch.load(tmp_path / "runs/run/checkpoints/best.pt", weights_only=True)["state"]["best"]
    assert best == {"by": "Wrong", "value": -second["Wrong"], "step": float(second["steps"])}


@pytest.mark.parametrize(
    ("metric", "where"),
    [
        ("Greedy", "an evaluation of 7 samples at once: set evaluate.micro_batch lower"),
        ("GreedyAtTheEnd", "evaluate.metrics: GreedyAtTheEnd: what it keeps may grow"),
        ("GreedyStates", "evaluate.metrics: GreedyStates: what it keeps may grow"),
        ("GreedyUpdates", "evaluate.metrics: GreedyUpdates: what it keeps may grow"),
    ],
)
def test_out_of_memory_in_a_metric_is_reported_as_such(metric, where):
    with pytest.raises(OutOfMemory, match=f"out of memory in {where}"):
        evaluate(f"own_metrics:{metric}")


def test_a_test_set_without_any_target_is_no_divergence(tmp_path):
    targets = torch.full((20,), -100)
    pair = InMemory(torch.randn(20, 6), targets)
    train = InMemory(torch.randn(20, 6), torch.arange(20) % 3)
    job = {
        "name": "untargeted",
        "run_dir": str(tmp_path / "run"),
        "epochs": 1,
        "batch": {"base": 4, "micro": 2},
        "lr": {"base": 0.1},
        "loss": {"name": "cross_entropy", "args": {"ignore_index": -100}},
    }
    with pytest.raises(JobError, match="evaluate: no target of the test set counts"):
        run_job(job, model=torch.nn.Linear(6, 3), data=(train, pair))
