"""Every published form of LARS, LAMB and torch's own against independent float64 oracles in numpy."""

import copy
import itertools

import numpy as np
import pytest
import torch
from support.optimizers import LarsInLists

from hvdlarge.config.job_file import parse_job
from hvdlarge.optim import sections
from hvdlarge.optim.build import build_optimizer
from hvdlarge.optim.lamb import LAMB
from hvdlarge.optim.lars import LARS
from hvdlarge.optim.param_groups import set_lr
from hvdlarge.optim.presets import PRESETS

FORMS = [
    dict(zip(("lr_in_momentum", "joint_norm", "clip", "nesterov", "eps"), values, strict=True))
    for values in itertools.product(
        (True, False), (True, False), (True, False), (True, False), (0.0, 1e-3)
    )
]


def name_of(form):
    return " ".join(name for name, value in form.items() if value) or "rate outside"


def lars(w, v, g, lr, m, decay, trust, adapt, form):
    """The forms, written down from their sources and from nothing else."""
    if not np.any(g):
        return w, v
    size = np.linalg.norm(w)
    if not adapt or size == 0:
        ratio = 1.0
    else:
        below = (
            np.linalg.norm(g + decay * w)
            if form["joint_norm"]
            else np.linalg.norm(g) + decay * size
        )
        ratio = trust * size / (below + form["eps"])
        if form["clip"]:
            ratio = min(ratio / lr, 1.0) if lr > 0 else 1.0
    u = ratio * (g + decay * w)
    if form["lr_in_momentum"]:
        v = m * v + lr * u
        return w - (m * v + lr * u if form["nesterov"] else v), v
    v = m * v + u
    return w - lr * (m * v + u if form["nesterov"] else v), v


def trajectory(optimizer, parameters, oracle, steps=25):
    """Hold an optimizer against an oracle over steps with jumping rates and some zero gradients."""
    random = np.random.default_rng(7)
    for step in range(steps):
        lr = [0.1, 3.2, 0.02, 0.0, 25.0][step % 5]
        set_lr(optimizer, lr)
        for number, parameter in enumerate(parameters):
            gradient = random.normal(size=parameter.shape) * 10.0 ** random.integers(-4, 3)
            if (step + number) % 6 == 0:
                gradient[...] = 0.0
            parameter.grad = torch.from_numpy(gradient.copy())
        gradients = [parameter.grad.numpy().copy() for parameter in parameters]
        optimizer.step()
        for number, parameter in enumerate(parameters):
            expected = oracle(number, gradients[number], lr)
            assert np.isfinite(expected).all()
            scale = np.abs(expected).max() + 1e-300
            assert np.abs(parameter.detach().numpy() - expected).max() <= 1e-12 * max(scale, 1.0), (
                step,
                number,
            )


def tensors():
    random = np.random.default_rng(3)
    shapes = [(1,), (3, 5), (4, 3, 3, 3), (64, 64)]
    return [random.normal(size=shape) * 10.0 ** random.integers(-2, 2) for shape in shapes] + [
        np.zeros((5,))
    ]


def groups_of(parameters, adapt, decay):
    return [{"params": parameters, "names": [str(n) for n in range(len(parameters))], "adapt": adapt, "weight_decay": decay,
             "lr_factor": 1.0}]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=name_of)
@pytest.mark.parametrize(("adapt", "decay"), [(True, 0.01), (True, 0.0), (False, 0.01)])
@pytest.mark.parametrize("kind", [LARS, LarsInLists])
def test_every_form_of_lars(form, adapt, decay, kind):
    weights = tensors()
    velocities = [np.zeros_like(w) for w in weights]
    parameters = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    optimizer = kind(
        groups_of(parameters, adapt, decay), momentum=0.9, trust_coefficient=0.01, **form
    )

    def oracle(number, gradient, lr):
        weights[number], velocities[number] = lars(
            weights[number], velocities[number], gradient, lr, 0.9, decay, 0.01, adapt, form
        )
        return weights[number]

    trajectory(optimizer, parameters, oracle)


def test_lamb():
    weights, b1, b2, eps, decay = tensors(), 0.8, 0.95, 1e-6, 0.01
    state = [[np.zeros_like(w), np.zeros_like(w), 0] for w in weights]
    parameters = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    optimizer = LAMB(groups_of(parameters, True, decay), betas=(b1, b2), eps=eps)

    def oracle(number, g, lr):
        if not np.any(g):
            return weights[number]
        w, (m, v, t) = weights[number], state[number]
        t += 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        state[number] = [m, v, t]
        r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * w
        ratio = (
            np.linalg.norm(w) / np.linalg.norm(r)
            if np.linalg.norm(w) > 0 and np.linalg.norm(r) > 0
            else 1.0
        )
        weights[number] = w - lr * ratio * r
        return weights[number]

    trajectory(optimizer, parameters, oracle)
    assert {type(value) for found in optimizer.state.values() for value in found.values()} == {
        int,
        torch.Tensor,
    }


