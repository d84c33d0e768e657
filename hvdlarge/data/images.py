"""`Images`, a data set of images held as bytes, whose samples are numbers in [0, 1].

Bytes take a quarter of the memory of float32; each micro-batch is converted when it is read.
"""

from __future__ import annotations

import numpy as np
import torch

from hvdlarge.data.in_memory import InMemory, rows


class Images(InMemory):
    """Images held as bytes; samples are float32, the bytes divided by 255.

    Args:
        inputs: shape (n, channels, height, width), uint8.
        targets: shape (n,), int64.

    Raises:
        ValueError: if the lengths differ, or the inputs are not bytes.
    """

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        super().__init__(inputs, targets)
        if inputs.dtype != torch.uint8:
            raise ValueError(f"the pixels of Images are uint8, not {inputs.dtype}")

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return scaled(self.inputs[index]), self.targets[index]

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the samples `indices`, shape (n,)."""
        return scaled(torch.index_select(self.inputs, 0, indices)), rows(self.targets, indices)

    def as_bytes(self) -> InMemory:
        """The same samples with their bytes as inputs."""
        return InMemory(self.inputs, self.targets)

    @classmethod
    def of(cls, pixels: np.ndarray, labels: np.ndarray) -> Images:
        """The set of pixels, shape (n, channels, height, width), and labels, shape (n,)."""
        inputs = np.require(pixels, np.uint8, ["C", "W"])
        return cls(torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64)))


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes divided by 255, float32; where a GPU is in use, in pinned memory."""
    if pixels.device.type != "cpu" or not torch.cuda.is_initialized():
        return pixels.float().div_(255)  # faster than a division that converts
    pinned = torch.empty(pixels.shape, dtype=torch.float32, pin_memory=True)
    return torch.div(pixels, 255, out=pinned)
