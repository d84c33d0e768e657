"""The Triton kernels of LARS: read by Triton's interpreter on a CPU, or run on a GPU where there is one, and compiled for others.

Run by `make test-kernels`, which installs Triton; it is too large for the default tests.
"""

import os

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton")

from hvdlarge.optim import lars_gpu  # noqa: E402
from hvdlarge.optim.lars import LARS, trust_ratio  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES = [(1,), (7,), (3, 5), (64, 3, 3, 3), (4096,), (4097,), (2, 4096), (0,), (300_001,)]


@pytest.fixture
def on_gpu(monkeypatch):
    """LARS takes the way of a GPU, also where the kernels are interpreted."""
    if not ON_GPU:
        assert lars_gpu._reason_against(DEVICE) is None
        monkeypatch.setattr(lars_gpu, "unsupported_reason", lambda device: None)


def pair(dtype, **options):
    """The same tensors under LARS on the way of a GPU and, on a CPU in float64, on the other way."""
    random = np.random.default_rng(5)
    values = [random.normal(size=shape) * 10.0 ** random.integers(-2, 2) for shape in SHAPES] + [
        np.zeros(5)
    ]
    sides = []
    for device, kind in ((DEVICE, dtype), (torch.device("cpu"), torch.float64)):
        weights = [
            torch.nn.Parameter(torch.from_numpy(value.copy()).to(device, kind)) for value in values
        ]
        # A channels-last weight, whose gradient comes in another order of memory.
        weights[3] = torch.nn.Parameter(weights[3].detach().to(memory_format=torch.channels_last))
        groups = [
            {"params": weights[:6]},
            {"params": weights[6:8], "adapt": False, "weight_decay": 0.0},
            {"params": weights[8:], "lr": 0.3},
        ]
        sides.append(
            (weights, LARS(groups, **{"lr": 0.7, "momentum": 0.9, "weight_decay": 0.01, **options}))
        )
    return random, sides


def step(random, sides, number, monkeypatch):
    gradients = [
        random.normal(size=weight.shape) * 10.0 ** random.integers(-4, 2) for weight in sides[0][0]
    ]
    gradients[(3 * number) % len(gradients)][...] = 0.0
    for (weights, optimizer), on_gpu in zip(sides, (True, False), strict=True):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = torch.from_numpy(gradient.copy()).to(weight.device, weight.dtype)
        if number == 2:
            weights[1].grad = None
        for group in optimizer.param_groups:
            group["lr"] = [0.7, 3.0, 0.0, 12.0][number % 4]
        with monkeypatch.context() as patch:
            if not on_gpu:
                patch.setattr(lars_gpu, "unsupported_reason", lambda device: "the other side")
            optimizer.step()


