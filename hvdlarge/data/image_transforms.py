"""Transforms of whole batches of images, on the device of the model.

Formula:  every number that sample s draws in transform t is key(seed, TRANSFORM, t, s, i), i = 0,
          1, …, as a fraction of 2^53 (data/seeds.py);
          random crop: padded image at (y, x), both uniform on 0 … 2·padding;
          random resized crop: area share a uniform, aspect ratio r log-uniform, width √(a·H·W·r)
          and height √(a·H·W/r), each at most the image's, place uniform; bilinear;
          mixup: image i of n becomes λᵢ·xᵢ + (1 − λᵢ)·xₙ₋₁₋ᵢ, and so its one-hot target,
          λᵢ ~ Beta(α, α)
Source:   crop and flip: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2016),
          section 4.2. Resized crop: Szegedy et al., "Going Deeper with Convolutions" (2015),
          section 6; parts that do not fit are cut to the image instead of being drawn again.
          Mixup: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization"
          (2018), equation 1, with a weight for each image.
Contract: what a sample draws depends on the seed and its number in the run alone. Mixup also
          depends on the micro-batch, whose images it mixes; with a fixed `batch.micro` these do not
          depend on the number of workers (schedule/batch.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hvdlarge.data import seeds
from hvdlarge.exits import PartError


class TransformError(PartError):
    """A batch does not have the form that a transform takes."""

    origin = "the data set"


class Draws:
    """The random numbers of one transform for the samples of a micro-batch.

    Args:
        seed: of the run.
        number: place of the transform in the job's list.
        samples: numbers of the samples in the run, shape (n,).
    """

    def __init__(self, seed: int, number: int, samples: NDArray[np.int64]) -> None:
        self._seed, self._number, self._samples = seed, number, samples

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers from 0 to 1, without 1, shape (n, count)."""
        keys = seeds.keys(
            self._seed, seeds.TRANSFORM, self._number, self._samples[:, None], np.arange(count)
        )
        return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, below: int, count: int) -> NDArray[np.int64]:
        """Integers from 0 to `below` − 1, shape (n, count)."""
        return (self.uniform(count) * below).astype(np.int64)

    def beta(self, alpha: float) -> NDArray[np.float64]:
        """Numbers of Beta(alpha, alpha), shape (n,)."""
        keys = seeds.keys(self._seed, seeds.TRANSFORM, self._number, self._samples)
        return np.array(
            [np.random.Generator(np.random.PCG64(int(k))).beta(alpha, alpha) for k in keys]
        )


def crop(images: torch.Tensor, padding: int, corners: NDArray[np.int64]) -> torch.Tensor:
    """Windows of the images' size in the images with a border of zeros.

    Args:
        images: shape (n, channels, height, width).
        padding: width of the border on each side.
        corners: row and column of each window's upper left corner in the padded image, shape
            (n, 2), from 0 to 2·padding.
    """
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, [padding] * 4)
    top, left = torch.from_numpy(corners.T.copy()).to(images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    numbers = torch.arange(len(images), device=images.device)
    # The indexed dimensions come first: (n, height, width, channels)
    windows = padded[numbers[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return windows.permute(0, 3, 1, 2).contiguous()


def flip(images: torch.Tensor, chosen: NDArray[np.bool_]) -> torch.Tensor:
    """The images, mirrored from left to right where they are `chosen`, shape (n,)."""
    mask = torch.from_numpy(chosen).to(images.device)[:, None, None, None]
    return torch.where(mask, images.flip(-1), images)


def random_boxes(
    draws: Draws,
    height: int,
    width: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.float64]:
    """Parts of an image, as in the formula.

    Returns:
        Centre y, centre x, height and width of each part, over the image's, shape (n, 4).
    """
    share, log_ratio, y, x = draws.uniform(4).T
    pixels = (area[0] + share * (area[1] - area[0])) * height * width
    low, high = np.log(ratio)
    aspect = np.exp(low + log_ratio * (high - low))
    tall = np.minimum(np.sqrt(pixels / aspect) / height, 1.0)
    wide = np.minimum(np.sqrt(pixels * aspect) / width, 1.0)
    return np.stack([tall / 2 + y * (1 - tall), wide / 2 + x * (1 - wide), tall, wide], axis=1)


def centre_box(height: int, width: int, share: float) -> NDArray[np.float64]:
    """The square in the centre whose side is `share` of the shorter side, as `random_boxes`, shape
    (1, 4).
    """
    side = share * min(height, width)
    return np.array([[0.5, 0.5, side / height, side / width]])


def resize_boxes(images: torch.Tensor, boxes: NDArray[np.float64], size: int) -> torch.Tensor:
    """Parts of images, resized to size × size pixels; bilinear, without antialiasing.

    Args:
        images: shape (n, channels, height, width).
        boxes: of each image, or of all, as `random_boxes` gives them, shape (n, 4) or (1, 4).
        size: pixels.
    """
    y, x, tall, wide = np.broadcast_to(boxes, (len(images), 4)).T[..., None]
    pixels = (2 * np.arange(size) + 1) / size - 1  # centres, from −1 to 1 over the part
    rows, columns = (
        torch.from_numpy(2 * centre - 1 + extent * pixels).to(images)
        for centre, extent in ((y, tall), (x, wide))
    )
    grid = torch.stack(
        [
            columns[:, None, :].expand(-1, size, -1),
            rows[:, :, None].expand(-1, -1, size),
        ],
        dim=-1,
    )
    return torch.nn.functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(x − mean) / std for each channel.

    Raises:
        TransformError: for another number of channels.
    """
    if len(mean) != images.shape[1]:
        raise TransformError(
            f"normalize has {len(mean)} means, and the images have {images.shape[1]} channels"
        )
    means, stds = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - means) / stds


def mixup(
    images: torch.Tensor, targets: torch.Tensor, weights: NDArray[np.float64], classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image mixed with the one as far from the other end of the micro-batch.

    Args:
        images: shape (n, channels, height, width).
        targets: class indices, shape (n,).
        weights: λ of each image, shape (n,).
        classes: number of classes.

    Returns:
        The images, and probabilities of the classes, shape (n, classes).

    Raises:
        TransformError: for targets that are not class indices below `classes`; on a GPU, where
            reading them would make every step wait, torch reports those that are too large.
    """
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        raise TransformError("mixup takes class indices, one for each image")
    targets = targets.long()
    if targets.device.type == "cpu" and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise TransformError(
            f"mixup has {classes} classes; the targets go from {targets.min()} to {targets.max()}"
        )
    weight = torch.from_numpy(weights).to(images)
    one_hot = torch.nn.functional.one_hot(targets, classes).to(images.dtype)
    spread = weight[:, None, None, None]
    mixed = spread * images + (1 - spread) * images.flip(0)
    return mixed, weight[:, None] * one_hot + (1 - weight[:, None]) * one_hot.flip(0)
