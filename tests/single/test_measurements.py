"""Norms by layer, gradient noise and distance from the start: against known values, on any number of workers, through interruptions."""

import itertools
import json
import random
import statistics

import pytest
import torch
from support import quadratic
from support.comparing import read_lines, same
from support.quadratic import noise_scale

from hvdlarge.config.job_file import parse_job
from hvdlarge.exits import JobError
from hvdlarge.optim.lars import LARS
from hvdlarge.schedule.noise_growth import NoiseScaleGrowth
from hvdlarge.telemetry.gradient_noise import GradientNoise, MicroBatchGradient, estimate
from hvdlarge.telemetry.layer_statistics import LayerStatistics
from hvdlarge.telemetry.weight_distance import FILE, is_on_grid
from trials.engine import (
    StopAtStep,
    join_checkpoint_writers,
    preserved_settings,
    run_rank,
    silenced,
)
from trials.thread_world import run_world

JOB = """\
name: quadratic
epochs: 0.25
precision: fp64
data: {name: "support.quadratic:data"}
model: {name: "support.quadratic:Point"}
loss: {name: "support.quadratic:half_square"}
batch: {base: 64, micro: 8}
lr: {base: 1e-9}
optimizer: {name: sgd}
log: {noise_every_steps: 1}
"""


def start(job, folder, workers, stop_after=None):
    """Start or continue a run; its exit code."""
    folder.with_suffix(".yaml").write_text(job.to_yaml())
    job = job.model_copy(update={"run_dir": str(folder)})

    def action(control, tensors):
        return run_rank(job, folder, control, tensors, StopAtStep(stop_after))[0]

    with preserved_settings(), silenced():
        ends = run_world(workers, action)
        join_checkpoint_writers()
    if ends.error is not None:
        raise ends.error[1]
    return ends.results[0]


def job_of(*changes):
    return parse_job(JOB, "job", changes)


def records(folder, key):
    return [line for line in read_lines(folder / "metrics.jsonl") if key in line]


def test_an_estimate_has_no_bias():
    draws, sizes, dimensions = random.Random(0), (4, 4, 4, 1), 3
    gradient, deviation = 0.5, 2.0
    found = []
    for _ in range(4000):
        means = [
            [draws.gauss(gradient, deviation / size**0.5) for _ in range(dimensions)]
            for size in sizes
        ]
        total = [
            sum(size * mean[k] for size, mean in zip(sizes, means, strict=True)) / sum(sizes)
            for k in range(dimensions)
        ]
        each = [
            MicroBatchGradient(size, sum(value**2 for value in mean))
            for size, mean in zip(sizes, means, strict=True)
        ]
        found.append(estimate(each, sum(value**2 for value in total), sum(sizes)))
    square, variance = (statistics.mean(side) for side in zip(*found, strict=True))
    assert square == pytest.approx(dimensions * gradient**2, rel=0.1)
    assert variance == pytest.approx(dimensions * deviation**2, rel=0.1)


def test_what_chance_has_made_negative_is_not_available():
    assert GradientNoise(-0.1, 3.0).scale is None
    assert GradientNoise(0.1, -3.0).scale is None
    assert GradientNoise(2.0, 3.0).scale == 1.5
    # A negative square still counts in the average
    assert GradientNoise(-1.0, 1.0).averaged(GradientNoise(1.0, 1.0)).square == pytest.approx(0.8)
    one, two = MicroBatchGradient(2, 1.0), MicroBatchGradient(0, 1.0)
    assert estimate([one], 1.0, 2) is None
    assert estimate([one, two], 1.0, 2) is None
    assert estimate([one, MicroBatchGradient(2, float("inf"))], 1.0, 4) is None


