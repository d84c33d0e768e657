"""Optimizers of the user's own: any of torch's works unchanged, and what cannot keep the laws is refused with the reason."""

import collections
import copy
import inspect
import random
import threading

import numpy as np
import pytest
import torch

from hvdlarge.optim.build import build_optimizer
from hvdlarge.optim.interface import MeanGradientOptimizer
from hvdlarge.optim.lamb import LAMB
from hvdlarge.optim.own import OptimizerRefused
from hvdlarge.optim.sections import OwnOptimizer

KINDS = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]  # fmt: skip


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).double()


def built(kind, model, **options):
    section = OwnOptimizer(name="my_parts:Kind", exclude_bias_and_norm=False, **options)
    return build_optimizer(model, section, kind)


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


@pytest.mark.parametrize("name", KINDS)
def test_torchs_own_move_the_weights_as_they_do_by_themselves(name):
    kind, model = getattr(torch.optim, name), net()
    twin = copy.deepcopy(model)
    decay = 0.0 if "weight_decay" not in inspect.signature(kind).parameters else 0.01
    ours = built(kind, model, weight_decay=decay)
    theirs = kind(twin.parameters(), **({"weight_decay": decay} if decay else {}), lr=0.1)
    for step, lr in enumerate((0.1, 0.02, 0.3)):
        for each in (model, twin):
            set_gradients(each, step)
        ours.update(ours.measure(), lr)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, other)
    assert type(ours).__name__ == name


@pytest.mark.parametrize("name", KINDS)
def test_a_tensor_with_a_zero_gradient_is_left_alone(name):
    model = net()
    optimizer = built(getattr(torch.optim, name), model)
    for step in range(3):
        set_gradients(model, step)
        if step != 1:
            model[0].bias.grad.zero_()
        before = model[0].bias.detach().clone(), copy.deepcopy(optimizer.state.get(model[0].bias))
        optimizer.update(optimizer.measure(), 0.1)
        moved = not torch.equal(model[0].bias, before[0])
        assert moved == (step == 1)
        if step == 0:
            assert not optimizer.state.get(model[0].bias)


def test_it_can_be_re_created_from_its_groups_alone():
    class NeedsArguments(torch.optim.SGD):
        def __init__(self, params, lr, momentum, *, strength):
            super().__init__(params, lr, momentum)
            self.strength = strength

    first = built(NeedsArguments, net(), args={"momentum": 0.5, "strength": 3})
    again = type(first)(first.param_groups)
    assert again.strength == 3
    assert again.param_groups[0]["momentum"] == 0.5
    assert isinstance(again, MeanGradientOptimizer)


def test_an_optimizer_that_keeps_the_contract_itself_is_taken_as_it_is():
    model = net()
    optimizer = built(LAMB, model, args={"eps": 1e-3}, weight_decay=0.1)
    set_gradients(model, 1)
    optimizer.update(optimizer.measure(), 0.1)
    assert optimizer.trust_ratio_of(model[0].weight) > 0
    assert optimizer.param_groups[0]["eps"] == 1e-3


def test_trying_out_draws_nothing_from_the_global_generators():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    model = net()
    torch.set_rng_state(states[0])
    built(torch.optim.NAdam, model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


class Plain(torch.optim.Optimizer):
    """Gradient descent, to be broken in one way each."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.steps = 0

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.move(weight, group)

    def move(self, weight, group):
        weight.data.sub_(weight.grad, alpha=group["lr"])


class Counts(Plain):
    def step(self, closure=None):
        super().step()
        self.steps += 1


class CountsInTheGroup(Plain):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["k"] = 0


class HidesMomentum(Plain):
    kept = {}

    def move(self, weight, group):
        before = self.kept.get(weight, 0)
        self.kept[weight] = weight.grad + 0.9 * before
        weight.data.sub_(self.kept[weight], alpha=group["lr"])


class OwnDraws(Plain):
    generator = np.random.default_rng()

    def move(self, weight, group):
        weight.data.sub_(weight.grad * self.generator.normal(), alpha=group["lr"])


class Langevin(Plain):
    def move(self, weight, group):
        weight.data.add_(torch.randn_like(weight), alpha=group["lr"])


class KeepsLists(Plain):
    def move(self, weight, group):
        self.state[weight].setdefault("history", []).append(weight.grad.clone())
        super().move(weight, group)


class KeepsGlobally(Plain):
    def step(self, closure=None):
        super().step()
        self.state["all"]["steps"] = 1


class MovesAlways(Plain):
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.mul_(0.9)


class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        pass


class NoStep(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})


class StartsFromWeights(Plain):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["start"] = weight.detach().clone()


class KeepsDecayToItself(Plain):
    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, lr)
        self.weight_decay = weight_decay


class KeepsASet(Plain):
    """A set, which has no order, and a lock, which cannot be saved."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.seen, self.lock = set(), threading.Lock()

    def step(self, closure=None):
        super().step(closure)
        self.steps = 0
        self.seen.add(len(self.seen))


class KeepsADeque(KeepsASet):
    def step(self, closure=None):
        super().step(closure)
        self.seen = set()
        self.last = getattr(self, "last", collections.deque(maxlen=50))
        self.last.append(1)


class HooksItself(Plain):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.register_step_post_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (torch.nn.Linear, {}, "not a subclass of torch.optim.Optimizer"),
        (NoStep, {}, "has no step"),
        (torch.optim.LBFGS, {}, "needs 'closure'"),
        (NoRate, {}, "no 'lr' among the defaults"),
        (Counts, {}, "a step changes its attribute 'steps'"),
        (CountsInTheGroup, {}, "a step changes the parameter groups' 'k'"),
        (KeepsASet, {}, "a step changes its attribute 'seen'"),
        (KeepsADeque, {}, "a step changes its attribute 'last'"),
        (HidesMomentum, {}, "the same step from the same saved state gives a different result"),
        (OwnDraws, {}, "draws from a random generator of its own"),
        (Langevin, {}, "draws random numbers"),
        (KeepsLists, {}, "self.state has 'history', a list"),
        (KeepsGlobally, {}, "self.state has the key 'all', which is no parameter"),
        (MovesAlways, {}, "moves a parameter whose .grad is None"),
        (StartsFromWeights, {}, "depends on the weights"),
        (HooksItself, {}, "registers hooks on its own step"),
        (KeepsDecayToItself, {"weight_decay": 0.1}, "no 'weight_decay' among the defaults"),
        (Plain, {"weight_decay": 0.1}, "weight_decay is 0.1, but the class takes no weight_decay"),
        (Plain, {"args": {"lr": 0.1}}, "args.lr: the learning rate is set in each step"),
        (torch.optim.Adam, {"args": {"weight_decay": 1}}, "args.weight_decay: give optimizer.weight"),
        (torch.optim.Adam, {"args": {"beta": 1}}, r"the arguments \(beta\) do not fit"),
    ],
)  # fmt: skip
def test_what_cannot_keep_the_laws_is_refused(kind, options, reason):
    with pytest.raises(OptimizerRefused, match=reason):
        built(kind, net(), **options)
