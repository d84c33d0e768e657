"""A quadratic problem whose gradient noise is known: the loss of a sample x is ½‖w − x‖², so its gradient is w − x."""

import json

import torch

from hvdlarge.data.in_memory import InMemory

DIMENSIONS, SAMPLES = 400, 8192
# Measures everything, and grows as the noise rises
JOB = """\
name: measured
epochs: 0.6
precision: fp64
data: {name: "support.quadratic:data"}
model: {name: "support.quadratic:Point"}
loss: {name: "support.quadratic:half_square"}
batch:
  base: 48
  micro: 8
  growth: {policy: noise_scale, every_epochs: 0.1, factor: 2, max: 400}
lr: {base: 0.05}
optimizer: {name: sgd, momentum: 0.5, weight_decay: 1e-4}
log: {every_steps: 1, noise_every_steps: 1, layers_every_steps: 4, distances: true}
"""


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


def comparable(folder):
    """The numbers of each line of a run's log that do not depend on time, by their paths; -1 for None."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [dict(_numbers(line, "")) for line in lines]


def _numbers(record, prefix):
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif name not in ("time", "samples_per_second") and not name.endswith("_seconds"):
            yield prefix + name, -1.0 if value is None else value
