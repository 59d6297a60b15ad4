"""Converts images to the size and the channels that a run asks for.

It is all done by TensorFlow's C++, and to one image as to many.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf


def convert(images: tf.Tensor, image_size: int, channels: int) -> tf.Tensor:
    """Converts channels, crops the middle square, resizes.

    Resizing is bilinear, with antialiasing where it makes images smaller.
    RGB becomes grey by its luma; an alpha channel is dropped.

    Args:
        images: uint8 [..., H, W, C], of rank 3 or 4; C is known.
        image_size: pixels a side of the result; 0 keeps H and W.
        channels: 1 or 3; 0 keeps C.

    Returns:
        uint8 [..., image_size, image_size, channels].
    """
    images = _with_channels(images, channels or images.shape[-1])
    if not image_size:
        return images
    height, width = tf.shape(images)[-3], tf.shape(images)[-2]
    side = tf.minimum(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[..., top : top + side, left : left + side, :]
    resized = tf.image.resize(images, (image_size, image_size), antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)


def converted_shape(
    shape: Sequence[int], image_size: int, channels: int
) -> tuple[int, int, int]:
    """Returns the height, width and channels of an image after `convert`.

    Args:
        shape: height, width and channels before.
        image_size: as of `convert`.
        channels: as of `convert`.
    """
    height, width, old_channels = shape
    if image_size:
        height = width = image_size
    return height, width, channels or old_channels


def _with_channels(images: tf.Tensor, channels: int) -> tf.Tensor:
    if images.shape[-1] == channels:
        return images
    colours = 3 if images.shape[-1] >= 3 else 1
    images = images[..., :colours]
    if colours == channels:
        return images
    if channels == 1:
        return tf.image.rgb_to_grayscale(images)
    return tf.image.grayscale_to_rgb(images)
