"""LARS and LAMB as other projects have them: each preset follows the peer that it names, step by step, in float64.

    make test-peers      installs the peers into a folder of their own, .peers

Every trajectory has 40 steps with a rate that jumps up and down. Where a peer departs from its own paper, or from our rules, a test
shows by how much, and says why.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from hvdlarge.optim.lamb import LAMB
from hvdlarge.optim.lars import LARS
from hvdlarge.optim.presets import PRESETS

SHAPES = [(64, 32), (16, 3, 3, 3), (10, 64), (1, 5)]
RATES = [0.5] * 10 + [4.0] * 10 + [32.0] * 5 + [0.02] * 15
MOMENTUM, DECAY, TRUST = 0.9, 2.0**-11, 2.0**-10  # exact in float32, in which some peers keep them


@pytest.fixture
def start():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


@pytest.fixture
def gradients():
    generator = torch.Generator().manual_seed(8)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for _ in RATES
    ]


def by_torch(start, gradients, build, rates=RATES):
    """The trajectory of a torch optimizer: the weights after each step."""
    weights = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    optimizer = build(weights)
    found = []
    for lr, step in zip(rates, gradients, strict=True):
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        found.append([weight.detach().clone() for weight in weights])
    assert all(torch.isfinite(tensor).all() for tensor in found[-1])
    assert all(
        (tensor - first).norm() > 1e-3 * first.norm()
        for tensor, first in zip(found[-1], start, strict=True)
    )
    return found


def ours(start, gradients, preset, **options):
    chosen = (
        PRESETS[preset]
        | {"trust_coefficient": TRUST, "momentum": MOMENTUM, "weight_decay": DECAY}
        | options
    )
    return by_torch(start, gradients, lambda weights: LARS(weights, **chosen))


def away(one, other):
    """The largest relative distance of any tensor in any step."""
    return max(
        ((a - b).norm() / b.norm()).item()
        for step, theirs in zip(one, other, strict=True)
        for a, b in zip(step, theirs, strict=True)
    )


# --- optax


def by_optax(start, gradients, build, rates=RATES):
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    jax.config.update("jax_enable_x64", True)
    lr = 0.0
    optimizer = optax.inject_hyperparams(build)(learning_rate=rates[0])
    weights = [jax.numpy.asarray(tensor.numpy()) for tensor in start]
    state = optimizer.init(weights)
    found = []
    for lr, step in zip(rates, gradients, strict=True):
        state.hyperparams["learning_rate"] = jax.numpy.asarray(lr, dtype=jax.numpy.float64)
        updates, state = optimizer.update(
            [jax.numpy.asarray(gradient.numpy()) for gradient in step], state, weights
        )
        weights = optax.apply_updates(weights, updates)
        found.append([torch.from_numpy(np.array(weight)) for weight in weights])
    assert found[-1][0].dtype == torch.float64
    return found


@pytest.mark.parametrize("nesterov", [False, True])
def test_optax_lars_is_the_preset_optax(start, gradients, nesterov):
    optax = pytest.importorskip("optax")

    def build(learning_rate):
        return optax.lars(
            learning_rate,
            weight_decay=DECAY,
            trust_coefficient=TRUST,
            momentum=MOMENTUM,
            nesterov=nesterov,
        )

    theirs = by_optax(start, gradients, build)
    assert away(ours(start, gradients, "optax", nesterov=nesterov), theirs) < 1e-12
    # The norm of the sum instead of the sum of the norms: another algorithm.
    assert away(ours(start, gradients, "paper", nesterov=nesterov), theirs) > 1e-6


def test_optax_lamb_is_ours(start, gradients):
    optax = pytest.importorskip("optax")
    rates = [lr / 100 for lr in RATES]
    theirs = by_optax(
        start, gradients, lambda learning_rate: optax.lamb(learning_rate, weight_decay=DECAY), rates
    )
    mine = by_torch(
        start, gradients, lambda weights: LAMB(weights, weight_decay=DECAY, eps=1e-6), rates
    )
    assert away(mine, theirs) < 1e-12


# --- PaddlePaddle


def test_paddle_lars_is_the_preset_paper(start, gradients):
    """And so is the preset mlperf, but for its epsilon: PaddlePaddle was a platform of MLPerf."""
    paddle = pytest.importorskip("paddle")
    from paddle.incubate.optimizer import LarsMomentumOptimizer

    for preset, epsilon in (("paper", 0.0), ("mlperf", 2.0**-23)):
        weights = [paddle.create_parameter(list(tensor.shape), "float64") for tensor in start]
        for weight, tensor in zip(weights, start, strict=True):
            weight.set_value(tensor.numpy())
        optimizer = LarsMomentumOptimizer(
            learning_rate=RATES[0],
            momentum=float(np.float32(MOMENTUM)),
            lars_coeff=TRUST,
            lars_weight_decay=DECAY,
            parameter_list=weights,
            epsilon=epsilon,
        )
        theirs = []
        for lr, step in zip(RATES, gradients, strict=True):
            optimizer.set_lr(lr)
            loss = sum(
                (w * paddle.to_tensor(g.numpy())).sum() for w, g in zip(weights, step, strict=True)
            )
            loss.backward()
            optimizer.minimize(loss)
            optimizer.clear_gradients()
            theirs.append([torch.from_numpy(weight.numpy().copy()) for weight in weights])
        mine = ours(start, gradients, preset, eps=epsilon, momentum=float(np.float32(MOMENTUM)))
        assert away(mine, theirs) < 1e-7  # Paddle keeps the rate in 32 bits
        assert (
            away(ours(start, gradients, "torch", eps=epsilon), theirs) > 1e-3
        )  # the rate outside is another algorithm


# --- pytorch_optimizer


@pytest.mark.parametrize("nesterov", [False, True])
def test_pytorch_optimizer_lars_is_the_preset_torch_without_its_epsilon(start, gradients, nesterov):
    peer = pytest.importorskip("pytorch_optimizer")
    theirs = by_torch(
        start,
        gradients,
        lambda weights: peer.LARS(
            weights,
            weight_decay=DECAY,
            momentum=MOMENTUM,
            trust_coefficient=TRUST,
            nesterov=nesterov,
        ),
    )
    assert away(ours(start, gradients, "torch", eps=0.0, nesterov=nesterov), theirs) < 1e-12
    assert away(ours(start, gradients, "paper", nesterov=nesterov), theirs) > 1e-3


def test_pytorch_optimizer_lamb_departs_from_its_paper(start, gradients):
    """It corrects Adam's bias after the trust ratio, which takes lengths out: its first step is 1 / (1 − β₁) = 10 times too long.
    And it holds the norms of weights at 10: the step of a longer tensor is shorter by that."""
    peer = pytest.importorskip("pytorch_optimizer")
    rates = [1e-3] * len(RATES)
    options = {"weight_decay": DECAY, "weight_decouple": False, "max_grad_norm": 0.0}
    theirs = by_torch(start, gradients, lambda weights: peer.Lamb(weights, **options), rates)
    mine = by_torch(start, gradients, lambda weights: LAMB(weights, weight_decay=DECAY), rates)
    assert start[0].norm() > 10 > start[3].norm()
    short, long = (
        (mine[0][place] - start[place]).norm() / (theirs[0][place] - start[place]).norm()
        for place in (3, 0)
    )
    assert short.item() == pytest.approx(0.1, rel=1e-3)
    assert long.item() == pytest.approx(0.1 * start[0].norm().item() / 10, rel=1e-3)


# --- timm


def timm_lars():
    """Its room of optimizers alone, under another name; the whole package wants torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is not installed")
    room = types.ModuleType("timm_optim")
    room.__path__ = [str(Path(found.origin).parent / "optim")]
    sys.modules["timm_optim"] = room
    return importlib.import_module("timm_optim.lars").Lars


