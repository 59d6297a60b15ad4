"""Draws points in the plane: samples, over real points."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Floats = npt.NDArray[np.floating]

# Of an image that is a point: one pixel, whose channels are its coordinates.
SHAPE = (1, 1, 2)
# Smaller than a sample, so that real points are seen around it.
_REAL, _SAMPLE = 1, 3
_PAPER, _GREY = (255, 255, 255), (190, 190, 190)
# Blue, of those that most people tell from grey (Okabe and Ito).
_BLUE, _TEXT = (0, 114, 178), (110, 110, 110)
_MARGIN = 4


class Behind(NamedTuple):
    """What samples are drawn over.

    Attributes:
        real: float [n, 1, 1, 2] in [-1, 1], real points as networks see them.
        corners: what the points at (-1, -1) and (1, 1) are in the data.
    """

    real: Floats
    corners: tuple[Floats, Floats]


def draw(
    points: Floats, width: int, behind: Behind | None = None
) -> npt.NDArray[np.uint8]:
    """Draws points as dots, the second coordinate upwards.

    Args:
        points: float [n, 1, 1, 2] in [-1, 1]; others lie on the edge.
        width: of the picture in pixels, and its height.
        behind: what they are drawn over.

    Returns:
        uint8 [width, width, 3].
    """
    picture = np.full((width, width, 3), _PAPER, np.uint8)
    if behind:
        _dot(picture, behind.real, _REAL, _GREY)
    _dot(picture, points, _SAMPLE, _BLUE)
    if not behind:
        return picture
    low, high = ("({:.3g}, {:.3g})".format(*each) for each in behind.corners)
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    bottom = width - _MARGIN
    pen.text((_MARGIN, bottom), low, _TEXT, anchor="lb")
    pen.text((bottom, _MARGIN), high, _TEXT, anchor="rt")
    return np.asarray(image)


def _dot(
    picture: npt.NDArray[np.uint8],
    points: Floats,
    side: int,
    colour: tuple[int, int, int],
) -> None:
    """Puts a square of pixels at each point."""
    width = len(picture)
    flat = np.clip(np.asarray(points, np.float64).reshape(-1, 2), -1.0, 1.0)
    # What no number is, is nowhere.
    flat = flat[np.isfinite(flat).all(1)]
    across = np.rint((flat[:, 0] + 1) / 2 * (width - 1)).astype(np.int64)
    down = np.rint((1 - flat[:, 1]) / 2 * (width - 1)).astype(np.int64)
    for right in range(-(side // 2), side // 2 + 1):
        for below in range(-(side // 2), side // 2 + 1):
            rows = np.clip(down + below, 0, width - 1)
            picture[rows, np.clip(across + right, 0, width - 1)] = colour
