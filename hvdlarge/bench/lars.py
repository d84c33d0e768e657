"""Times the LARS update of the parameters of ResNet-50 against alternatives.

Source:   ResNet-50: He et al. (2016); the lower bound of seven passes over memory: docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdlarge.bench.interleave import run_interleaved, stopwatch
from hvdlarge.models.resnet import ResNet50
from hvdlarge.optim.lars import LARS

_MOMENTUM, _DECAY, _TRUST, _LR = 0.9, 1e-4, 0.001, 0.1
PASSES = 7  # norms read g and w; the update reads g, w, v and writes w, v


def measure_lars(device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Time one update on `device`; each variant has its own tensors.

    Returns:
        Seconds by variant, one for each round: `LARS`, this engine's; `fused SGD`, torch's with
        momentum and weight decay, without norms; `loop` and `foreach`, LARS written with one
        operation per tensor and with torch's foreach operations; `copy`, copies of the parameters
        that read and write as much memory as seven passes over them.
    """
    updates = {
        "LARS": _engine(_tensors(device)),
        "fused SGD": _fused_sgd(_tensors(device)),
        "loop": _loop(_tensors(device)),
        "foreach": _foreach(_tensors(device)),
        "copy": _copy(_tensors(device)),
    }
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    variants = {name: stopwatch(update, synchronize) for name, update in updates.items()}
    run_interleaved(variants, 2)  # warm-up: allocates momentum buffers, fills caches
    return run_interleaved(variants, rounds)


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
    return LARS(groups, lr=_LR, momentum=_MOMENTUM, trust_coefficient=_TRUST).step


def _fused_sgd(weights: list[torch.nn.Parameter]) -> Callable[[], object]:
    return torch.optim.SGD(
        weights, lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY, fused=True
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
            velocity.mul_(_MOMENTUM).add_(direction, alpha=_LR)
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
        denominators = torch._foreach_add(grad_norms, torch._foreach_mul(weight_norms, _DECAY))
        ratios = torch._foreach_div(torch._foreach_mul(weight_norms, _TRUST), denominators)
        directions = torch._foreach_add(grads, adapted, alpha=_DECAY)
        torch._foreach_mul_(directions, ratios)
        other_grads = [weight.grad for weight in others if weight.grad is not None]
        for group, group_directions in ((adapted, directions), (others, other_grads)):
            group_velocities = [velocities[weight] for weight in group]
            torch._foreach_mul_(group_velocities, _MOMENTUM)
            torch._foreach_add_(group_velocities, group_directions, alpha=_LR)
            torch._foreach_sub_(group, group_velocities)

    return update


def _copy(weights: list[torch.nn.Parameter]) -> Callable[[], object]:
    """Three and a half copies: as many reads and writes as seven passes."""
    source = torch.cat([weight.detach().reshape(-1) for weight in weights])
    half, target = source[: len(source) // 2], torch.empty_like(source)

    def copies() -> None:
        for _ in range(PASSES // 2):
            target.copy_(source)
        target[: len(half)].copy_(half)

    return copies
