"""A multilayer perceptron: no batch statistics, any input shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class MLP(nn.Module):
    """Flattens its input and applies linear layers with ReLU between them.

    Args:
        inputs: values of one sample.
        hidden: widths of the hidden layers.
        classes: outputs.
        dropout: probability after each hidden layer.
    """

    def __init__(
        self,
        inputs: int = 64,
        hidden: Sequence[int] = (64, 64),
        classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], classes))

    # (n, …) of `inputs` values -> (n, classes)
    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.layers(samples)
