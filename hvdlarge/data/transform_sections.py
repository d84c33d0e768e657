"""The transforms of images as sections of the job file: their typed keys, and what each one does.

Contract: importable without torch; every size and range is checked when the job is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    import torch

    from hvdlarge.data.image_transforms import Draws

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Transform(BaseModel):
    """A change of a batch of images, shape (n, channels, height, width), on the device.

    In training it may draw at random, and the targets may change with the images. In evaluation
    the images become what the model was trained on in every respect that is not random.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )
    if TYPE_CHECKING:
        name: str  # each transform's own, by which the job file tells them apart

    def train(
        self, images: torch.Tensor, targets: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets as the model is trained on them."""
        return self.evaluate(images), targets

    def evaluate(self, images: torch.Tensor) -> torch.Tensor:
        """Images as the model is evaluated on them."""
        return images


class RandomCrop(Transform):
    """A window of the image's size at a random place of the image with a border of zeros."""

    name: Literal["random_crop"] = "random_crop"
    """Crop at a random place of the padded image, as for CIFAR (He et al. 2016, section 4.2)."""
    padding: Count = 4
    """Border on each side, in pixels."""

    def train(
        self, images: torch.Tensor, targets: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Transform."""
        from hvdlarge.data import image_transforms

        corners = draws.integers(2 * self.padding + 1, 2)
        return image_transforms.crop(images, self.padding, corners), targets


class RandomFlip(Transform):
    """A mirror image, left to right, of some of the images."""

    name: Literal["random_flip"] = "random_flip"
    """Mirror an image from left to right with a probability."""
    probability: Probability = 0.5
    """Probability of each image."""

    def train(
        self, images: torch.Tensor, targets: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Transform."""
        from hvdlarge.data import image_transforms

        return image_transforms.flip(images, draws.uniform(1)[:, 0] < self.probability), targets


class RandomResizedCrop(Transform):
    """A random part of the image, resized; in evaluation the centre."""

    name: Literal["random_resized_crop"] = "random_resized_crop"
    """Crop a random part of the image and resize it, as for ImageNet (Szegedy et al. 2015)."""
    size: Count
    """Height and width of the result, in pixels."""
    area: tuple[Share, Share] = (0.08, 1.0)
    """Smallest and largest part of the image's area."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of the part; the logarithm is drawn uniformly."""
    centre: Share = 0.875
    """In evaluation: height and width of the part in the centre, over the image's shorter side."""

    @model_validator(mode="after")
    def _fits(self) -> RandomResizedCrop:
        for key in ("area", "ratio"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} must be (smallest, largest), got ({low:g}, {high:g})")
        return self

    def train(
        self, images: torch.Tensor, targets: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Transform."""
        from hvdlarge.data import image_transforms

        height, width = images.shape[-2:]
        boxes = image_transforms.random_boxes(draws, height, width, self.area, self.ratio)
        return image_transforms.resize_boxes(images, boxes, self.size), targets

    def evaluate(self, images: torch.Tensor) -> torch.Tensor:
        """See Transform."""
        from hvdlarge.data import image_transforms

        height, width = images.shape[-2:]
        box = image_transforms.centre_box(height, width, self.centre)
        return image_transforms.resize_boxes(images, box, self.size)


class Normalize(Transform):
    """Values less their mean over their standard deviation, for each channel."""

    name: Literal["normalize"] = "normalize"
    """Subtract the mean of each channel and divide by its standard deviation."""
    mean: tuple[Finite, ...]
    """Mean of each channel, of values from 0 to 1."""
    std: tuple[Positive, ...]
    """Standard deviation of each channel, likewise."""

    @model_validator(mode="after")
    def _fits(self) -> Normalize:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")
        return self

    def evaluate(self, images: torch.Tensor) -> torch.Tensor:
        """See Transform."""
        from hvdlarge.data import image_transforms

        return image_transforms.normalize(images, self.mean, self.std)


class Mixup(Transform):
    """Weighted means of two images of a micro-batch, and of their classes."""

    name: Literal["mixup"] = "mixup"
    """Weighted means of two images and of their classes (Zhang et al. 2018)."""
    classes: Count
    """Number of classes; the targets become probabilities, shape (n, classes)."""
    alpha: Positive = 0.2
    """Both parameters of the Beta distribution of the weight, one weight for each image."""

    def train(
        self, images: torch.Tensor, targets: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Transform."""
        from hvdlarge.data import image_transforms

        return image_transforms.mixup(images, targets, draws.beta(self.alpha), self.classes)
