"""AlexNet in its form with one tower, without and with batch normalisation, for ImageNet and CIFAR.

Source:   Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014), the
          form with one tower and 64 first channels: 61,100,840 parameters for 1000 classes. The
          two towers of Krizhevsky, Sutskever, Hinton (2012) have 60,965,224.
          AlexNet-BN: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks"
          (2017).
          CIFAR: the model in the code of AdaBatch (Devarakonda, Naumov, Garland 2017), which it
          takes from W. Yang's pytorch-classification: 2.47 M parameters for 10 classes.
Contract: no adaptive pooling, whose gradient has no deterministic algorithm on a GPU; images have
          the size that a form is made for.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from hvdlarge.models.inputs import check_images

Form = Literal["imagenet", "cifar"]

_WIDTHS = (64, 192, 384, 256, 256)
_SIDES = {"imagenet": (224, 227), "cifar": (32,)}  # pixels
_FEATURES = {"imagenet": 256 * 6 * 6, "cifar": 256}  # values of the last feature map
_HIDDEN = 4096


class _AlexNet(nn.Module):
    def __init__(self, classes: int, form: Form, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        if form not in _SIDES:
            raise ValueError(f"form must be {' or '.join(_SIDES)}, got {form!r}")
        self._form = form
        self.features = _features(form, batch_norm)
        self.classifier = _classifier(_FEATURES[form], classes, form, dropout)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images of the shape (n, 3, height, width)."""
        check_images(f"AlexNet, form {self._form},", images, 3, _SIDES[self._form])
        return self.classifier(self.features(images).flatten(start_dim=1))


class AlexNet(_AlexNet):
    """Five convolutions, and three linear layers (`imagenet`) or one (`cifar`); no local response
    normalisation.

    Args:
        classes: number of classes.
        form: `imagenet`, for images of 224×224 or 227×227 pixels, or `cifar`, for 32×32.
        dropout: probability before the two hidden linear layers; `cifar` has neither.

    Raises:
        ValueError: for another form; in `forward` for images of another size.
    """

    def __init__(self, classes: int = 1000, form: Form = "imagenet", dropout: float = 0.5) -> None:
        super().__init__(classes, form, dropout, batch_norm=False)


class AlexNetBN(_AlexNet):
    """AlexNet with batch normalisation between each convolution and its ReLU: 61,101,992 parameters
    for 1000 classes.

    The convolutions have no bias, which the normalisation would cancel. Whether the model of the
    LARS paper has one tower or two, such biases, and dropout besides batch normalisation is not
    known here, nor is its number of parameters.

    Args:
        classes: number of classes.
        form: `imagenet`, for images of 224×224 or 227×227 pixels, or `cifar`, for 32×32.
        dropout: probability before the two hidden linear layers; `cifar` has neither.

    Raises:
        ValueError: for another form; in `forward` for images of another size.
    """

    def __init__(self, classes: int = 1000, form: Form = "imagenet", dropout: float = 0.5) -> None:
        super().__init__(classes, form, dropout, batch_norm=True)


def _features(form: Form, batch_norm: bool) -> nn.Sequential:
    small = form == "cifar"
    bias = not batch_norm
    convolutions = [nn.Conv2d(3, _WIDTHS[0], 11, stride=4, padding=5 if small else 2, bias=bias)]
    for (inputs, outputs), size in zip(pairwise(_WIDTHS), (5, 3, 3, 3), strict=True):
        convolutions.append(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias))
    layers: list[nn.Module] = []
    for number, convolution in enumerate(convolutions):
        layers.append(convolution)
        if batch_norm:
            layers.append(nn.BatchNorm2d(convolution.out_channels))
        layers.append(nn.ReLU(inplace=True))
        if number in (0, 1, 4):
            layers.append(nn.MaxPool2d(2 if small else 3, stride=2))
    return nn.Sequential(*layers)


def _classifier(inputs: int, classes: int, form: Form, dropout: float) -> nn.Module:
    if form == "cifar":
        return nn.Linear(inputs, classes)
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(inputs, _HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(_HIDDEN, _HIDDEN),
        nn.ReLU(inplace=True),
        nn.Linear(_HIDDEN, classes),
    )
