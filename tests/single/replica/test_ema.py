"""The average of the weights: its formula, and what it is in the life of a run."""

import json
from pathlib import Path

import pytest
import torch
from support.comparing import distance, read_lines
from torch import nn

import hvdlarge
from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job
from hvdlarge.optim.precision import Precision
from hvdlarge.replica.ema import WeightAverage
from hvdlarge.resilience.nonfinite import RollBack, RollbackPolicy
from hvdlarge.training import build, loop

JOB = {
    "name": "averaged",
    "epochs": 2,
    "precision": "fp64",
    "data": {"name": "parallel.own_parts:plain"},
    "model": {"name": "parallel.own_parts:Normed"},
    "batch": {"base": 8, "micro": 4},
    "lr": {"base": 0.5},
    "ema": {"half_life_samples": 50},
}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.last.bias.requires_grad_(False)


def averaged(model, half_life=100.0):
    names = {w: name for name, w in model.named_parameters() if w.requires_grad}
    return WeightAverage(names, half_life)


@torch.no_grad()
def move(model):
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight))


def test_the_formula_over_steps_of_many_sizes():
    model = nn.Linear(4, 3).double()
    average = averaged(model, half_life=70)
    reference = model.weight.detach().clone()
    for batch in (8, 8, 32, 32, 128, 500, 5):
        move(model)
        average.follow(batch)
        d = 0.5 ** (batch / 70)
        reference = d * reference + (1 - d) * model.weight.detach()
    found = average.named_tensors()["weight, ema"]
    assert torch.allclose(found, reference, rtol=1e-14, atol=1e-14)


def test_one_large_step_is_as_many_small_ones_with_the_same_weights():
    """The scaling rule of Busbridge et al.: a batch of k times the size decays by d^k."""
    model = nn.Linear(4, 3).double()
    small, large = averaged(model), averaged(model)
    move(model)
    for _ in range(16):
        small.follow(32)
    large.follow(16 * 32)
    one, other = (average.named_tensors()["weight, ema"] for average in (small, large))
    assert torch.allclose(one, other, rtol=1e-13, atol=1e-14)


def test_a_half_life_much_longer_than_a_step_still_moves_the_average():
    model = nn.Linear(4, 3)
    average = averaged(model, half_life=1e9)
    before = average.named_tensors()["weight, ema"].clone()
    with torch.no_grad():
        model.weight.add_(1e6)
    average.follow(1)
    moved = average.named_tensors()["weight, ema"] - before
    assert torch.allclose(moved, torch.full_like(moved, 1e6 * 0.693147e-9), rtol=1e-3)


def test_averages_in_use_give_way_to_the_same_bits():
    model = Tied()
    average = averaged(model)
    move(model)
    average.follow(30)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    averages = {name: value.clone() for name, value in average.named_tensors().items()}
    places = [weight.data_ptr() for weight in model.parameters()]
    with average.in_use():
        assert torch.equal(model.first.weight, averages["first.weight, ema"])
        assert [weight.data_ptr() for weight in model.parameters()] == places
    with pytest.raises(ZeroDivisionError), average.in_use():
        raise ZeroDivisionError
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(v, averages[name]) for name, v in average.named_tensors().items())


