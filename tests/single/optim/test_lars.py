"""LARS against an independent float64 oracle in numpy, and the vectors of the paper (FACTS 6.C)."""

import copy

import numpy as np
import pytest
import torch
from support.optimizers import LarsInLists

from hvdlarge.optim.lars import LARS, trust_ratio
from hvdlarge.optim.norms import norm
from hvdlarge.optim.param_groups import parameter_groups, set_lr


def oracle(w, v, g, lr, momentum, decay, trust, adapt):
    """Algorithm 1, written down from the paper and from nothing else."""
    w_norm, g_norm = np.sqrt(np.sum(w * w)), np.sqrt(np.sum(g * g))
    if g_norm == 0:
        return w, v
    ratio = trust * w_norm / (g_norm + decay * w_norm) if adapt and w_norm > 0 else 1.0
    v = momentum * v + lr * ratio * (g + decay * w)
    return w - v, v


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.0005, 0.1])
@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("kind", [LARS, LarsInLists])
def test_thirty_steps_of_random_tensors_with_jumping_rates(momentum, decay, adapt, kind):
    random = np.random.default_rng(hash((momentum, decay, adapt)) % 2**32)
    shapes = [(1,), (7,), (3, 5), (4, 3, 3, 3), (8192 + 17,), (64, 64)]
    weights = [random.normal(size=shape) * 10.0 ** random.integers(-3, 3) for shape in shapes]
    weights.append(np.zeros((5,)))  # a tensor of zeros must be able to move
    velocities = [np.zeros_like(w) for w in weights]
    parameters = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    optimizer = kind(
        parameters, momentum=momentum, weight_decay=decay, trust_coefficient=0.01, adapt=adapt
    )
    for step in range(30):
        lr = [0.1, 3.2, 25.0, 0.0][step % 4]
        optimizer.param_groups[0]["lr"] = lr
        for number, parameter in enumerate(parameters):
            gradient = random.normal(size=parameter.shape) * 10.0 ** random.integers(-6, 6)
            if (step + number) % 5 == 0:
                gradient[...] = 0.0
            parameter.grad = torch.from_numpy(gradient)
            weights[number], velocities[number] = oracle(
                weights[number], velocities[number], gradient, lr, momentum, decay, 0.01, adapt
            )
        optimizer.step()
        for number, parameter in enumerate(parameters):
            scale = np.abs(weights[number]).max() + np.abs(velocities[number]).max()
            assert np.abs(parameter.detach().numpy() - weights[number]).max() <= 1e-12 * scale
    assert all(np.isfinite(w).all() and np.any(w) for w in weights)


def step_of(w, g, lr, **options):
    parameter = torch.nn.Parameter(torch.tensor(w, dtype=torch.float64))
    parameter.grad = torch.tensor(g, dtype=torch.float64)
    optimizer = LARS(
        [parameter],
        lr=lr,
        **{"momentum": 0.9, "weight_decay": 0.0005, "trust_coefficient": 0.001, **options},
    )
    optimizer.step()
    return parameter, optimizer


def test_the_vector_of_the_facts():
    parameter, optimizer = step_of((3.0, 4.0), (0.6, 0.8), 2.0)
    assert optimizer.trust_ratio_of(parameter) == pytest.approx(0.004987531172069826, rel=1e-12)
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == pytest.approx(
        [0.006, 0.008], rel=1e-12
    )
    assert parameter.tolist() == pytest.approx([2.994, 3.992], rel=1e-12)


def test_ratios_from_the_papers_table_of_norms():
    group = {"trust_coefficient": 0.001, "weight_decay": 0.0}
    assert trust_ratio(0.098, 0.017, group) / 0.001 == pytest.approx(5.76, abs=0.005)
    assert 1345 / (trust_ratio(0.098, 0.017, group) / 0.001) == pytest.approx(233, abs=0.5)


