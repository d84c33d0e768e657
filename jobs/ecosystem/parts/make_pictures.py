"""Writes a folder of small pictures, one folder for each class: python make_pictures.py pictures

    pictures/train/circle/000.png …   pictures/test/star/099.png

Four light shapes of random colour, size, place and rotation on a noisy dark ground of random
colour.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 40  # pixels
CORNERS = {"circle": 40, "star": 10, "square": 4, "triangle": 3}  # of polygons; a star's alternate


def picture(shape: str, draw: random.Random) -> Image.Image:
    """One picture of a shape."""
    noise = np.random.default_rng(draw.getrandbits(32)).normal(0, 8, (SIZE, SIZE, 3))
    ground = [draw.randrange(100) for _ in range(3)]
    colour = [draw.randrange(156, 256) for _ in range(3)]
    pixels = Image.new("RGB", (SIZE, SIZE), tuple(ground))
    radius = draw.uniform(8, 15)
    x, y = (draw.uniform(radius, SIZE - radius) for _ in range(2))
    turn, count = draw.uniform(0, 2 * math.pi), CORNERS[shape]
    corners = []
    for index in range(count):
        distance = radius / 2 if shape == "star" and index % 2 else radius
        angle = turn + 2 * math.pi * index / count
        corners.append((x + distance * math.cos(angle), y + distance * math.sin(angle)))
    ImageDraw.Draw(pixels).polygon(corners, fill=tuple(colour))
    return Image.fromarray((np.asarray(pixels) + noise).clip(0, 255).astype(np.uint8))


def write(folder: Path, train: int = 500, test: int = 100) -> None:
    """Write `train` and `test` pictures of each class; the same ones each time."""
    draw = random.Random(0)
    for split, count in (("train", train), ("test", test)):
        for shape in CORNERS:
            place = folder / split / shape
            place.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                picture(shape, draw).save(place / f"{index:03}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