def test_lamb_moves_by_the_rate_times_the_weights_norm():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    weight.grad = torch.tensor([0.3, -0.1], dtype=torch.float64)
    before = weight.detach().clone()
    LAMB([weight], lr=0.01).step()
    assert (weight.detach() - before).norm().item() == pytest.approx(0.01 * 5, rel=1e-12)


@pytest.mark.parametrize("make", [LARS, LarsInLists, LAMB])
def test_a_step_in_which_every_gradient_is_zero(make):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    make([weight]).step()
    assert weight.tolist() == [1, 1, 1]


CASES = {
    "sgd": ({"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=1, momentum=0.9, weight_decay=0.01)),
    "sgd, nesterov": (
        {"momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=1, momentum=0.9, weight_decay=0.01, nesterov=True),
    ),
    "adam": ({"betas": (0.8, 0.95)}, lambda p: torch.optim.Adam(p, lr=1, betas=(0.8, 0.95), weight_decay=0.01)),
    "adamw": ({"betas": (0.8, 0.95)}, lambda p: torch.optim.AdamW(p, lr=1, betas=(0.8, 0.95), weight_decay=0.01)),
    "adagrad": ({}, lambda p: torch.optim.Adagrad(p, lr=1, weight_decay=0.01)),
    "rmsprop": ({"momentum": 0.5, "alpha": 0.9}, lambda p: torch.optim.RMSprop(p, lr=1, momentum=0.5, alpha=0.9, weight_decay=0.01)),
}  # fmt: skip


SECTIONS = {
    "sgd": sections.Sgd,
    "adam": sections.Adam,
    "adamw": sections.AdamW,
    "adagrad": sections.Adagrad,
    "rmsprop": sections.RmsProp,
}


@pytest.mark.parametrize("case", CASES)
def test_torchs_own_are_torchs_own(case):
    """Weights bit for bit those of torch, which is given no gradient where ours is zero."""
    options, make = CASES[case]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).double()
    twin = copy.deepcopy(model)
    kind = SECTIONS[case.split(",")[0]]
    ours = build_optimizer(model, kind(weight_decay=0.01, exclude_bias_and_norm=False, **options))
    theirs = make(twin.parameters())
    assert not ours.state
    for step in range(12):
        lr = [0.01, 0.2, 0.003][step % 3]
        set_lr(ours, lr)
        theirs.param_groups[0]["lr"] = lr
        for number, (one, other) in enumerate(
            zip(model.parameters(), twin.parameters(), strict=True)
        ):
            gradient = torch.randn_like(one)
            one.grad, other.grad = gradient.clone(), gradient.clone()
            if (step + number) % 5 == 1:
                one.grad, other.grad = torch.zeros_like(one), None
        ours.step()
        theirs.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert ours.step(lambda: 0.5) == 0.5


JOB = "name: a\nepochs: 3\ndata: {name: digits}\nmodel: {name: mlp}\nbatch: {base: 8, micro: 8}\nlr: {base: 0.1}\n"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_give_the_defaults_and_options_go_before_them(preset):
    job = parse_job(JOB + f"optimizer: {{name: lars, preset: {preset}}}\n", "job.yaml")
    assert {name: getattr(job.optimizer, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert parse_job(job.to_yaml(), "resolved") == job
    other = parse_job(
        JOB + f"optimizer: {{name: lars, preset: {preset}, eps: 0.5, momentum: 0.8}}\n", "job.yaml"
    )
    assert (other.optimizer.eps, other.optimizer.joint_norm) == (0.5, PRESETS[preset]["joint_norm"])
    assert "preset" not in job.optimizer.options


@pytest.mark.parametrize("name", ["lars", "lamb", "sgd", "adam", "adamw", "adagrad", "rmsprop"])
def test_a_job_builds_each_optimizer(name):
    job = parse_job(JOB + f"optimizer: {{name: {name}, weight_decay: 0.1}}\n", "job.yaml")
    optimizer = build_optimizer(torch.nn.Linear(2, 2), job.optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("{name: lers}", "did you mean 'lars'"), ("{preset: pepar}", "optimizer.preset is \"pepar\""),
        ("{name: adam, momentum: 0.9}", "unknown key 'optimizer.momentum'"), ("{name: lamb, betas: [1, 0]}", "optimizer.betas.0 is 1"),
        ("{name: sgd, momentum: 0, nesterov: true}", "nesterov needs a momentum above 0"),
        ("{momentum: 0, nesterov: true}", "nesterov needs a momentum above 0"),
    ],
)  # fmt: skip
def test_wrong_optimizers_are_refused(optimizer, message):
    with pytest.raises(Exception, match="job.yaml") as raised:
        parse_job(JOB + f"optimizer: {optimizer}\n", "job.yaml")
    assert message in str(raised.value)