def test_the_saved_average_loads_into_the_plain_model():
    model, other = Tied(), Tied()
    average = averaged(model)
    move(model)
    model.norm.running_mean.fill_(3)
    average.follow(30)
    copied = {name: value.clone() for name, value in model.state_dict().items()}
    state = average.state_of(model, copied)
    other.load_state_dict(state)
    assert torch.equal(other.last.weight, average.named_tensors()["first.weight, ema"])
    assert torch.equal(other.last.bias, model.last.bias)  # frozen
    assert (other.norm.running_mean == 3).all()  # of the current weights
    again = averaged(Tied())
    again.load(state)
    assert torch.equal(again.named_tensors()["norm.bias, ema"], state["norm.bias"])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Trains the job with changes; what its last checkpoint holds."""
    monkeypatch.chdir(tmp_path)

    def train(name, *changes, job=JOB):
        summary = hvdlarge.run_job(job | {"name": name}, *changes)
        last = torch.load(f"runs/{name}/checkpoints/last.pt", weights_only=True)
        return summary, last

    return train


def test_the_average_is_evaluated_and_may_decide_on_the_best(runs):
    summary, last = runs("run", "checkpoint.best=ema_test_loss")
    lines = read_lines(Path("runs/run/metrics.jsonl"))
    evaluated = [line for line in lines if "test_loss" in line]
    assert len(evaluated) == 2
    assert all({"ema_test_loss", "ema_accuracy"} <= line.keys() for line in evaluated)
    assert summary["ema_test_loss"] == evaluated[-1]["ema_test_loss"] != summary["test_loss"]
    assert last["state"]["best"]["by"] == "ema_test_loss"
    assert -last["state"]["best"]["value"] == min(line["ema_test_loss"] for line in evaluated)


def test_the_average_leaves_the_weights_alone(runs):
    with_average = runs("run")[1]
    plain = {key: value for key, value in JOB.items() if key != "ema"}
    without = runs("plain", job=plain)[1]
    assert "ema" not in without
    assert "ema_loss" not in without
    without |= {"ema": with_average["ema"]}
    assert distance(with_average, without) == 0.0


def test_skipped_steps_do_not_count(runs, monkeypatch):
    followed, plain = [], WeightAverage.follow

    def follow(average, global_batch):
        followed.append(global_batch)
        plain(average, global_batch)

    monkeypatch.setattr(WeightAverage, "follow", follow)
    monkeypatch.setattr("parallel.own_parts.plain", with_a_bad_sample)
    summary, _ = runs("run", "on_nonfinite={policy: skip}", "model.name=parallel.own_parts:Net")
    assert summary["skipped_steps"] == 2  # once in each epoch
    assert len(followed) == summary["steps"] - 2


def with_a_bad_sample():
    from parallel import own_parts

    train, test = (
        own_parts.InMemory(*own_parts.tensors()),
        own_parts.InMemory(*own_parts.tensors(20, 1)),
    )
    train.inputs[5] = float("inf")
    return train, test


def test_a_rollback_brings_the_averages_back(runs, monkeypatch):
    changes = ["on_nonfinite={policy: rollback, lr_factor: 1}", "checkpoint.every_steps=4"]
    undisturbed = runs("whole", *changes)[1]
    plain, raised = RollbackPolicy.check, []

    def check(policy, decision, replica, norms):
        if decision.step == 6 and not raised:
            raised.append(decision.step)
            raise RollBack("as the test wants it", 1.0)
        return plain(policy, decision, replica, norms)

    monkeypatch.setattr(RollbackPolicy, "check", check)
    summary, rolled_back = runs("back", *changes)
    assert (raised, summary["rollbacks"]) == ([6], 1)
    assert distance(rolled_back, undisturbed) == 0.0


def test_averages_are_compared_across_ranks():
    job = parse_job(json.dumps(JOB), "job")
    precision = Precision("fp64", torch.device("cpu"))
    objective, optimizer, _ = build.build_learning(job, precision)
    components = build.Components(objective, None, None, {}, None, optimizer)
    replica = build.build_replica(job, components, SoloChannel(), SoloCollectives())
    before = loop.digests(replica)
    assert before.keys() >= {"first.weight, ema", "norm.bias, ema"}
    replica.ema.named_tensors()["first.weight, ema"][0, 0] += 1
    after = loop.digests(replica)
    assert {name for name in before if before[name] != after[name]} == {"first.weight, ema"}


def test_a_half_life_that_the_run_is_too_short_for_is_told(capsys):
    from hvdlarge.plan import main

    assert main(["digits", "ema.half_life_samples=43110"]) == 0
    assert "50% of the average at its end are the first weights" in capsys.readouterr().out
    assert main(["digits", "ema.half_life_samples=1000"]) == 0
    assert "average" not in capsys.readouterr().out
