"""Decodes by Pillow what TensorFlow does not decode, or decodes in part.

WebP, TIFF, AVIF, the PPM family; GIF, of which TensorFlow unpacks every frame
and loses what is transparent; BMP, whose palettes it does not know.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dtrain.data.sources import conversion, pictures

_FORMATS = (
    *("WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM"),
    # With notes of a camera that only Pillow reads.
    *("PNG", "JPEG"),
)
# What Pillow raises on files that are not sound.
_MALFORMED = (
    *(OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError),
    *(EOFError, AttributeError, OverflowError, ZeroDivisionError),
    *(NotImplementedError, RuntimeError, MemoryError, AssertionError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_16_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_MOST_OF_MAP = 2**16 - 1
# By the end of what Pillow calls the bits of a grey value.
_SPREAD = (("L;2", 85), ("L;4", 17))
# Its tag in a TIFF.
_BITS_PER_SAMPLE = 258


class PictureError(ValueError):
    """A picture cannot be decoded; the text says why, in part of a line."""


def decode(content: bytes, white_level: int, room: pictures.Room) -> np.ndarray:
    """Decodes a picture, or the first of its frames.

    Args:
        content: a whole file.
        white_level: what is white where the picture has 16 bits.
        room: how much memory it may take.

    Returns:
        uint8 [H, W, C]: grey, grey and alpha, RGB, or RGB and alpha, turned as
        its EXIF orientation asks for.

    Raises:
        PictureError: it is damaged, too large, or of a kind that is not read.
    """
    return _decoded(content, room, lambda image: _pixels(image, white_level))


def decode_map(content: bytes, room: pictures.Room) -> np.ndarray:
    """Decodes a label map: the numbers of its pixels, or of their palette.

    Args:
        content: a whole file.
        room: how much memory it may take.

    Returns:
        uint16 [H, W, 1].

    Raises:
        PictureError: it is damaged, too large, or has colours.
    """
    return _decoded(content, room, _numbers)


def _decoded(
    content: bytes,
    room: pictures.Room,
    pixels: Callable[[Image.Image], np.ndarray],
) -> np.ndarray:
    """Decodes a picture by what makes an array of it.

    Raises:
        PictureError: it is damaged, too large, or of a kind that is not read.
    """
    try:
        with warnings.catch_warnings():
            # Of what is odd and can be read all the same.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                width, height = image.size
                why = pictures.too_large(height, width, len(content), room)
                if why:
                    raise PictureError(why)
                return pixels(image)
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"it has more than {pictures.MAX_PIXELS:,} pixels"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise PictureError("it is no picture of a known format") from error
    except PictureError:
        raise
    except _MALFORMED as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise PictureError(lines[0].rstrip(".")) from error


def highest(content: bytes, room: pictures.Room) -> int:
    """Returns the highest value of a picture; -1 if it has not 16 bits.

    Args:
        content: a whole file.
        room: how much memory it may take.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
            is_large = pictures.too_large(height, width, len(content), room)
            if image.mode not in _16_BITS or is_large:
                return -1
            return int(np.asarray(image).max())
    except _MALFORMED:
        # It is told when the picture is decoded.
        return -1


def _numbers(image: Image.Image) -> np.ndarray:
    if image.mode not in ("1", "L", "P", *_16_BITS) or image.format == "JPEG":
        raise PictureError(
            f"a label map has one whole number a pixel, and this is a "
            f"{image.format} of mode {image.mode}; save it as a grey PNG, or "
            "as one with a palette"
        )
    spread = _spread(image)
    values = np.asarray(ImageOps.exif_transpose(image)) // spread
    if values.min() < 0 or values.max() > _MOST_OF_MAP:
        raise PictureError(
            f"it holds {values.min()} to {values.max()}, and the numbers of a "
            f"label map lie in [0, {_MOST_OF_MAP}]"
        )
    return values.astype(np.uint16)[..., np.newaxis]


def _spread(image: Any) -> int:
    """Returns what Pillow multiplies grey values of 2 or 4 bits by.

    Raises:
        PictureError: it multiplies them by another number.
    """
    codec, _, _, how = image.tile[0]
    rawmode = how[0] if isinstance(how, tuple) else how
    if image.format == "PPM" and codec != "raw":
        raise PictureError(
            "a label map in PGM must be binary, with the white 255 or 65535; "
            "save it as PNG"
        )
    return next((by for end, by in _SPREAD if str(rawmode).endswith(end)), 1)


def _pixels(image: Image.Image, white_level: int) -> np.ndarray:
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
    is_deep = len(bits) > 1 and max(bits) > 8
    if image.mode == "F" or is_deep:
        what = f"{max(bits)} bits a channel in colour" if is_deep else "floats"
        raise PictureError(f"{what} are not read; save it as PNG")
    kind = image.format
    image = ImageOps.exif_transpose(image)
    if image.mode in _16_BITS:
        values = np.asarray(image).astype(np.float32)[..., np.newaxis]
        if values.min() < 0 or values.max() > white_level:
            raise PictureError(conversion.LEVELS)
        scale = np.float32(conversion.Levels(0.0, white_level).scale)
        return np.rint(values * scale).astype(np.uint8)
    # A GIF in greys is no other kind of picture than one in colours.
    is_grey = image.mode in ("1", "L", "LA", "La") and kind != "GIF"
    mode = "L" if is_grey else "RGB"
    if image.has_transparency_data:
        mode = "LA" if is_grey else "RGBA"
    pixels = np.asarray(image.convert(mode))
    return pixels[..., np.newaxis] if mode == "L" else pixels
