"""A multilayer perceptron: no batch statistics, any input shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class MLP(nn.Module):
    """Flattens its input and applies linear layers with ReLU between them.

    Args:
        inputs: values per sample.
        hidden: widths of the hidden layers.
        classes: number of classes.
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
        for in_features, out_features in pairwise(widths):
            layers += [
                nn.Linear(in_features, out_features),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
            ]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], classes))

    # samples: (n, …), `inputs` values each
    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes)."""
        return self.layers(samples)
