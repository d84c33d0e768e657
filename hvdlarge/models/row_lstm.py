"""An LSTM that reads an image row by row, the task of LEGW's MNIST experiment (You et al. 2019,
section 5).
"""

from __future__ import annotations

import torch
from torch import nn


class RowLSTM(nn.Module):
    """One LSTM layer over the rows of an image; the last state is classified.

    Args:
        row: values of one row, colours included.
        hidden: width of the LSTM's state.
        classes: outputs.
    """

    def __init__(self, row: int = 8, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(row, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    # (n, channels, height, width) -> (n, classes)
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        rows = images.movedim(1, 2).flatten(start_dim=2)  # (n, height, channels · width)
        _, (state, _) = self.lstm(rows)  # state: (1, n, hidden)
        return self.classifier(state[-1])
