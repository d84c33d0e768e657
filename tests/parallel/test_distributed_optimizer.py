"""Horovod in front of LARS: the mean gradient first, the trust ratio after it, on any split of the micro-batches."""

import copy

import numpy as np
import pytest
import torch

from hvdlarge.comm.solo import SoloOptimizer
from hvdlarge.optim.build import build_optimizer
from hvdlarge.optim.lars import LARS
from hvdlarge.optim.param_groups import named_parameters, parameter_groups
from hvdlarge.optim.sections import Lars, OptimizerSection, Sgd


def wrapped(model, tensors, **options):
    groups = parameter_groups(model, weight_decay=0.0005)
    optimizer = LARS(groups, **{"momentum": 0.9, "trust_coefficient": 0.001, **options})
    return tensors.distributed_optimizer(optimizer, named_parameters(groups))


class Vector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))


def test_the_ratio_is_that_of_the_mean_gradient(control, tensors):
    """Ranks with gradients (1, 0) and (0, 1) on w = (3, 4): the mean (1/2, 1/2) has norm √½; their own norms are 1."""
    model = Vector()
    update = wrapped(model, tensors)
    own = torch.zeros(2, dtype=torch.float64)
    for number in range(2):
        own[number] = float(number % control.size == control.rank)
    update.zero_grad(range(1), 1)
    ((model.weight * own).sum() / 2).backward()
    update.synchronize()
    assert model.weight.grad.tolist() == [0.5, 0.5]
    update.apply(update.optimizer.measure(), 2.0)
    ratio = 0.001 * 5 / (np.sqrt(0.5) + 0.0005 * 5)
    assert update.optimizer.trust_ratio_of(model.weight) == pytest.approx(ratio, rel=1e-12)
    local = 0.001 * 5 / (1 + 0.0005 * 5)
    assert abs(ratio - local) > 0.1 * ratio  # the mistake would be seen
    expected = np.array([3.0, 4.0]) - 2.0 * ratio * (
        np.array([0.5, 0.5]) + 0.0005 * np.array([3.0, 4.0])
    )
    assert model.weight.detach().numpy() == pytest.approx(expected, rel=1e-12)
    assert len(set(control.allgather(model.weight.detach().numpy().tobytes()))) == 1


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()


@pytest.mark.parametrize("deal", ["even", "rank 0 idle", "only rank 0", "uneven"])
def test_any_split_of_growing_steps_moves_the_weights_alike(control, tensors, deal):
    rank, size = control.rank, control.size
    model, alone = net(), net()
    update = wrapped(model, tensors)
    solo = SoloOptimizer(
        LARS(parameter_groups(alone, weight_decay=0.0005), momentum=0.9, trust_coefficient=0.001)
    )
    random = np.random.default_rng(3)
    for step, micro_batches in enumerate([2, 3, 6, 6, 12, 1]):
        data = torch.from_numpy(random.normal(size=(micro_batches, 4, 6)))
        owners = {
            "even": [number * size // micro_batches for number in range(micro_batches)],
            "rank 0 idle": [
                min(size - 1, 1 + number % max(1, size - 1)) for number in range(micro_batches)
            ],
            "only rank 0": [0] * micro_batches,
            "uneven": [min(number, size - 1) for number in range(micro_batches)],
        }[deal]
        mine = [data[number] for number, owner in enumerate(owners) if owner == rank]
        for network, updating, share in ((model, update, mine), (alone, solo, list(data))):
            updating.zero_grad(range(len(share)), micro_batches)
            for batch in share:
                (network(batch).square().mean() / micro_batches).backward()
            updating.synchronize()
            updating.apply(updating.optimizer.measure(), 3.0 * (step + 1))
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13), name
    moved = max(
        (ours - start).abs().max().item()
        for ours, start in zip(model.parameters(), net().parameters(), strict=True)
    )
    assert moved > 1e-3


class OwnRule(OptimizerSection):
    """A section that updates each tensor itself: momentum and decay."""

    momentum: float

    def update_tensor(self, weight, grad, state, group):
        if not state:
            state["velocity"] = torch.zeros_like(weight)
        step = state["velocity"].mul_(self.momentum).add_(grad)
        weight.sub_(step + group["weight_decay"] * weight, alpha=group["lr"])


@pytest.mark.parametrize("section", [Lars, Sgd, OwnRule])
def test_a_parameter_without_gradient_is_left_alone_on_every_world(tensors, section):
    class TwoHeads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used = torch.nn.Linear(3, 2)
            self.unused = torch.nn.Linear(3, 2)

    model = TwoHeads().double()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, section(weight_decay=0.1, momentum=0.9))
    update = tensors.distributed_optimizer(optimizer, named_parameters(optimizer.param_groups))
    for _ in range(3):
        update.zero_grad(range(1), 1)
        model.used(torch.ones(4, 3, dtype=torch.float64)).sum().backward()
        update.synchronize()
        update.apply(update.optimizer.measure(), 0.5)
    for part, value in model.state_dict().items():
        assert torch.equal(before[part], value) == part.startswith("unused"), part


def test_options_survive_the_wrapping(tensors):
    model = net()
    update = wrapped(model, tensors, momentum=0.7, trust_coefficient=0.02)
    adapted, others = update.optimizer.param_groups
    assert (adapted["momentum"], adapted["trust_coefficient"], adapted["weight_decay"]) == (
        0.7,
        0.02,
        0.0005,
    )
    assert (others["adapt"], others["weight_decay"], others["lr_factor"]) == (False, 0.0, 1.0)
    assert adapted["names"] == ["0.weight", "2.weight"]


def test_an_optimizer_with_state_is_refused(tensors):
    model = net()
    optimizer = LARS(parameter_groups(model, 0.0))
    model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="state"):
        tensors.distributed_optimizer(optimizer, list(model.named_parameters()))