def test_bounds_of_a_fresh_step():
    random = np.random.default_rng(1)
    for _ in range(50):
        w, g = random.normal(size=20), random.normal(size=20) * 10.0 ** random.integers(-8, 3)
        parameter, optimizer = step_of(w, g, 2.0)
        moved = np.linalg.norm(parameter.detach().numpy() - w)
        assert moved <= 2.0 * 0.001 * np.linalg.norm(w) * (1 + 1e-12)
        assert optimizer.trust_ratio_of(parameter) <= 0.001 / 0.0005


def test_without_decay_the_scale_of_the_gradient_does_not_matter():
    for factor in (1e-6, 3.0, 1e6):
        one, _ = step_of((1.0, -2.0), (0.3, 0.1), 1.5, weight_decay=0.0)
        other, _ = step_of((1.0, -2.0), (0.3 * factor, 0.1 * factor), 1.5, weight_decay=0.0)
        assert torch.allclose(one, other, rtol=1e-12, atol=0)


def test_a_zero_gradient_leaves_weights_momentum_and_decay_alone():
    parameter, optimizer = step_of((3.0, 4.0), (0.6, 0.8), 2.0)
    before, buffer = parameter.clone(), optimizer.state[parameter]["momentum_buffer"].clone()
    parameter.grad = torch.zeros(2, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)
    assert optimizer.trust_ratio_of(parameter) is None


def test_a_tensor_of_zeros_moves():
    parameter, optimizer = step_of((0.0, 0.0), (0.6, 0.8), 2.0)
    assert parameter.tolist() == pytest.approx([-1.2, -1.6])
    assert optimizer.trust_ratio_of(parameter) == 1.0


def test_what_is_not_finite_is_not_hidden():
    parameter, _ = step_of((3.0, 4.0), (float("nan"), 1.0), 2.0)
    assert not torch.isfinite(parameter).all()


def test_state_and_options_survive_a_round_trip():
    parameter, optimizer = step_of((3.0, 4.0), (0.6, 0.8), 2.0)
    twin = torch.nn.Parameter(parameter.detach().clone())
    other = LARS([twin])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the buffers
    for weight, lars in ((parameter, optimizer), (twin, other)):
        weight.grad = torch.tensor([-0.2, 0.9], dtype=torch.float64)
        lars.step()
    assert torch.equal(parameter, twin)


def test_float32_norms_are_right_for_large_tensors():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=3_000_001).astype(np.float32))
    exact = np.linalg.norm(values.numpy().astype(np.float64))
    assert norm(values).item() == pytest.approx(exact, rel=1e-7)
    assert norm(values.view(-1, 1).expand(-1, 1)).item() == pytest.approx(exact, rel=1e-7)
    assert norm(torch.zeros(0)).item() == 0.0


def test_norms_do_not_depend_on_threads():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=2_000_003).astype(np.float32))
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            found.add(norm(values).item())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-4),
        ("trust_coefficient", 0),
    ],
)
def test_hyper_parameters_out_of_range_are_refused_in_any_group(name, value):
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=name):
        LARS([one], **{name: value})
    with pytest.raises(ValueError, match=name):
        LARS([{"params": [one]}, {"params": [two], name: value}])


TWO_PATHS = [
    {},
    {"momentum": 0.0},
    {"lr_in_momentum": False},
    {"joint_norm": True},
    {"nesterov": True},
    {"lr_in_momentum": False, "nesterov": True, "joint_norm": True},
    {"clip": True, "eps": 1e-8},
    {"weight_decay": 0.0},
]


