"""Whole runs in this process: every rank's decisions are rank 0's, and the world law holds for what the engine has."""

import dataclasses
import io

import pytest
import torch
from support.comparing import weight_distance

from hvdlarge.checkpoint.content import RunFacts
from hvdlarge.checkpoint.folder import NoCheckpoints
from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job
from hvdlarge.config.planning import plan_run
from hvdlarge.controller import Controller, DecisionFeed
from hvdlarge.data.in_memory import InMemory
from hvdlarge.data.samples import SampleForm
from hvdlarge.exits import JobError
from hvdlarge.optim.precision import Precision
from hvdlarge.replica.train_state import TrainState
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.schedule.plan import RunProgress
from hvdlarge.telemetry.run_log import SilentRunLog
from hvdlarge.training import build
from hvdlarge.training.loop import train
from hvdlarge.training.run import Run
from hvdlarge.world import RankContext

JOB = """
name: law
epochs: 5.3
precision: fp64
data: {name: digits}
model: {name: convnet, args: {width: 4, dropout: 0.3}}
batch: {base: 20, micro: 8, growth: {policy: adabatch, factor: 3, every_epochs: 1, max: 500}}
lr: {base: 4, scaling: sqrt, warmup: {policy: legw, epochs: 0.1}, decay: {policy: polynomial}}
optimizer: {name: lars, weight_decay: 1e-4}
log: {every_steps: 5}
compare_every_steps: 3
evaluate: {every_epochs: 2, micro_batch: 50}
"""


class Listed(torch.utils.data.Dataset):
    """The same samples in a plain map-style set, so that torch's DataLoader carries them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def run(job, control, tensors, wrap=lambda dataset: dataset):
    """Train a job on 203 digits; returns the weights and the results."""
    train_set, test_set = build.load_data(job.data, job.seed)
    small = wrap(InMemory(train_set.inputs[:203], train_set.targets[:203]))
    plan = plan_run(job, len(small), control.size)
    precision = Precision(job.precision, torch.device("cpu"))
    objective, optimizer, _ = build.build_learning(job, precision)
    components = build.Components(
        objective,
        small,
        wrap(test_set),
        {},
        plan,
        optimizer,
        metrics=build.build_metrics(job),
    )
    replica = build.build_replica(job, components, control, tensors)
    replica.statistics.to_partial()
    not_watching = Watchdog(
        control.rank, {"start": 100, "step": 100}
    )  # never started, so that it leaves nothing armed behind
    context = RankContext(None, {}, control, tensors, not_watching, StopRequest())
    state = TrainState()
    loader = build.build_loader(job.data, SampleForm(), small, job.seed)
    facts = RunFacts({}, {}, {}, control.size)
    whole = Run(job, context, components, replica, facts, NoCheckpoints(), SilentRunLog())
    parts = whole.build_loop(loader, RunProgress(), state)
    before = {name: value.clone() for name, value in objective.model.state_dict().items()}
    train(parts, state)
    replica.statistics.all_reduce(tensors.sum)
    after = objective.model.state_dict()
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    assert all(torch.isfinite(value).all() for value in after.values())
    return after, state.results


def alone(job, control):
    """What `run` returns where rank 0 trains the job alone, on every rank."""
    written = io.BytesIO()
    if control.rank == 0:
        torch.save(run(job, SoloChannel(), SoloCollectives()), written)
    return torch.load(io.BytesIO(control.allgather(written.getvalue())[0]))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["batch.micro=3"],
        ["optimizer={name: sgd}", "lr.base=0.02"],
        ["optimizer={name: lars, preset: larc, nesterov: true, weight_decay: 1e-4}", "lr.base=0.1"],
        ["optimizer={name: lamb, weight_decay: 1e-2}", "lr.base=0.005"],
        ["optimizer={name: adamw, weight_decay: 1e-2}", "lr.base=0.001"],
        ["model={name: row_lstm}", "lr.base=2"],
        ["model={name: mlp, args: {dropout: 0.5}}"],
        ["epochs=0.05", "lr.warmup.epochs=0.02"],
        ["gradients={clip_norm: 0.5}"],
        ["horovod={groups: 3}"],
    ],
    ids=lambda changes: " ".join(changes) or "as it stands",
)
def test_the_world_law(control, tensors, changes):
    """Batch norm, dropout, growths up to twice the data set, idle workers, a short last step, evaluation."""
    job = parse_job(JOB, "law", changes)
    weights, results = run(job, control, tensors)
    solo, expected = alone(job, control)
    assert weight_distance(weights, solo) < 1e-12
    assert results == pytest.approx(expected, rel=1e-9)
    for name, value in weights.items():
        if name.endswith("num_batches_tracked"):
            assert value == solo[name]
    assert (
        len(set(control.allgather(b"".join(value.numpy().tobytes() for value in weights.values()))))
        == 1
    )


class Smooth(torch.nn.Module):
    """Convolution, batch norm, dropout and no kink anywhere."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            # The exact gradient of a bias before batch norm is 0: rounding alone would move it
            torch.nn.Conv2d(1, 6, 3, bias=False),
            torch.nn.BatchNorm2d(6),
            torch.nn.Tanh(),
            torch.nn.Dropout(0.3),
            torch.nn.AvgPool2d(2),
        )
        self.head = torch.nn.Linear(54, 10)

    def forward(self, images):
        return self.head(self.body(images).flatten(1))


