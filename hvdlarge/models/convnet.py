"""A small convolutional network with batch normalisation, for images of at least 8×8 pixels."""

from __future__ import annotations

import torch
from torch import nn


class ConvNet(nn.Module):
    """Three 3×3 convolutions, one 2×2 max pooling, global average pooling and a linear layer.

    Args:
        in_channels: channels of the images.
        width: channels of the first convolution; the other two have twice as many.
        classes: number of classes.
        dropout: probability before the linear layer.
    """

    def __init__(
        self, in_channels: int = 1, width: int = 16, classes: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(in_channels, width),
            *_block(width, 2 * width),
            nn.MaxPool2d(2),
            *_block(2 * width, 2 * width),
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images of the shape (n, in_channels, height, width)."""
        features = self.features(images).mean(dim=(2, 3))  # (n, 2·width)
        return self.classifier(self.dropout(features))


def _block(in_channels: int, out_channels: int) -> list[nn.Module]:
    # No bias: the batch normalisation that follows would cancel it.
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
