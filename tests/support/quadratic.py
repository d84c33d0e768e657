"""A quadratic problem whose gradient noise is known: the loss of a sample x is ½‖w − x‖², so its gradient is w − x."""

import torch

from hvdlarge.data.in_memory import InMemory

DIMENSIONS, SAMPLES = 400, 8192


def samples():
    """Around 1 in every dimension, with variances between 0.2 and 3."""
    generator = torch.Generator().manual_seed(11)
    spread = torch.linspace(0.2, 3, DIMENSIONS, dtype=torch.float64).sqrt()
    values = torch.randn(SAMPLES, DIMENSIONS, generator=generator, dtype=torch.float64)
    return 1 + spread * values


def data():
    """All of them, for training."""
    return InMemory(samples(), torch.zeros(SAMPLES)), None


class Point(torch.nn.Module):
    """The weights w, in two parameters; returns w − x for each sample."""

    def __init__(self, start=0.0):
        super().__init__()
        half = DIMENSIONS // 2
        self.first = torch.nn.Parameter(torch.full((half,), start))
        self.second = torch.nn.Parameter(torch.full((DIMENSIONS - half,), start))

    def forward(self, inputs):
        return torch.cat([self.first, self.second]) - inputs


def half_square(difference, targets):
    """The mean loss."""
    return difference.square().sum(dim=1).mean() / 2


def halves(difference, targets):
    """The same as a sum and its weight, which is half a sample's each."""
    return difference.square().sum() / 4, 0.5 * len(difference)


def noise_scale(point):
    """tr Σ / |γ|² where all weights are `point`."""
    values = samples()
    return float(
        values.var(dim=0, correction=0).sum() / (point - values.mean(dim=0)).square().sum()
    )
