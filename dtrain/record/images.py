"""Pictures for people: grids, PNG files and GIF animations."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from dtrain.record import scatter
from dtrain.storage import files

# Narrower grids are enlarged: 8x8 digits are a few millimetres on a screen.
MIN_GRID_WIDTH = 512

# Not black, on which black images would run together.
_BACKGROUND = 64


def to_uint8(images: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Converts images in [-1, 1] to 8 bits a channel.

    Args:
        images: float, any shape, in [-1, 1]; others are clipped.

    Returns:
        uint8, the same shape; -1 is 0, 1 is 255, to the nearest value.
    """
    values = np.asarray(images, dtype=np.float32)
    return np.clip(np.rint((values + 1.0) * 127.5), 0, 255).astype(np.uint8)


def make_grid(
    images: npt.ArrayLike,
    columns: int,
    padding: int = 1,
    min_width: int = MIN_GRID_WIDTH,
    behind: scatter.Behind | None = None,
) -> npt.NDArray[np.uint8]:
    """Lays images out in rows, on dark grey; points are dots of one picture.

    Args:
        images: float [n, H, W, C] in [-1, 1], n at least 1, C 1 to 4: grey or
            RGB, with an alpha where it is even.
        columns: images in a row, at least 1; the last row may be shorter.
        padding: pixels, before enlarging, around and between the images.
        min_width: pixels; a narrower grid is enlarged by the smallest whole
            factor that reaches it, each pixel repeated. 0 leaves it as it is.
        behind: what points are drawn over.

    Returns:
        uint8 [height, width, C], C 1 or 3; what is transparent is on the grey.
    """
    images = np.asarray(images)
    if images.shape[1:] == scatter.SHAPE:
        return scatter.draw(images, min_width or MIN_GRID_WIDTH, behind)
    tiles = _on_background(to_uint8(images))
    num_images, height, width, channels = tiles.shape
    assert num_images >= 1, "a grid of no images"
    assert columns >= 1, columns
    rows = -(-num_images // columns)
    down, right = height + padding, width + padding
    grid = np.full(
        (rows * down + padding, columns * right + padding, channels),
        _BACKGROUND,
        np.uint8,
    )
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        top, left = padding + row * down, padding + column * right
        grid[top : top + height, left : left + width] = tile
    factor = max(1, -(-min_width // grid.shape[1]))
    return grid.repeat(factor, axis=0).repeat(factor, axis=1)


def _on_background(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Puts images with an alpha on the background of grids."""
    if images.shape[-1] % 2:
        return images
    colours, alpha = images[..., :-1].astype(np.int32), images[..., -1:]
    mixed = colours * alpha + _BACKGROUND * (255 - alpha.astype(np.int32))
    return ((mixed + 127) // 255).astype(np.uint8)


def encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    """Returns the content of a PNG file.

    Args:
        image: uint8 [H, W, C], C 1 to 4.
    """
    content = io.BytesIO()
    _to_pillow(image).save(content, format="PNG")
    return content.getvalue()


def write_png(path: str, image: npt.NDArray[np.uint8]) -> None:
    """Writes an image, whole or, with an OSError, not at all.

    Args:
        path: the file, local or gs://; one that is there is replaced. Its
            directory is made if it is not there.
        image: uint8 [H, W, C], C 1 to 4.
    """
    write(path, encode_png(image))


def write_gif(
    path: str,
    frames: Sequence[npt.NDArray[np.uint8]],
    milliseconds: int = 80,
) -> None:
    """Writes an animation that repeats for ever, as `write_png` does.

    Args:
        path: as in `write_png`.
        frames: uint8 [H, W, C] of one shape, C 1 or 3; at least one.
        milliseconds: how long a frame is shown; GIF counts in tens.
    """
    assert frames, "an animation of no frames"
    first, *rest = [_to_pillow(frame) for frame in frames]
    content = io.BytesIO()
    first.save(
        content,
        format="GIF",
        save_all=True,
        append_images=rest,
        duration=milliseconds,
        loop=0,
        optimize=False,
    )
    write(path, content.getvalue())


def _to_pillow(image: npt.NDArray[np.uint8]) -> Image.Image:
    assert image.dtype == np.uint8, image.dtype
    if image.shape[-1] == 1:
        return Image.fromarray(image[..., 0])
    assert image.shape[-1] in (2, 3, 4), image.shape
    return Image.fromarray(image)


def write(path: str, content: bytes) -> None:
    """Writes a file, whole or not at all, and makes its directory.

    Who looks at it meanwhile, as by an image viewer, never sees half a file.

    Args:
        path: the file.
        content: all of it.
    """
    files.make_directory(os.path.dirname(path))
    files.write(path, content, is_durable=False)


def write_or_say(path: str, content: bytes) -> None:
    """Writes a picture of a run, which goes on without it.

    Args:
        path: in the directory of the run, or in one below it; a run that was
            moved is not begun again here.
        content: all of it.
    """
    try:
        files.make_directory(os.path.dirname(path), parents=False)
        files.write(path, content, is_durable=False)
    except OSError as error:
        print(
            f"{os.path.basename(path)} was not written: {files.reason(error)}",
            file=sys.stderr,
            flush=True,
        )
