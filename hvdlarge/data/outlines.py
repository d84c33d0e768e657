"""Characters as grey images, drawn from the outlines of the fonts that matplotlib ships.

Formula:  a pixel's value is the share of its 4×4 sample points that the outline winds around
Contract: the same bytes on every machine with the same font files: the outlines are the integers
          of the files, the arithmetic is single operations of IEEE doubles, and no rendering
          library takes part.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Point = tuple[float, float]

_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-BoldOblique", "-Oblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-BoldOblique", "-Oblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-BoldItalic", "-Italic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "BolIta", "Italic")),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
_NEEDED = "needs matplotlib, whose fonts it draws: pip install 'hvdlarge[glyphs]'"
_SAMPLES = 4  # points per pixel and direction
_PIECES = 8  # lines per curve
_FILLED = 5 / 7  # of the image's side, by the longer side of a character; MNIST: 20 of 28


def font_files() -> list[Path]:
    """The fonts, in a fixed order.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed, or ships other fonts.
    """
    package = importlib.util.find_spec("matplotlib")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(_NEEDED)
    # Importing matplotlib takes most of a second
    folder = Path(package.submodule_search_locations[0]) / "mpl-data"
    if not folder.is_dir():  # a distribution keeps them elsewhere
        import matplotlib

        folder = Path(matplotlib.get_data_path())
    files = [folder / "fonts" / "ttf" / f"{name}.ttf" for name in _FONTS]
    if missing := [file for file in files if not file.is_file()]:
        raise ModuleNotFoundError(f"this matplotlib has no font {missing[0]}: {_NEEDED}")
    return files


def digest(files: Sequence[Path]) -> str:
    """The SHA-256 of some files together."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def draw(file: Path, characters: str, side: int) -> np.ndarray:
    """Characters of a font in white on black, each centred and as large as the others.

    Args:
        file: of a TrueType font.
        characters: to draw.
        side: height and width of an image.

    Returns:
        uint8, shape (characters, side, side).
    """
    try:
        from fontTools.ttLib import TTFont
    except ModuleNotFoundError:  # matplotlib requires it
        raise ModuleNotFoundError(_NEEDED) from None
    logger = logging.getLogger("fontTools")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of the Computer Modern fonts it dislikes the dates
    try:
        with TTFont(file, lazy=True) as font:
            names, shapes = font.getBestCmap(), font.getGlyphSet()
            outlines = [_lines(shapes, names[ord(character)]) for character in characters]
    finally:
        logger.setLevel(level)
    return np.stack([_filled(_centred(lines, side), side) for lines in outlines])


def _lines(shapes: Any, name: str) -> np.ndarray:
    """The closed outline of a glyph as lines, float64, shape (lines, 2 ends, 2 coordinates)."""
    from fontTools.pens.basePen import BasePen

    lines: list[tuple[Point, Point]] = []

    class Pen(BasePen):
        def _moveTo(self, point: Point) -> None:
            self.first = self.here = point

        def _lineTo(self, point: Point) -> None:
            lines.append((self.here, point))
            self.here = point

        def _qCurveToOne(self, middle: Point, end: Point) -> None:
            start = self.here
            for step in range(1, _PIECES + 1):
                t, s = step / _PIECES, 1 - step / _PIECES
                a, b, c = s * s, 2 * s * t, t * t
                x = a * start[0] + b * middle[0] + c * end[0]
                self._lineTo((x, a * start[1] + b * middle[1] + c * end[1]))

        def _closePath(self) -> None:
            self._lineTo(self.first)

    shapes[name].draw(Pen(shapes))
    return np.array(lines, dtype=np.float64)


def _centred(lines: np.ndarray, side: int) -> np.ndarray:
    """Lines in pixels: x to the right, y down, the outline's box in the middle."""
    low, high = lines.min(axis=(0, 1)), lines.max(axis=(0, 1))
    scale = _FILLED * side / (high - low).max()
    moved = (lines - (low + high) / 2) * scale
    moved[..., 1] = -moved[..., 1]
    return moved + side / 2


def _filled(lines: np.ndarray, side: int) -> np.ndarray:
    """The image of an outline in pixels: where it winds around a point, the point is inside."""
    fine = side * _SAMPLES
    (x0, y0), (x1, y1) = lines[:, 0].T * _SAMPLES, lines[:, 1].T * _SAMPLES
    rows = np.arange(fine) + 0.5
    crosses = (y0[:, None] <= rows) != (y1[:, None] <= rows)  # (lines, fine)
    line, row = np.nonzero(crosses)
    slope = (x1[line] - x0[line]) / (y1[line] - y0[line])
    x = x0[line] + (rows[row] - y0[line]) * slope
    column = np.clip(np.ceil(x - 0.5).astype(np.int64), 0, fine)  # the first point to the right
    direction = np.where(y1[line] > y0[line], 1, -1)
    turns = np.zeros((fine, fine + 1), dtype=np.int64)
    np.add.at(turns, (row, column), direction)
    inside = turns.cumsum(axis=1)[:, :fine] != 0
    counts = inside.reshape(side, _SAMPLES, fine).sum(axis=1, dtype=np.uint8)
    counts = counts.reshape(side, side, _SAMPLES).sum(axis=2, dtype=np.int64)
    return (counts * 255 // _SAMPLES**2).astype(np.uint8)