@pytest.mark.parametrize(
    "changes",
    [
        ["model={name: 'test_run:Smooth'}"],
        ["model={name: row_lstm}", "lr.base=2"],
        ["epochs=2"],
    ],
    ids=str,
)
def test_the_world_law_in_float32(control, tensors, changes):
    """Where a ReLU or a maximum of the convnet changes sides, float32's rounding becomes a jump: it is judged over fewer steps."""
    job = parse_job(JOB, "law", ["precision=fp32", *changes])
    weights, _ = run(job, control, tensors)
    solo, _ = alone(job, control)
    assert weight_distance(weights, solo) < 1e-5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_processes_change_nothing(control, tensors, num_workers):
    job = parse_job(JOB, "law", [f"data.num_workers={num_workers}", "epochs=3"])
    weights, results = run(job, control, tensors, wrap=Listed)
    solo, expected = alone(parse_job(JOB, "law", ["epochs=3"]), control)
    assert weight_distance(weights, solo) < 1e-12
    assert results == pytest.approx(expected, rel=1e-9)


def test_a_worker_follows_rank_0_whatever_it_believes(control):
    """The workers' own schedules are wrong on purpose; nobody asks them."""
    job = parse_job(
        JOB, "law", [] if control.rank == 0 else ["lr.base=77", "batch.base=7", "batch.micro=2"]
    )
    plan = job.plan(203, control.size)
    heard = []
    feed = DecisionFeed(control, Controller(plan) if control.rank == 0 else None, 3, heard.append)
    followed = list(iter(feed.next, None))
    truth = list(iter(Controller(parse_job(JOB, "law").plan(203, control.size)).decide, None))
    assert followed == heard == truth
    assert all(
        dataclasses.astuple(ours) == dataclasses.astuple(theirs)
        for ours, theirs in zip(followed, truth, strict=True)
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_computed_the_same_on_any_number_of_workers(control, tensors, precision):
    """Exact mode takes the order of sums out, so nothing else may differ: loss scales, skipped steps, forward passes."""
    given = [f"precision={precision}", "model={name: mlp, args: {dropout: 0.2}}", "epochs=3"]
    _, in_float32 = alone(parse_job(JOB, "law", [*given, "precision=fp32"]), control)
    expected = pytest.approx(in_float32["test_loss"], rel=1e-2)
    if control.size & (control.size - 1) == 0:
        job = parse_job(JOB, "law", ["reduction=exact", *given])
        weights, _ = run(job, control, tensors)
        solo, results = alone(job, control)
        assert all(torch.equal(value, solo[name]) for name, value in weights.items())
        assert results["test_loss"] == expected
    weights, results = run(parse_job(JOB, "law", given), control, tensors)
    assert (
        len(set(control.allgather(b"".join(value.numpy().tobytes() for value in weights.values()))))
        == 1
    )
    assert results["test_loss"] == expected


def test_compressed_gradients_lose_digits_and_nothing_else(control, tensors):
    few = ["precision=fp32", "epochs=0.5", "lr.warmup.epochs=0.2", "model={name: mlp}"]
    weights, _ = run(
        parse_job(JOB, "law", ["gradients={compression: fp16}", *few]), control, tensors
    )
    plain, _ = run(parse_job(JOB, "law", few), control, tensors)
    away = weight_distance(weights, plain)
    assert away < 1e-2
    assert (away > 0) == (control.size > 1)  # one worker sends nothing
    assert (
        len(set(control.allgather(b"".join(value.numpy().tobytes() for value in weights.values()))))
        == 1
    )


@pytest.mark.parametrize(
    "changes",
    [[], ["model={name: row_lstm}", "lr.base=2"], ["batch.micro=3", "precision=fp32"]],
    ids=str,
)
def test_exact_mode_is_bit_identical_to_one_worker(control, tensors, changes):
    """Weights, and running statistics too."""
    job = parse_job(JOB, "law", ["reduction=exact", *changes])
    if control.size & (control.size - 1):
        with pytest.raises(JobError, match="exact needs 1, 2, 4"):
            run(job, control, tensors)
        return
    weights, _ = run(job, control, tensors)
    solo, _ = alone(job, control)
    for name, value in weights.items():
        assert torch.equal(value, solo[name]), name
    fast, _ = alone(parse_job(JOB, "law", changes), control)
    assert weight_distance(solo, fast) < (1e-5 if "precision=fp32" in changes else 1e-12)
