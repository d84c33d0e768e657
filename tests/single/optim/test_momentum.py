"""The momentum update: its fast forms against the plain one, and that against float64 in numpy."""

import numpy as np
import pytest
import torch

from hvdlarge.optim.momentum import (
    MomentumStep,
    _fused_works,
    list_update,
    momentum_update,
    reference_update,
)


@pytest.mark.parametrize("lr_in_momentum", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [1.0, 0.3, 1e-3, 1e-9, 0.0])
def test_the_fast_update_is_the_reference(lr_in_momentum, dtype, ratio):
    assert _fused_works()  # else the reference would be compared with itself
    torch.manual_seed(1)
    fast = [torch.randn(33, 77, dtype=dtype) for _ in range(3)]
    slow = [tensor.clone() for tensor in fast]
    for lr in (0.1, 3.2, 25.0, 0.0):
        move = MomentumStep(
            lr, ratio, momentum=0.9, weight_decay=0.01, lr_in_momentum=lr_in_momentum
        )
        momentum_update(*([tensor] for tensor in fast), move)
        reference_update(*slow, move)
    for ours, theirs in zip(fast, slow, strict=True):
        bound = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 0.0)  # 16 bits: no fast one
        assert (ours - theirs).norm() <= bound * theirs.norm()


def test_tensors_of_another_layout_take_the_reference():
    weight = torch.randn(6, 5).T
    grad, velocity, ours = torch.randn(5, 6), torch.zeros(5, 6), weight.clone()
    momentum_update(
        [weight],
        [grad],
        [velocity],
        MomentumStep(lr=0.1, ratio=0.5, momentum=0.9, weight_decay=0.0),
    )
    assert torch.allclose(weight, ours - 0.05 * grad)


SHAPES = [(1,), (33, 77), (4, 3, 3, 3), (0,), ()]
RATIOS = [0.3, 1.0, 1e-3, 1e-6, 0.0]
EPSILONS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # fmt: skip


def by_numpy(w, g, v, lr, ratio, momentum, weight_decay, lr_in_momentum, nesterov):
    """The formula, written down from the docstring and from nothing else."""
    u = ratio * (g + weight_decay * w)
    inside, outside = (lr, 1.0) if lr_in_momentum else (1.0, lr)
    v = momentum * v + inside * u
    return w - outside * (momentum * v + inside * u if nesterov else v), v


@pytest.mark.parametrize("lr_in_momentum", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("dtype", EPSILONS)
def test_the_update_of_lists_is_the_reference_and_that_of_numpy(
    lr_in_momentum, nesterov, momentum, weight_decay, dtype
):
    options = {
        "momentum": momentum,
        "weight_decay": weight_decay,
        "lr_in_momentum": lr_in_momentum,
        "nesterov": nesterov,
    }
    torch.manual_seed(1)
    start = [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(2)]
    start.append([torch.zeros_like(weight) for weight in start[0]])
    lists, single = ([[tensor.clone() for tensor in row] for row in start] for _ in range(2))
    exact = [[tensor.double().numpy() for tensor in row] for row in start]
    size = [float(np.linalg.norm(weight)) for weight in exact[0]]  # the longest so far
    for lr in (0.1, 3.2, 0.0, 25.0):
        moves = [MomentumStep(lr, ratio, **options) for ratio in RATIOS]
        list_update(*lists, moves[0], RATIOS)
        for tensors in zip(*single, moves, strict=True):
            reference_update(*tensors)
        for place, (w, g, v) in enumerate(zip(*exact, strict=True)):
            w, v = by_numpy(w, g, v, lr, RATIOS[place], **options)
            exact[0][place], exact[2][place] = w, v
            size[place] = max(size[place], np.linalg.norm(w), np.linalg.norm(v))
    for before, after in zip(start[1], lists[1], strict=True):
        assert torch.equal(before, after)  # gradients stay as they are
    for row in (0, 2):
        for place, ours in enumerate(lists[row]):
            bound = 8 * EPSILONS[dtype] * size[place]
            assert (ours - single[row][place]).double().norm() <= bound
            assert np.linalg.norm(ours.double().numpy() - exact[row][place]) <= bound


def test_lists_of_unlike_types_and_layouts_take_the_same_update():
    torch.manual_seed(2)
    weights = [torch.randn(6, 5).T, torch.randn(7, dtype=torch.float64), torch.randn(2, 3, 4, 4)]
    weights[2] = weights[2].to(memory_format=torch.channels_last)
    grads = [torch.randn(5, 6), torch.randn(7, dtype=torch.float64), torch.randn(2, 3, 4, 4)]
    velocities = [torch.zeros_like(weight) for weight in weights]
    expected = [weight.clone() for weight in weights]
    move, ratios = MomentumStep(0.1, 1.0, momentum=0.9, weight_decay=0.01), (0.5, 2.0, 1.0)
    list_update(weights, grads, velocities, move, ratios)
    for weight, grad, before, ratio in zip(weights, grads, expected, ratios, strict=True):
        torch.testing.assert_close(weight, before - 0.1 * ratio * (grad + 0.01 * before))
