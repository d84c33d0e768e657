"""Residual networks: ResNet-20 for images of 32×32 pixels, ResNet-50 for ImageNet.

Source:   He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2016): section 4.2
          for ResNet-20 (shortcuts without parameters), table 1 for ResNet-50, where a block with
          stride has it in its first 1×1 convolution (v1). In most later work it is in the 3×3
          convolution (v1.5), as in Goyal et al., "Accurate, Large Minibatch SGD" (2017).
          Initialisation: He et al., "Delving Deep into Rectifiers" (2015), fan-out mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

Version = Literal["v1", "v1.5"]


class ResNet20(nn.Module):
    """6·3 + 2 layers for small images: 269,722 parameters at width 16 and 10 classes.

    Args:
        in_channels: channels of the images.
        width: channels of the first stage; the other two have twice and four times as many.
        classes: number of classes.
        zero_last: initialise the scale of the last normalisation of each block to zero, as for
            `ResNet50`; the paper does not.
    """

    def __init__(
        self, in_channels: int = 3, width: int = 16, classes: int = 10, zero_last: bool = False
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _convolution(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        widths = [width] * 3 + [2 * width] * 3 + [4 * width] * 3
        in_widths = [width, *widths[:-1]]
        blocks = [_Basic(a, b, stride=b // a) for a, b in zip(in_widths, widths, strict=True)]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(4 * width, classes)
        _initialise(self, [block.last for block in blocks] if zero_last else [])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images of the shape (n, in_channels, height, width)."""
        return self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class ResNet50(nn.Module):
    """Bottleneck blocks, 50 layers: 25,557,032 parameters in 161 tensors for 1000 classes.

    Args:
        classes: number of classes.
        zero_last: initialise the scale of the last normalisation of each block to zero, so that
            each block starts as the identity (Goyal et al. 2017).
        version: `v1` or `v1.5`, where the stride is; see the file. Both have the same parameters.

    Raises:
        ValueError: for another version.
    """

    def __init__(
        self, classes: int = 1000, zero_last: bool = True, version: Version = "v1.5"
    ) -> None:
        super().__init__()
        if version not in get_args(Version):
            raise ValueError(f"version must be v1 or v1.5, got {version!r}")
        self.stem = nn.Sequential(
            _convolution(3, 64, 7, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks: list[_Bottleneck] = []
        channels = 64
        for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for number in range(depth):
                stride = 2 if number == 0 and width > 64 else 1
                blocks.append(_Bottleneck(channels, width, stride, version))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)
        _initialise(self, [block.last for block in blocks] if zero_last else [])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images of the shape (n, 3, height, width)."""
        return self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class _Basic(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters: subsampling, and zero padding of the
    channels.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(in_channels, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _convolution(width, width, 3),
            nn.BatchNorm2d(width),
        )
        self._stride, self._added_channels = stride, width - in_channels

    @property
    def last(self) -> nn.BatchNorm2d:
        """The normalisation before the shortcut is added."""
        return self.body[-1]  # type: ignore[return-value]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shortcut = images
        if self._added_channels or self._stride > 1:
            front = self._added_channels // 2
            padding = (0, 0, 0, 0, front, self._added_channels - front)
            shortcut = functional.pad(images[:, :, :: self._stride, :: self._stride], padding)
        return functional.relu(self.body(images) + shortcut, inplace=True)


class _Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut, a 1×1 convolution if the shape changes."""

    def __init__(self, in_channels: int, width: int, stride: int, version: Version) -> None:
        super().__init__()
        out_channels = 4 * width
        strides = (stride, 1) if version == "v1" else (1, stride)
        self.last = nn.BatchNorm2d(out_channels)
        self.body = nn.Sequential(
            _convolution(in_channels, width, 1, strides[0]),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _convolution(width, width, 3, strides[1]),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _convolution(width, out_channels, 1),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            projection = _convolution(in_channels, out_channels, 1, stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.last(self.body(images)) + self.shortcut(images), inplace=True)


def _convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    # No bias: the batch normalisation that follows would cancel it.
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


def _initialise(model: nn.Module, zero_scales: Iterable[nn.BatchNorm2d]) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for norm in zero_scales:
        nn.init.zeros_(norm.weight)
