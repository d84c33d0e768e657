"""An optimizer whose section holds the formula for one tensor."""

from typing import Literal

import torch

from hvdlarge.optim.build import build_optimizer
from hvdlarge.optim.param_groups import set_lr
from hvdlarge.optim.per_tensor import PerTensor
from hvdlarge.optim.sections import Fraction, OptimizerSection


class Heavy(OptimizerSection):
    """Polyak's momentum: v ← m·v + g + β·w; w ← w − lr·v."""

    name: Literal["heavy"] = "heavy"
    momentum: Fraction = 0.9

    def update_tensor(self, weight, grad, state, group):
        if not state:
            state["velocity"] = torch.zeros_like(weight)
        step = state["velocity"].mul_(self.momentum)
        step.add_(grad).add_(weight, alpha=group["weight_decay"])
        weight.sub_(step, alpha=group["lr"])


def test_a_rule_gives_what_torchs_optimizer_of_the_same_formula_gives():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 5).double()
    twin = torch.nn.Linear(3, 5).double()
    twin.load_state_dict(model.state_dict())
    section = Heavy(momentum=0.8, weight_decay=0.1, excluded_lr_factor=0.5)
    ours = build_optimizer(model, section)
    theirs = torch.optim.SGD([{"params": [twin.weight], "weight_decay": 0.1},
                              {"params": [twin.bias]}], lr=1, momentum=0.8)  # fmt: skip
    for step in range(6):
        lr = [0.1, 0.4][step % 2]
        set_lr(ours, lr)
        theirs.param_groups[0]["lr"], theirs.param_groups[1]["lr"] = lr, lr * 0.5
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        ours.step()
        theirs.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-13, atol=0)


def test_the_groups_carry_all_that_horovod_re_creates_the_class_from():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), Heavy(momentum=0.7))
    assert isinstance(optimizer, PerTensor)
    assert type(optimizer).__name__ == "Heavy"
    again = type(optimizer)(optimizer.param_groups)
    assert [group["rule"].momentum for group in again.param_groups] == [0.7, 0.7]
    assert again.param_groups[0]["momentum"] == 0.7


def test_a_tensor_whose_gradient_is_zero_is_left_alone():
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, Heavy(weight_decay=0.1))
    before = model.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.bias.grad += 1
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert list(optimizer.state) == [model.bias]


def test_a_closure_is_called_first():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), Heavy())
    assert optimizer.step(lambda: 0.25) == 0.25
