"""What an encoded picture says of its size, before it is decoded.

A file of a megabyte may decode to gigabytes. All here is TensorFlow's C++, for
it is asked of every picture of every batch.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dtrain.errors import UserError
from dtrain.storage import host_memory

# Threads that decode pictures which are not in memory.
NUM_THREADS = min(os.cpu_count() or 1, 16)
# Beyond twice the pixels at which Pillow warns of a "decompression bomb" it
# refuses a picture, and so does dtrain: 13,377 x 13,377.
MAX_PIXELS = 178_956_970
# Of a pixel, at most: its coefficients in a progressive JPEG, the decoded
# colours, the square cut out of them, and the rows that are being averaged.
_BYTES_PER_PIXEL = 16
# A GIF is unpacked with all its frames, which say nothing of their number; LZW
# makes no more pixels than this of a byte.
_GIF_PIXELS_PER_BYTE = 2560
_HEAD_BYTES = 32
_JPEG, _PNG, _GIF = b"\xff\xd8", b"\x89P", b"GI"
# Where PNG (its largest byte first) and GIF say their height and width.
_PLACES = (range(23, 19, -1), range(19, 15, -1), range(8, 10), range(6, 8))


class Room(NamedTuple):
    """How much memory decoding may take.

    Attributes:
        most_bytes: of one picture.
        together_bytes: of one picture while others are decoded, too.
    """

    most_bytes: int
    together_bytes: int

    @classmethod
    def of_host(cls) -> Room:
        """Divides what this machine has left."""
        free = host_memory.available_bytes()
        return cls(free, free // (4 * NUM_THREADS))


class Need(NamedTuple):
    """What a picture says of itself.

    Attributes:
        size: int64 [2], height and width; zeros for other formats, none of
            which is compressed.
        num_bytes: int64 [], of memory that decoding it takes, at most.
    """

    size: tf.Tensor
    num_bytes: tf.Tensor


def need(content: tf.Tensor) -> Need:
    """Reads what a picture says; what is no JPEG but begins so is an OpError.

    Args:
        content: string []; a whole file.
    """
    head = tf.io.decode_raw(content, tf.uint8, fixed_length=_HEAD_BYTES)
    is_jpeg, is_png, is_gif = (
        tf.reduce_all(head[:2] == list(magic)) for magic in (_JPEG, _PNG, _GIF)
    )
    numbers = tf.reduce_sum(tf.cast(head, tf.int64) * _WEIGHTS, axis=1)
    png, gif = numbers[:2], numbers[2:]
    size = tf.cond(
        is_jpeg,
        lambda: tf.cast(tf.io.extract_jpeg_shape(content)[:2], tf.int64),
        lambda: tf.where(is_png, png, tf.where(is_gif, gif, [0, 0])),
    )
    size = tf.ensure_shape(size, [2])
    length = tf.cast(tf.strings.length(content), tf.int64)
    frames = tf.where(is_gif, length * _GIF_PIXELS_PER_BYTE, 0)
    return Need(size, tf.reduce_prod(size) * _BYTES_PER_PIXEL + frames)


def _make_weights() -> np.ndarray:
    weights = np.zeros((len(_PLACES), _HEAD_BYTES), np.int64)
    for row, places in enumerate(_PLACES):
        for power, place in enumerate(places):
            weights[row, place] = 256**power
    return weights


_WEIGHTS = _make_weights()


def fits(needed: Need, room: Room) -> tf.Tensor:
    """Tells, bool [], whether a picture may be decoded."""
    return (tf.reduce_prod(needed.size) <= MAX_PIXELS) & (
        needed.num_bytes <= room.most_bytes
    )


def check(name: str, content: bytes, room: Room) -> None:
    """Refuses a picture that is too large to be decoded.

    Args:
        name: of the picture, for the error.
        content: a whole file.
        room: how much memory it may take.

    Raises:
        UserError: it is too large.
        tf.errors.OpError: it cannot be read.
    """
    needed = need(tf.constant(content))
    height, width = needed.size.numpy()
    why = too_large(height, width, len(content), room, int(needed.num_bytes))
    if why:
        raise UserError(f"{name} {why}: make it smaller, or remove it")


def too_large(
    height: int, width: int, length: int, room: Room, num_bytes: int = 0
) -> str:
    """Says why a picture is not decoded; empty if it may be.

    Args:
        height: in pixels, as it says itself.
        width: in pixels.
        length: bytes of the file.
        room: how much memory it may take.
        num_bytes: of memory that decoding it takes, if that is known.
    """
    num_pixels = int(height) * int(width)
    num_bytes = num_bytes or num_pixels * _BYTES_PER_PIXEL
    if num_pixels > MAX_PIXELS:
        why = f"at most {MAX_PIXELS:,} pixels are decoded"
    elif num_bytes > room.most_bytes:
        why = (
            f"to decode it may take {host_memory.gib(num_bytes)}, and "
            f"{host_memory.gib(room.most_bytes)} of memory are free"
        )
    else:
        return ""
    return f"says it is {height} x {width} pixels in {length:,} bytes; {why}"
