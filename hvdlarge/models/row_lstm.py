"""An LSTM that reads an image row by row, as in the MNIST experiment of LEGW (You et al. 2019,
section 5).
"""

from __future__ import annotations

import torch
from torch import nn


class RowLSTM(nn.Module):
    """One LSTM layer over the rows of an image, and a linear layer on its last hidden state.

    Args:
        row: values per row, channels × width.
        hidden: size of the hidden state.
        classes: number of classes.
    """

    def __init__(self, row: int = 8, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(row, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images of the shape (n, channels, height, width)."""
        rows = images.movedim(1, 2).flatten(start_dim=2)  # (n, height, channels · width)
        _, (state, _) = self.lstm(rows)  # state: (1, n, hidden)
        return self.classifier(state[-1])
