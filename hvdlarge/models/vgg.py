"""VGG-19 with batch normalisation, with the head for ImageNet or the one for CIFAR.

Source:   Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition"
          (2015), configuration E. With batch normalisation after each convolution, which keeps its
          bias: 143,678,248 parameters for 1000 classes, as published with torchvision.
          CIFAR: the model in the code of AdaBatch (Devarakonda, Naumov, Garland 2017), which it
          takes from W. Yang's pytorch-classification: 20.04 M parameters for 10 classes.
          Initialisation: He et al., "Delving Deep into Rectifiers" (2015), fan-out mode; linear
          layers normal with standard deviation 0.01; biases zero.
Contract: no adaptive pooling, whose gradient has no deterministic algorithm on a GPU; images have
          the size that a form is made for.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from hvdlarge.models.inputs import check_images

Form = Literal["imagenet", "cifar"]

_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions
_SIDES = {"imagenet": (224,), "cifar": (32,)}  # pixels
_FEATURES = {"imagenet": 512 * 7 * 7, "cifar": 512}  # values of the last feature map
_HIDDEN = 4096


class VGG19BN(nn.Module):
    """16 convolutions with batch normalisation, and three linear layers (`imagenet`) or one
    (`cifar`).

    Args:
        classes: number of classes.
        form: `imagenet`, for images of 224×224 pixels, or `cifar`, for 32×32.
        dropout: probability after the two hidden linear layers; `cifar` has neither.

    Raises:
        ValueError: for another form; in `forward` for images of another size.
    """

    def __init__(self, classes: int = 1000, form: Form = "imagenet", dropout: float = 0.5) -> None:
        super().__init__()
        if form not in _SIDES:
            raise ValueError(f"form must be {' or '.join(_SIDES)}, got {form!r}")
        self._form = form
        self.features = _features()
        self.classifier = _classifier(_FEATURES[form], classes, form, dropout)
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images of the shape (n, 3, height, width)."""
        check_images(f"VGG-19, form {self._form},", images, 3, _SIDES[self._form])
        return self.classifier(self.features(images).flatten(start_dim=1))


def _features() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in _STAGES:
        for _ in range(depth):
            # Batch normalisation cancels the bias, which belongs to the published count
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _classifier(inputs: int, classes: int, form: Form, dropout: float) -> nn.Module:
    if form == "cifar":
        return nn.Linear(inputs, classes)
    return nn.Sequential(
        nn.Linear(inputs, _HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(_HIDDEN, _HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(_HIDDEN, classes),
    )


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
