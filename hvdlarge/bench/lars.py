"""How long the LARS update of ResNet-50's tensors takes, beside what else could be done with them.

Source:   the tensors of He et al. (2016); the floor of seven passes: docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdlarge.bench.interleave import run_interleaved, stopwatch
from hvdlarge.models.resnet import ResNet50
from hvdlarge.optim.lars import LARS

_MOMENTUM, _DECAY, _TRUST, _RATE = 0.9, 1e-4, 0.001, 0.1
PASSES = 7  # norms read g and w; the update reads g, w, v and writes w, v


def measure_lars(device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of one update on `device`, each way of it in turn; every way moves tensors of its
    own.

    Returns:
        By the name of the way: `LARS`, this engine's; `fused SGD`, torch's with momentum and weight
        decay, which has no norms; `loop` and `foreach`, LARS as it is written down tensor by tensor
        and in torch's lists; `copy`, seven passes over as much memory as one tensor list, at the
        speed at which it can be copied.
    """
    ways = {
        "LARS": _engine(_tensors(device)),
        "fused SGD": _fused_sgd(_tensors(device)),
        "loop": _loop(_tensors(device)),
        "foreach": _foreach(_tensors(device)),
        "copy": _copy(_tensors(device)),
    }
    settle = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    sides = {name: stopwatch(way, settle) for name, way in ways.items()}
    run_interleaved(sides, 2)  # momentum buffers are made, caches filled
    return run_interleaved(sides, rounds)


def _tensors(device: torch.device) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        shapes = [weight.shape for weight in ResNet50().parameters()]
    weights = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.05) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight) * 0.01
    return weights


def _is_adapted(weight: torch.Tensor) -> bool:
    return weight.ndim > 1


def _engine(weights: list[torch.nn.Parameter]) -> Callable[[], object]:
    adapted = [weight for weight in weights if _is_adapted(weight)]
    others = [weight for weight in weights if not _is_adapted(weight)]
    groups = [
        {"params": adapted, "adapt": True, "weight_decay": _DECAY},
        {"params": others, "adapt": False, "weight_decay": 0.0},
    ]
    return LARS(groups, lr=_RATE, momentum=_MOMENTUM, trust_coefficient=_TRUST).step


def _fused_sgd(weights: list[torch.nn.Parameter]) -> Callable[[], object]:
    return torch.optim.SGD(
        weights, lr=_RATE, momentum=_MOMENTUM, weight_decay=_DECAY, fused=True
    ).step


def _loop(weights: list[torch.nn.Parameter]) -> Callable[[], object]:
    velocities = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def update() -> None:
        for weight, velocity in zip(weights, velocities, strict=True):
            direction = weight.grad
            assert direction is not None
            if _is_adapted(weight):
                weight_norm, grad_norm = weight.norm(), direction.norm()
                ratio = _TRUST * weight_norm / (grad_norm + _DECAY * weight_norm)
                direction = direction.add(weight, alpha=_DECAY).mul_(ratio)
            velocity.mul_(_MOMENTUM).add_(direction, alpha=_RATE)
            weight.sub_(velocity)

    return update


def _foreach(weights: list[torch.nn.Parameter]) -> Callable[[], object]:
    adapted: list[torch.Tensor] = [weight for weight in weights if _is_adapted(weight)]
    others: list[torch.Tensor] = [weight for weight in weights if not _is_adapted(weight)]
    velocities = {weight: torch.zeros_like(weight) for weight in (*adapted, *others)}

    @torch.no_grad()
    def update() -> None:
        grads = [weight.grad for weight in adapted if weight.grad is not None]
        weight_norms, grad_norms = torch._foreach_norm(adapted), torch._foreach_norm(grads)
        sizes = torch._foreach_add(grad_norms, torch._foreach_mul(weight_norms, _DECAY))
        ratios = torch._foreach_div(torch._foreach_mul(weight_norms, _TRUST), sizes)
        directions = torch._foreach_add(grads, adapted, alpha=_DECAY)
        torch._foreach_mul_(directions, ratios)
        for members, moved in (
            (adapted, directions),
            (others, [w.grad for w in others if w.grad is not None]),
        ):
            held = [velocities[weight] for weight in members]
            torch._foreach_mul_(held, _MOMENTUM)
            torch._foreach_add_(held, moved, alpha=_RATE)
            torch._foreach_sub_(members, held)

    return update


def _copy(weights: list[torch.nn.Parameter]) -> Callable[[], object]:
    """As many reads and writes as seven passes: three and a half copies."""
    whole = torch.cat([weight.detach().reshape(-1) for weight in weights])
    half, target = whole[: len(whole) // 2], torch.empty_like(whole)

    def copies() -> None:
        for _ in range(PASSES // 2):
            target.copy_(whole)
        target[: len(half)].copy_(half)

    return copies