FORMS = [
    {},
    {"momentum": 0.0},
    {"lr_in_momentum": False},
    {"joint_norm": True},
    {"nesterov": True},
    {"lr_in_momentum": False, "nesterov": True, "joint_norm": True},
    {"clip": True, "eps": 1e-8},
    {"weight_decay": 0.0},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_six_steps_are_those_of_the_other_way(on_gpu, monkeypatch, form, dtype, close):
    random, sides = pair(dtype, trust_coefficient=0.02, **form)
    for number in range(6):
        step(random, sides, number, monkeypatch)
        for one, other in zip(sides[0][0], sides[1][0], strict=True):
            largest = other.abs().max().item() if other.numel() else 1.0
            assert (
                (one.detach().cpu().double() - other.detach()).abs().max().item() <= close * largest
                if other.numel()
                else True
            )
            ratios = [
                optimizer.trust_ratio_of(weight)
                for (_, optimizer), weight in zip(sides, (one, other), strict=True)
            ]
            assert (ratios[0] is None) == (ratios[1] is None)
            if ratios[0] is not None:
                assert ratios[0] == pytest.approx(ratios[1], rel=10 * close)
    assert sides[0][1]._table is not None  # the kernels have run
    assert sides[1][1]._table is None


def test_two_runs_give_the_same_bits(on_gpu, monkeypatch):
    found = []
    for _ in range(2):
        random, sides = pair(torch.float32)
        for number in range(3):
            step(random, sides, number, monkeypatch)
        found.append([weight.detach().clone() for weight in sides[0][0]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_vectors_of_ratios_are_those_of_single_tensors():
    random = np.random.default_rng(0)
    for _ in range(50):
        group = {
            "adapt": True,
            "lr": random.choice([0.0, 0.5, 10.0]),
            "trust_coefficient": 0.01,
            "weight_decay": random.choice([0.0, 0.1]),
            "joint_norm": bool(random.integers(2)),
            "clip": bool(random.integers(2)),
            "eps": random.choice([0.0, 1e-3]),
        }
        weights, grads = random.choice([0.0, 1e-3, 2.0], 8), random.choice([1e-4, 0.3, 50.0], 8)
        found = lars_gpu.trust_ratios(torch.from_numpy(weights), torch.from_numpy(grads), group)
        assert found.tolist() == pytest.approx(
            [trust_ratio(w, g, group) for w, g in zip(weights, grads, strict=True)], rel=1e-12
        )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, which interprets
def test_clipping_and_what_is_not_finite(on_gpu):
    (weights, optimizer), _ = pair(torch.float64)[1]
    names = {weight: f"w{number}" for number, weight in enumerate(weights)}
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    total = sum(weight.numel() for weight in weights) ** 0.5
    clipped = optimizer.measure().clipped(2.0)
    assert sum(weight.grad.square().sum().item() for weight in weights) ** 0.5 == pytest.approx(
        2.0, rel=1e-12
    )
    assert clipped.values[1].norm().item() == pytest.approx(2.0, rel=1e-12)
    assert optimizer.measure().clipped(3 * total).values[1].norm().item() == pytest.approx(
        2.0, rel=1e-12
    )
    weights[2].grad[0, 0] = float("nan")
    weights[8].grad[17] = float("inf")
    assert optimizer.measure().not_finite(names) == ["w2", "w8"]
    before = [weight.detach().clone() for weight in weights]
    optimizer.gradient_norms = optimizer.measure()
    assert optimizer.gradient_norms.later()().not_finite(names) == ["w2", "w8"]
    optimizer.step()  # nobody has judged it: nothing moves
    assert all(torch.equal(one, other) for one, other in zip(before, weights, strict=True))
    optimizer.step()  # and outside a run what is not finite is not hidden
    assert weights[2].isnan().any()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_kernels_compile_for_gpus_that_are_not_here(architecture, dtype, aligned, tmp_path):
    """In a process of its own: this one's Triton interprets."""
    import subprocess
    import sys

    program = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hvdlarge.optim import lars_kernels as k
target = GPUTarget("cuda", {architecture}, 32)
lists = dict(addresses="*i64", number="i32", sizes="*i64", owners="*i64", starts="*i64")
kind = dict(TYPE=k.tl.{dtype.replace("fp", "float")}, ALIGNED={aligned}, CHUNK=k.CHUNK)
for kernel, signature, fixed in (
    (k.squares, lists | dict(settings="*fp64", found="*fp64"), kind | dict(JOINT=True)),
    (k.squares, lists | dict(settings="*fp64", found="*fp64"), kind | dict(JOINT=False)),
    (k.roots, dict(found="*fp64", begins="*i64", number="i32", norms="*fp64"), dict(AT_ONCE=k.AT_ONCE)),
    (k.update, lists | dict(norms="*fp64", into="*fp64", settings="*fp64"), kind | dict(NESTEROV=True)),
    (k.update, lists | dict(norms="*fp64", into="*fp64", settings="*fp64"), kind | dict(NESTEROV=False)),
):
    signature = signature | {{name: "constexpr" for name in fixed}}
    compiled = triton.compile(ASTSource(kernel, signature, fixed), target=target)
    text = compiled.asm["ptx"]
    print(kernel.__name__, len(compiled.asm["cubin"]), "vectors", text.count("ld.global.v"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["squares", "squares", "roots", "update", "update"]
    assert all(int(line[1]) > 0 for line in lines)
    for line in lines:  # 16 bytes at a time, where the addresses allow it
        assert (int(line[3]) > 0) == (aligned and line[0] != "roots"), done.stdout
