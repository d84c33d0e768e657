"""What the engine asks of every optimizer: measure the gradients, judge them, update."""

import copy
import math

import pytest
import torch
from support.optimizers import LarsInLists

from hvdlarge.optim.interface import GradientNorms
from hvdlarge.optim.lamb import LAMB
from hvdlarge.optim.lars import LARS
from hvdlarge.optim.param_groups import parameter_groups, set_lr
from hvdlarge.optim.torch_optimizers import SGD, Adagrad, Adam, AdamW, RMSprop

KINDS = [LARS, LarsInLists, LAMB, SGD, Adam, AdamW, Adagrad, RMSprop]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 3)
        self.second = torch.nn.Linear(3, 2)
        self.unused = torch.nn.Linear(2, 2)

    def set_gradients(self, seed):
        torch.manual_seed(seed)
        for weight in (*self.first.parameters(), *self.second.parameters()):
            weight.grad = torch.randn_like(weight)


def built(kind):
    model = Net()
    groups = parameter_groups(model, weight_decay=0.01, excluded_lr_factor=0.5)
    return model, kind(groups, lr=7.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_of_a_groups_lr_holds_in_a_loop_of_ones_own_too(kind):
    _, optimizer = built(kind)
    assert [group["lr"] for group in optimizer.param_groups] == [7.0, 3.5]
    groups = [dict(group) for group in optimizer.param_groups]
    assert [group["lr"] for group in kind(groups, lr=1.0).param_groups] == [7.0, 3.5]
    (model, engines), (same, own) = built(kind), built(kind)
    for net in (model, same):
        net.set_gradients(1)
    engines.update(engines.measure(), 7.0)
    own.step()
    for weight, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("kind", KINDS)
def test_measure_gives_the_norm_of_each_gradient_that_is_not_zero(kind):
    model, optimizer = built(kind)
    model.set_gradients(1)
    model.second.bias.grad.zero_()
    norms = optimizer.measure()
    moving = [model.first.weight, model.first.bias, model.second.weight]
    assert set(norms.gradients) == set(moving)
    for weight in moving:
        assert norms.gradients[weight] == pytest.approx(weight.grad.norm().item(), rel=1e-6)


def test_measure_on_lists_reads_the_norms_of_adapted_weights_along():
    model, optimizer = built(LarsInLists)
    model.set_gradients(1)
    norms = optimizer.measure()
    assert set(norms.weights) == {model.first.weight, model.second.weight}
    for weight, size in norms.weights.items():
        assert size == pytest.approx(weight.norm().item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_update_is_a_step_with_the_rates_of_the_groups(kind):
    (model, optimizer), (twin, other) = built(kind), built(kind)
    before = copy.deepcopy(model.state_dict())
    for step, lr in enumerate((0.1, 0.02, 0.3)):
        for net in (model, twin):
            net.set_gradients(step)
            net.second.bias.grad = torch.zeros(2)
        optimizer.update(optimizer.measure(), lr)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, 0.5 * lr]
        set_lr(other, lr)
        other.step()
    for (name, weight), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, expected)
        still = name == "second.bias" or name.startswith("unused")
        assert torch.equal(weight, before[name]) == still
        assert not (still and optimizer.state.get(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_update_of_plain_parameters_uses_the_rate_itself(kind):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight])
    weight.grad = torch.ones(3)
    optimizer.update(optimizer.measure(), 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_measure_moves_nothing_and_sets_no_rate(kind):
    model, optimizer = built(kind)
    model.set_gradients(1)
    before = copy.deepcopy(model.state_dict())
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.measure()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == rates


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients_are_refused(kind):
    table = torch.nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = kind(table.parameters())
    with pytest.raises(ValueError, match="sparse"):
        optimizer.measure()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_is_a_backward_pass_before_the_step(kind):
    """As Lightning passes it: it computes the gradients, and its loss is what a step returns."""
    (model, optimizer), (twin, plain) = built(kind), built(kind)
    inputs = torch.ones(5, 4)

    def loss_of(net):
        return net.second(net.first(inputs)).square().mean()

    for _ in range(2):

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        plain.zero_grad()
        expected = loss_of(twin)
        expected.backward()
        assert plain.step() is None
        assert torch.equal(optimizer.step(closure), expected)
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("kind", [LARS, LarsInLists])
def test_clipped_scales_gradients_and_their_norms_and_keeps_those_of_weights(kind):
    model, optimizer = built(kind)
    model.set_gradients(1)
    norms = optimizer.measure()
    clipped = norms.clipped(0.5)
    assert math.hypot(*clipped.gradients.values()) == pytest.approx(0.5, rel=1e-12)
    assert optimizer.measure().gradients == pytest.approx(clipped.gradients, rel=1e-6)
    assert clipped.weights == norms.weights
    assert clipped.clipped(None).gradients == clipped.gradients


def test_not_finite_names_every_such_gradient():
    norms = GradientNorms({"a": 1.0, "b": math.nan, "c": math.inf, "d": 0.5})
    names = {key: f"net.{key}" for key in "abcd"}
    assert norms.not_finite(names) == ["net.b", "net.c"]


@pytest.mark.parametrize("kind", [LARS, LarsInLists, LAMB])
def test_trust_ratios_are_those_of_the_last_step_alone(kind):
    model, optimizer = built(kind)
    assert copy.deepcopy(optimizer).trust_ratio_of(model.first.weight) is None
    model.set_gradients(1)
    optimizer.update(optimizer.measure(), 0.1)
    assert optimizer.trust_ratio_of(model.first.weight) > 0
    assert optimizer.trust_ratio_of(model.first.bias) == 1
    model.first.weight.grad = None
    optimizer.update(optimizer.measure(), 0.1)
    assert optimizer.trust_ratio_of(model.first.weight) is None
    assert kind([torch.nn.Parameter(torch.ones(1))])._ratios == {}