@pytest.mark.parametrize("nesterov", [False, True])
def test_timm_lars_is_the_preset_torch(start, gradients, nesterov):
    peer = timm_lars()
    theirs = by_torch(
        start,
        gradients,
        lambda weights: peer(
            weights, momentum=MOMENTUM, weight_decay=DECAY, trust_coeff=TRUST, nesterov=nesterov
        ),
    )
    assert away(ours(start, gradients, "torch", nesterov=nesterov), theirs) < 1e-12


def test_timm_larc_is_the_preset_larc(start, gradients):
    peer = timm_lars()
    theirs = by_torch(
        start,
        gradients,
        lambda weights: peer(
            weights, momentum=MOMENTUM, weight_decay=DECAY, trust_coeff=0.02, trust_clip=True
        ),
    )
    assert away(ours(start, gradients, "larc", trust_coefficient=0.02), theirs) < 1e-12
    unclipped = ours(start, gradients, "larc", trust_coefficient=0.02, clip=False)
    assert away(unclipped, theirs) > 1e-3


def test_timm_adapts_nothing_that_is_not_decayed(start, gradients):
    """Without decay its tensors take plain SGD's steps, unless always_adapt is set; the paper adapts them all the same."""
    peer = timm_lars()
    options = {"momentum": MOMENTUM, "weight_decay": 0.0, "trust_coeff": TRUST}
    plain = by_torch(start, gradients, lambda weights: peer(weights, **options))
    adapted = by_torch(
        start, gradients, lambda weights: peer(weights, always_adapt=True, **options)
    )
    sgd = by_torch(
        start, gradients, lambda weights: torch.optim.SGD(weights, lr=1.0, momentum=MOMENTUM)
    )
    assert away(plain, sgd) < 1e-12
    assert away(ours(start, gradients, "torch", weight_decay=0.0), adapted) < 1e-12
