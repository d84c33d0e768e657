"""Synthetic images for benchmarks: any number of them, repeated from a small pool in memory."""

from __future__ import annotations

import torch

from hvdlarge.data.in_memory import InMemory

_POOL = 512  # distinct samples


class Repeated(InMemory):
    """A pool of samples repeated: sample i is sample i modulo n of the pool.

    Args:
        inputs: of the pool, shape (n, …).
        targets: of the pool, shape (n, …).
        samples: length of the data set.
    """

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, samples: int) -> None:
        super().__init__(inputs, targets)
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no sample {index} of {len(self)}")  # ends a loop over them
        return super().__getitem__(index % len(self) % len(self.inputs))

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the samples `indices`, shape (n,)."""
        return super().batch(indices % len(self.inputs))


def synthetic_images(
    samples: int, size: int = 32, channels: int = 3, classes: int = 10
) -> tuple[Repeated, None]:
    """Gaussian noise with random labels, for benchmarks.

    Args:
        samples: length of the data set; at most 512 are distinct.
        size: height and width, in pixels.
        channels: of each image.
        classes: distinct labels.

    Returns:
        A training set with inputs of shape (channels, size, size), float32, mean 0, variance 1,
        and scalar int64 targets; no test set.

    Raises:
        ValueError: if an argument is below 1.
    """
    if min(samples, size, channels, classes) < 1:
        raise ValueError(
            "synthetic images need at least 1 sample, pixel, channel and class, not "
            f"{samples, size, channels, classes}"
        )
    pool = min(samples, _POOL)
    inputs = torch.randn(pool, channels, size, size)
    return Repeated(inputs, torch.randint(classes, (pool,)), samples), None
