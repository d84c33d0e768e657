"""Residual networks: ResNet-20 for images of 32×32 pixels, ResNet-50 for ImageNet.

Source:   He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2016): section 4.2
          for the small one (shortcuts without parameters), table 1 for the large one, with the
          stride in the 3×3 convolution as every later reference has it. Weights as in He et al.,
          "Delving Deep into Rectifiers" (2015), by the fan-out.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class ResNet20(nn.Module):
    """6·3 + 2 layers for small images: 269,722 weights at width 16 and 10 classes.

    Args:
        in_channels: colours of the image.
        width: channels of the first stage; the other two have twice and four times as many.
        classes: outputs.
    """

    def __init__(self, in_channels: int = 3, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _convolution(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        widths = [width] * 3 + [2 * width] * 3 + [4 * width] * 3
        before = [width, *widths[:-1]]
        self.blocks = nn.Sequential(
            *(_Basic(a, b, stride=b // a) for a, b in zip(before, widths, strict=True))
        )
        self.classifier = nn.Linear(4 * width, classes)
        _initialise(self)

    # (n, in_channels, height, width) -> (n, classes)
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class ResNet50(nn.Module):
    """50 layers of bottlenecks: 25,557,032 weights in 161 tensors for 1000 classes.

    Args:
        classes: outputs.
        zero_last: begin with each block as the identity, its last normalisation's scale at zero
            (Goyal et al. 2017).
    """

    def __init__(self, classes: int = 1000, zero_last: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _convolution(3, 64, 7, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks: list[nn.Module] = []
        channels = 64
        for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for number in range(depth):
                stride = 2 if number == 0 and width > 64 else 1
                blocks.append(_Bottleneck(channels, width, stride))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)
        _initialise(self)
        if zero_last:
            for block in blocks:
                nn.init.zeros_(block.last.weight)  # type: ignore[union-attr, arg-type]

    # (n, 3, height, width) -> (n, classes)
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class _Basic(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters: every other pixel, and zeros for
    the new channels.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(before, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _convolution(width, width, 3),
            nn.BatchNorm2d(width),
        )
        self._stride, self._new = stride, width - before

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shortcut = images
        if self._new or self._stride > 1:
            padding = (0, 0, 0, 0, self._new // 2, self._new - self._new // 2)
            shortcut = functional.pad(images[:, :, :: self._stride, :: self._stride], padding)
        return functional.relu(self.body(images) + shortcut, inplace=True)


class _Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut, which is a 1×1 convolution where shapes
    change.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.last = nn.BatchNorm2d(after)
        self.body = nn.Sequential(
            _convolution(before, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _convolution(width, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _convolution(width, after, 1),
        )
        changes = stride > 1 or before != after
        self.shortcut = (
            nn.Sequential(_convolution(before, after, 1, stride), nn.BatchNorm2d(after))
            if changes
            else nn.Identity()
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.last(self.body(images)) + self.shortcut(images), inplace=True)


def _convolution(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    # No bias: the normalisation that follows would take it out again.
    return nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
