"""A folder of pictures with one folder for each class, read with Pillow when they are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


class Pictures(Dataset):
    """Pairs (picture, class): float32 in [0, 1], shape (3, size, size), and the folder's number.

    Args:
        root: holds one folder for each class; classes are numbered in the order of their names.
        size: pixels of a side, after cropping.
        augment: whether place of the crop and left and right are drawn anew whenever a picture is
            read. hvdlarge seeds torch's generator by the sample, so this does not depend on the
            number of workers or loader processes.
    """

    def __init__(self, root: Path, size: int, augment: bool) -> None:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        self.files = [
            (file, number)
            for number, folder in enumerate(folders)
            for file in sorted(folder.glob("*.png"))  # in the same order on every machine
        ]
        self.size, self.augment = size, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, number = self.files[index]
        with Image.open(file) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
        room = [side - self.size for side in pixels.shape[1:]]
        if self.augment:
            top, left = (int(torch.randint(space + 1, ())) for space in room)
            if torch.rand(()) < 0.5:
                pixels = pixels.flip(2)
        else:
            top, left = (space // 2 for space in room)
        return pixels[:, top : top + self.size, left : left + self.size], number


def folders(root: str, size: int = 32) -> tuple[Pictures, Pictures]:
    """Training and test set of the folders `train` and `test` below `root`."""
    train, test = Path(root) / "train", Path(root) / "test"
    return Pictures(train, size, augment=True), Pictures(test, size, augment=False)