@pytest.mark.parametrize("form", TWO_PATHS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)],
)
def test_lists_follow_float64_tensor_by_tensor(form, dtype, close):
    """Several groups, rates that jump, gradients that are zero or not there, a layout of its own."""
    random = np.random.default_rng(5)
    shapes = [(1,), (7,), (3, 5), (64, 3, 3, 3), (4096,), (2, 4096), (0,), (30_001,)]
    values = [random.normal(size=shape) for shape in shapes] + [np.zeros(5)]
    sides = []
    for kind, width in ((LarsInLists, dtype), (LARS, torch.float64)):
        weights = [
            torch.nn.Parameter(torch.from_numpy(value.copy()).to(dtype).to(width))
            for value in values
        ]
        weights[3] = torch.nn.Parameter(weights[3].detach().to(memory_format=torch.channels_last))
        groups = [
            {"params": weights[:5]},
            {"params": weights[5:7], "adapt": False, "weight_decay": 0.0},
            {"params": weights[7:], "lr_factor": 0.5},
        ]
        options = {"momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02, **form}
        sides.append((weights, kind(groups, **options)))
    for step in range(6):
        gradients = [random.normal(size=shape) for shape in [*shapes, (5,)]]
        gradients[(3 * step) % len(gradients)][...] = 0.0
        for weights, optimizer in sides:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = torch.from_numpy(gradient.copy()).to(dtype).to(weight.dtype)
            if step == 2:
                weights[1].grad = None
            optimizer.update(optimizer.measure().clipped(100.0), [0.7, 3.0, 0.0, 2.0][step % 4])
        for one, other in zip(sides[0][0], sides[1][0], strict=True):
            size = max(1e-2, other.norm().item())
            assert (one.double() - other).norm().item() <= close * size
            ratio, expected = (
                optimizer.trust_ratio_of(weight)
                for (_, optimizer), weight in zip(sides, (one, other), strict=True)
            )
            assert (ratio is None) == (expected is None)
            if ratio is not None:
                assert ratio == pytest.approx(expected, rel=10 * close)


@pytest.mark.parametrize("kind", [LARS, LarsInLists])
def test_momentum_on_another_device_is_an_error(kind):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([weight])
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(2, device="meta")
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="momentum of a weight on cpu lies on meta"):
        optimizer.step()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.GroupNorm(1, 2)
        self.lstm = torch.nn.LSTM(4, 3)
        self.attention = torch.nn.MultiheadAttention(4, 2)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        self.scale = torch.nn.Parameter(torch.ones(1))


def test_biases_and_normalisation_are_told_by_kind():
    adapted, others = parameter_groups(Net(), weight_decay=0.1)
    assert set(others["names"]) == {
        "conv.bias", "norm.weight", "norm.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0",
        "attention.in_proj_bias", "attention.out_proj.bias",
    }  # fmt: skip
    assert "scale" in adapted["names"]
    assert not any(name.startswith("frozen") for name in adapted["names"] + others["names"])
    assert (adapted["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert (adapted["adapt"], others["adapt"]) == (True, False)


def test_patterns_the_papers_reading_and_an_own_rate():
    adapted, others = parameter_groups(
        Net(), 0.1, exclude=("scale", "lstm.*"), excluded_lr_factor=0.5
    )
    assert {"scale", "lstm.weight_ih_l0"} <= set(others["names"])
    (everything,) = parameter_groups(Net(), 0.1, exclude_bias_and_norm=False)
    assert "norm.bias" in everything["names"]
    optimizer = LARS([adapted, others])
    set_lr(optimizer, 3.0)
    assert [group["lr"] for group in optimizer.param_groups] == [3.0, 1.5]


def test_a_tied_parameter_is_found_by_any_of_its_names():
    model = Net()
    model.again = torch.nn.Module()
    model.again.table = model.scale  # the first name is "scale"
    _, others = parameter_groups(model, 0.1, exclude=("again.*",))
    assert "scale" in others["names"]
    norm = torch.nn.Module()
    norm.first = torch.nn.Linear(3, 3)
    norm.norm = torch.nn.LayerNorm(3)
    norm.first.gain = norm.norm.weight
    _, others = parameter_groups(norm, 0.1)
    assert "first.gain" in others["names"]


def test_a_pattern_that_matches_nothing_and_a_model_without_weights_are_refused():
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no"):
        parameter_groups(Net(), 0.1, exclude=("encoder.*",))
    with pytest.raises(ValueError, match="no trainable"):
        parameter_groups(torch.nn.ReLU(), 0.1)
