"""Images of noise, for measuring: of any size and number, out of a small pool in memory."""

from __future__ import annotations

import torch

from hvdlarge.data.in_memory import InMemory

_POOL = 512


class Repeated(InMemory):
    """Few samples, counted as many: sample i is sample i modulo the pool.

    Args:
        inputs: the pool's, shape (n, …).
        targets: the pool's, shape (n, …).
        samples: how many the set is to have.
    """

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, samples: int) -> None:
        super().__init__(inputs, targets)
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().__getitem__(index % len(self.inputs))

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the samples `indices`, shape (n,)."""
        return super().batch(indices % len(self.inputs))


def synthetic_images(
    samples: int, size: int = 32, channels: int = 3, classes: int = 10
) -> tuple[Repeated, None]:
    """Noise with labels drawn at random: nothing can be learnt from it, everything can be timed
    with it.

    Args:
        samples: of the set; at most 512 are different.
        size: height and width, in pixels.
        channels: colours.
        classes: different labels.

    Returns:
        A training set, inputs (n, channels, size, size) float32 of mean 0 and variance 1, targets
        (n,) int64; no test set.

    Raises:
        ValueError: unless all four are at least 1.
    """
    if min(samples, size, channels, classes) < 1:
        raise ValueError(
            "synthetic images need at least 1 sample, pixel, channel and class, not "
            f"{samples, size, channels, classes}"
        )
    pool = min(samples, _POOL)
    inputs = torch.randn(pool, channels, size, size)
    return Repeated(inputs, torch.randint(classes, (pool,)), samples), None
