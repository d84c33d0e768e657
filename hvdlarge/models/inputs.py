"""Checks of a model's inputs, with errors that say what it takes."""

from __future__ import annotations

import torch


def check_images(model: str, images: torch.Tensor, channels: int, sides: tuple[int, ...]) -> None:
    """Raise a ValueError unless images have the shape (n, channels, side, side) for one of
    `sides`, in pixels.
    """
    allowed = [(channels, side, side) for side in sides]
    if tuple(images.shape[1:]) not in allowed:
        takes = " or ".join(_shape(*shape) for shape in allowed)
        raise ValueError(
            f"{model} takes images of the shape {takes} (channels, height, width), not "
            f"{_shape(*images.shape[1:])}"
        )


def check_tokens(name: str, tokens: torch.Tensor, vocabulary: int) -> None:
    """Raise a ValueError unless tokens have the shape (n, length) and are integers in
    [0, vocabulary).

    On a GPU the values are not checked, since reading them would synchronize every step: there
    the embedding's own assertion fails.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(
            f"{name} must be integers of the shape (n, length), not {tokens.dtype} of the shape "
            f"{tuple(tokens.shape)}"
        )
    if tokens.device.type == "cpu" and tokens.numel():
        lowest, highest = tokens.min().item(), tokens.max().item()
        if lowest < 0 or highest >= vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"{name} hold the token {wrong}; the vocabulary has {vocabulary}, 0 to "
                f"{vocabulary - 1}"
            )


def _shape(*sizes: int) -> str:
    return "×".join(map(str, sizes))
