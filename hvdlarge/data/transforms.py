"""Applies a job's transforms of images to its micro-batches, in training and in evaluations.

Contract: runs in the training process, on the device of the model; the loader knows nothing of it.
          What a sample draws depends on its number in the run (image_transforms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hvdlarge.data.image_transforms import Draws, TransformError
from hvdlarge.data.loader import LoadedMicroBatch
from hvdlarge.data.transform_sections import Transform


def _unmoved(batch: Any) -> Any:
    return batch


class Transforms:
    """The transforms of a job, one after the other.

    Args:
        transforms: in the order of the job; without any, micro-batches stay as they are.
        seed: of the run.
        to_device: moves inputs or targets.
        dtype: of the weights; images of bytes become numbers from 0 to 1 of this type.
    """

    def __init__(
        self,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
        to_device: Callable[[Any], Any] = _unmoved,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._transforms, self._seed = transforms, seed
        self._to_device, self._dtype = to_device, dtype

    def train(self, loaded: LoadedMicroBatch) -> LoadedMicroBatch:
        """A micro-batch as the model is trained on it.

        Raises:
            TransformError: unless the inputs are a tensor of images and the targets a tensor.
        """
        if not self._transforms:
            return loaded
        micro_batch = loaded.micro_batch
        images, targets = self._images(loaded), self._to_device(loaded.targets)
        if not isinstance(targets, torch.Tensor):
            raise TransformError("data.transforms takes samples whose targets are tensors")
        samples = np.arange(micro_batch.start, micro_batch.stop, dtype=np.int64)
        for number, transform in enumerate(self._transforms):
            draws = Draws(self._seed, number, samples)
            images, targets = transform.train(images, targets, draws)
        return LoadedMicroBatch(micro_batch, self._to_device(images), targets)

    def evaluate(self, loaded: LoadedMicroBatch) -> LoadedMicroBatch:
        """A micro-batch as the model is evaluated on it.

        Raises:
            TransformError: unless the inputs are a tensor of images.
        """
        if not self._transforms:
            return loaded
        images = self._images(loaded)
        for transform in self._transforms:
            images = transform.evaluate(images)
        return loaded._replace(inputs=self._to_device(images))

    def _images(self, loaded: LoadedMicroBatch) -> torch.Tensor:
        images = self._to_device(loaded.inputs)
        if not isinstance(images, torch.Tensor) or images.ndim != 4:
            shape = f"of shape {tuple(images.shape)}" if hasattr(images, "shape") else "no tensor"
            raise TransformError(
                "data.transforms takes inputs that are images, shape (n, channels, height, width); "
                f"these are {shape}"
            )
        if images.is_floating_point():
            return images
        if images.dtype != torch.uint8:
            dtype = str(images.dtype).removeprefix("torch.")
            raise TransformError(
                f"data.transforms takes images of floats or of bytes (uint8), not of {dtype}"
            )
        return images.to(self._dtype) / 255