def test_the_first_measurement_counts_no_more_than_a_later_one():
    average = None
    for square in (100.0, 1.0, 1.0, 1.0):
        average = GradientNoise(square, 1.0).averaged(average)
    # (0.9³ + 0.9² + 0.9 + 1) / (100 · 0.9³ + 0.9² + 0.9 + 1)
    assert average.scale == pytest.approx(3.439 / 75.61)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The same job on one worker with eight micro-batches and on four with two."""
    folder = tmp_path_factory.mktemp("measured")
    for workers in (1, 4):
        assert start(job_of(), folder / f"run{workers}", workers) == 0
    return folder


@pytest.mark.parametrize("workers", [1, 4])
def test_the_noise_scale_of_a_quadratic_problem_is_the_known_one(measured, workers):
    lines = records(measured / f"run{workers}", "noise_scale")
    assert len(lines) == 32
    assert lines[-1]["noise_scale"] == pytest.approx(noise_scale(0.0), rel=0.1)
    for side in ("gradient_square", "gradient_variance"):
        known = {
            "gradient_square": (quadratic.samples().mean(dim=0)).square().sum().item(),
            "gradient_variance": quadratic.samples().var(dim=0, correction=0).sum().item(),
        }[side]
        assert statistics.mean(line[side] for line in lines) == pytest.approx(known, rel=0.05)


def test_the_noise_scale_does_not_depend_on_the_number_of_workers(measured):
    one, four = (records(measured / f"run{workers}", "noise_scale") for workers in (1, 4))
    for ours, theirs in zip(one, four, strict=True):
        assert ours["noise_scale"] == pytest.approx(theirs["noise_scale"], rel=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        ["loss.name=support.quadratic:halves"],
        ["gradients.clip_norm=1e-3"],
        ["reduction=exact"],
        ["batch.micro=9"],
        ["precision=fp16"],  # whose losses are scaled
    ],
    ids=lambda change: change[0],
)
def test_neither_weights_of_the_loss_nor_clipping_nor_the_reduction_change_the_noise(
    measured, tmp_path, change
):
    assert start(job_of(*change), tmp_path / "run", 2) == 0
    found = records(tmp_path / "run", "noise_scale")[-1]["noise_scale"]
    expected = records(measured / "run1", "noise_scale")[-1]["noise_scale"]
    bound = {"batch.micro=9": 0.1, "precision=fp16": 1e-3}.get(change[0], 1e-6)
    assert found == pytest.approx(expected, rel=bound)


class Spike:
    """The loss, which is not finite in one pass of the process."""

    passes = 0

    def __call__(self, difference, targets):
        Spike.passes += 1
        return quadratic.half_square(difference, targets) * (
            torch.inf if Spike.passes == 90 else 1.0
        )


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_that_is_not_finite_has_no_noise_and_the_measurements_go_on(tmp_path, policy):
    Spike.passes = 0
    spiked = [
        "loss={name: 'single.test_measurements:Spike'}",
        f"on_nonfinite={{policy: {policy}}}",
        "checkpoint.every_steps=5",
        "log.distances=true",
    ]
    assert start(job_of(*spiked), tmp_path / "run", 1) == 0
    lines = records(tmp_path / "run", "noise_scale")
    assert [line["step"] for line in lines] == list(range(32))
    missing = [line["step"] for line in lines if line["gradient_square"] is None]
    assert len(missing) == (policy == "skip")  # a step that is taken again has been measured
    distances = [line["step"] + 1 for line in records(tmp_path / "run", "weight_distance")]
    assert distances == [step for step in range(1, 33) if is_on_grid(step)]


def test_a_run_that_grows_by_measurement_keeps_measuring_at_the_same_steps():
    signatures = [
        job_of(*GROWING, f"log.noise_every_steps={every}").resume_signature() for every in (5, 7)
    ]
    assert signatures[0] != signatures[1]
    others = [job_of(f"log.noise_every_steps={every}").resume_signature() for every in (5, 7)]
    assert others[0] == others[1]


def test_a_step_of_one_micro_batch_has_no_noise(tmp_path):
    assert start(job_of("epochs=0.01"), tmp_path / "run", 1) == 0  # 82 samples: 64, then 18
    assert start(job_of("epochs=0.0085"), tmp_path / "short", 1) == 0  # 70: the last step has 6
    assert records(tmp_path / "run", "noise_scale")[-1]["gradient_square"] is not None
    last = records(tmp_path / "short", "noise_scale")[-1]
    assert (last["gradient_square"], last["gradient_variance"]) == (None, None)
    assert last["noise_scale"] == records(tmp_path / "short", "noise_scale")[0]["noise_scale"]


GROWING = ("epochs=2", "lr.base=0.05", "batch={base: 64, micro: 8, "
           "growth: {policy: noise_scale, every_epochs: 0.25, max: 1024}}")  # fmt: skip


def growths(folder):
    lines = read_lines(folder / "decisions.jsonl")
    return [(line["step"], line["global_batch"]) for line in lines if "grew_from" in line]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown") / "run"
    assert start(job_of(*GROWING, "log.noise_every_steps=2"), folder, 1) == 0
    return folder


def test_the_batch_grows_where_the_noise_rises_and_stays_where_it_does_not(grown, tmp_path):
    assert len(growths(grown)) >= 2
    noise = [line["noise_scale"] for line in records(grown, "noise_scale")]
    assert max(filter(None, noise)) > 100 * noise[0]
    # The same job, but hardly moving: far from the minimum the noise scale stays at 1.6
    assert start(job_of(*GROWING, "lr.base=1e-9"), tmp_path / "run", 1) == 0
    assert growths(tmp_path / "run") == []
    assert len(records(tmp_path / "run", "noise_scale")) == 256


@pytest.mark.parametrize(("stop_after", "workers"), [(20, 2), (33, 4), (70, 1)])
def test_a_resumed_run_grows_at_the_same_steps(grown, tmp_path, stop_after, workers):
    job = job_of(*GROWING, "log.noise_every_steps=2")
    assert start(job, tmp_path / "run", workers, stop_after) == 75
    assert start(job, tmp_path / "run", 1) == 0
    assert growths(tmp_path / "run") == growths(grown)
    ends = [
        torch.load(folder / "checkpoints/last.pt", weights_only=True)
        for folder in (tmp_path / "run", grown)
    ]
    if workers == 1:
        assert same(*ends)


def test_measuring_changes_no_weight(tmp_path):
    log = "log={layers_every_steps: 1, noise_every_steps: 1, distances: true}"
    ends = []
    for name, changes in (("plain", ["log={}"]), ("measured", [log])):
        changes = ["data.name=digits", "model.name=convnet", "loss={}", "epochs=1", *changes]
        optimizer = ["optimizer={name: lars, weight_decay: 1e-4}", "lr.base=1", "precision=fp32"]
        assert start(job_of(*changes, *optimizer), tmp_path / name, 2) == 0
        ends.append(torch.load(tmp_path / name / "checkpoints/last.pt", weights_only=True))
    assert same(*ends)


def test_norms_and_ratios_of_layers_are_those_of_the_update():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4, dtype=torch.float64)
    groups = [
        {"params": [model.weight], "adapt": True, "weight_decay": 1e-2},
        {"params": [model.bias], "adapt": False, "weight_decay": 0.0},
    ]
    optimizer = LARS(groups, lr=2.0, momentum=0.9, trust_coefficient=0.01)
    names = {weight: name for name, weight in model.named_parameters()}
    statistics = LayerStatistics(names, optimizer)
    for _ in range(3):
        before = {name: weight.detach().clone() for weight, name in names.items()}
        for weight in names:
            weight.grad = torch.randn_like(weight)
        gradients = {name: weight.grad.norm().item() for weight, name in names.items()}
        norms = optimizer.measure()
        statistics.before_update(norms)
        optimizer.update(norms, 2.0)
        found = statistics.after_update()
        assert list(found) == ["weight", "bias"]
        for weight, name in names.items():
            size = before[name].norm().item()
            moved = (weight.detach() - before[name]).norm().item()
            assert found[name]["weight_norm"] == pytest.approx(size)
            assert found[name]["gradient_norm"] == pytest.approx(gradients[name])
            assert found[name]["update_ratio"] == pytest.approx(moved / size)
        size = before["weight"].norm().item()
        ratio = 0.01 * size / (gradients["weight"] + 1e-2 * size)
        assert found["weight"]["trust_ratio"] == pytest.approx(ratio)
        assert found["bias"]["trust_ratio"] is None


def test_layers_are_logged_every_so_many_steps(tmp_path):
    assert start(job_of("log.layers_every_steps=10"), tmp_path / "run", 2) == 0
    lines = records(tmp_path / "run", "layers")
    assert [line["step"] for line in lines] == [9, 19, 29]
    assert set(lines[0]["layers"]) == {"first", "second"}
    assert lines[0]["layers"]["first"]["trust_ratio"] is None


def test_the_grid_is_logarithmic():
    steps = [number for number in range(1, 100_001) if is_on_grid(number)]
    assert steps[:11] == list(range(1, 12))
    later = [number for number in steps if number > 100]
    assert all(after / before < 1.1 for before, after in itertools.pairwise(later))
    doubled = [number for number in steps if 1000 < number <= 2000]
    assert len(doubled) == 8
    assert steps[-1] > 90_000


DISTANT = ("epochs=0.5", "lr.base=0.05", "log.distances=true")


def test_the_distance_is_that_from_the_first_weights_through_a_resume(tmp_path):
    assert start(job_of(*DISTANT), tmp_path / "whole", 1) == 0
    first = torch.load(tmp_path / "whole" / FILE, weights_only=True)
    assert all(not value.any() for value in first.values())
    lines = records(tmp_path / "whole", "weight_distance")
    assert [line["step"] + 1 for line in lines] == [n for n in range(1, 65) if is_on_grid(n)]
    last = torch.load(tmp_path / "whole/checkpoints/last.pt", weights_only=True)["model"]
    expected = torch.cat([last["first"], last["second"]]).norm().item()
    assert lines[-1]["step"] == 63
    assert lines[-1]["weight_distance"] == pytest.approx(expected)
    assert lines[-1]["distances"]["first"] == pytest.approx(last["first"].norm().item())
    assert start(job_of(*DISTANT), tmp_path / "parts", 2, stop_after=20) == 75
    assert start(job_of(*DISTANT), tmp_path / "parts", 1) == 0
    resumed = records(tmp_path / "parts", "weight_distance")
    assert [line["step"] for line in resumed] == [line["step"] for line in lines]
    for ours, theirs in zip(resumed, lines, strict=True):
        assert ours["weight_distance"] == pytest.approx(theirs["weight_distance"], rel=1e-9)


@pytest.mark.parametrize("content", [None, b"", "other"])
def test_without_the_first_weights_a_resumed_run_goes_on_without_distances(
    tmp_path, content, capfd
):
    assert start(job_of(*DISTANT), tmp_path / "run", 1, stop_after=20) == 75
    if content is None:
        (tmp_path / "run" / FILE).unlink()
    elif content == "other":
        torch.save({"first": torch.zeros(3)}, tmp_path / "run" / FILE)
    else:
        (tmp_path / "run" / FILE).write_bytes(content)
    assert start(job_of(*DISTANT), tmp_path / "run", 1) == 0
    lines = records(tmp_path / "run", "weight_distance")
    assert lines[-1]["step"] < 21
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["batch.micro=64", "batch.growth={policy: noise_scale}"],
            "batch.growth.policy.*set batch.micro to 32 or less",
        ),
        (
            ["batch.micro=auto", "batch.growth={policy: noise_scale}"],
            "set batch.micro to 32 or less",
        ),
        (
            ["log={}", "batch.growth={policy: noise_scale}"],
            "batch.growth.policy.*is measured where",
        ),
        (["log.noise_every_steps=0"], "log.noise_every_steps"),
        (["log.layers_every_steps=x"], "log.layers_every_steps"),
        (["batch.growth={policy: noise_scale, factor: 1}"], "factor must be a number above 1"),
        (["batch.growth={policy: noise_scale, threshold: 0}"], "threshold must be above 0"),
        (["batch.growth={policy: noise_scale, max: 8}"], "growth.max is 8, below"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(changes, words):
    with pytest.raises(JobError, match=words):
        job_of(*changes)


def test_the_policy_grows_by_its_factor_up_to_its_limit():
    growth = NoiseScaleGrowth(every_epochs=0.5, factor=3.0, threshold=1.5, max=200)
    for scale, after in ((None, 64), (95.9, 64), (96.0, 192), (1e9, 192)):
        measured = {} if scale is None else {"noise_scale": scale}
        assert growth.next_batch(64, 64, 1.0, measured) == after
    assert growth.next_batch(64, 192, 1.0, {"noise_scale": 1e9}) == 200
    assert [growth.acts_between(*pair) for pair in ((0.4, 0.5), (0.5, 0.9))] == [True, False]
