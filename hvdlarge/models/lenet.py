"""LeNet for images of 28×28 pixels, in three published forms.

Source:   `tensorflow`: convolutions of 32 and 64 channels, 1024 hidden units, dropout 0.4: the
          model of the full-batch MNIST logs of the first author of "The Limit of the Batch Size"
          (2020), once a tutorial of TensorFlow; 3,274,634 parameters.
          `caffe`: 20 and 50 channels, 500 hidden units, Caffe's MNIST example; 431,080.
          `lenet5`: 6 and 16 channels, 120 and 84 hidden units, LeCun, Bottou, Bengio, Haffner,
          "Gradient-Based Learning Applied to Document Recognition" (1998); 61,706 with all channels
          connected, where the paper connects some and has 60,000.
          Initialisation: Glorot, Bengio, "Understanding the difficulty of training deep feedforward
          neural networks" (2010), uniform; biases zero.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import nn

from hvdlarge.models.inputs import check_images

Form = Literal["tensorflow", "caffe", "lenet5"]


class _Layers(NamedTuple):
    channels: tuple[int, int]
    paddings: tuple[int, int]  # of the two 5×5 convolutions
    features: int  # values of the last feature map
    hidden: tuple[int, ...]
    dropout: float  # after a hidden layer
    after_convolution: type[nn.Module]
    after_hidden: type[nn.Module]


_FORMS = {
    "tensorflow": _Layers((32, 64), (2, 2), 64 * 7 * 7, (1024,), 0.4, nn.ReLU, nn.ReLU),
    "caffe": _Layers((20, 50), (0, 0), 50 * 4 * 4, (500,), 0.0, nn.Identity, nn.ReLU),
    "lenet5": _Layers((6, 16), (2, 0), 16 * 5 * 5, (120, 84), 0.0, nn.Tanh, nn.Tanh),
}


class LeNet(nn.Module):
    """Two 5×5 convolutions, each with 2×2 max pooling, and two or three linear layers.

    Args:
        classes: number of classes.
        form: `tensorflow`, `caffe` or `lenet5`.
        dropout: probability after each hidden linear layer; None: 0.4 for `tensorflow`, 0 for the
            others.

    Raises:
        ValueError: for another form; in `forward` for images of another size.
    """

    def __init__(
        self, classes: int = 10, form: Form = "tensorflow", dropout: float | None = None
    ) -> None:
        super().__init__()
        if form not in _FORMS:
            raise ValueError(f"form must be {', '.join(_FORMS)}, got {form!r}")
        sizes = _FORMS[form]
        stages: list[nn.Module] = []
        channels = pairwise((1, *sizes.channels))
        for (inputs, outputs), padding in zip(channels, sizes.paddings, strict=True):
            convolution = nn.Conv2d(inputs, outputs, 5, padding=padding)
            stages += [convolution, sizes.after_convolution(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*stages)
        widths = [sizes.features, *sizes.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), sizes.after_hidden()]
            layers.append(nn.Dropout(sizes.dropout if dropout is None else dropout))
        self.classifier = nn.Sequential(*layers, nn.Linear(widths[-1], classes))
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images of the shape (n, 1, 28, 28)."""
        check_images("LeNet", images, 1, (28,))
        return self.classifier(self.features(images))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
