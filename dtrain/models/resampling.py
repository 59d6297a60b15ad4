"""Doubles and halves images, through the filter [1, 3, 3, 1].

The filter is that of Karras et al. 2020, Analyzing and Improving the Image
Quality of StyleGAN, after Zhang 2019, Making Convolutional Networks Shift-
Invariant Again. Beyond its edges an image is zero.

Each is one convolution of every channel by itself, which TensorFlow and XLA
differentiate as often as one likes.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

_FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64.0


def upsample(images: tf.Tensor) -> tf.Tensor:
    """Puts zeros between pixels and filters, with the mean of the images.

    Args:
        images: float [b, h, w, channels].

    Returns:
        [b, 2 h, 2 w, channels].
    """
    count, height, width, channels = images.shape
    count = tf.shape(images)[0] if count is None else count
    # What the gradient of a convolution that halves does.
    return tf.nn.depthwise_conv2d_backprop_input(
        [count, 2 * height, 2 * width, channels],
        4.0 * _filter_of(images),
        images,
        [1, 2, 2, 1],
        "SAME",
    )


def downsample(images: tf.Tensor) -> tf.Tensor:
    """Filters, and keeps every other pixel.

    Args:
        images: float [b, h, w, channels], h and w even.

    Returns:
        [b, h / 2, w / 2, channels].
    """
    return tf.nn.depthwise_conv2d(
        images, _filter_of(images), [1, 2, 2, 1], "SAME"
    )


def blur(images: tf.Tensor, edge: int) -> tf.Tensor:
    """Filters, with the mean of the images.

    Args:
        images: float [b, h, w, channels].
        edge: zeros around the images.

    Returns:
        [b, h + 2 edge - 3, w + 2 edge - 3, channels].
    """
    edges = [[0, 0], [edge, edge], [edge, edge], [0, 0]]
    return tf.nn.depthwise_conv2d(
        tf.pad(images, edges), _filter_of(images), [1, 1, 1, 1], "VALID"
    )


@keras.saving.register_keras_serializable(package="dtrain")
class Upsample(keras.layers.Layer):
    """Makes features twice as large, by `upsample`."""

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """Returns [b, 2 h, 2 w, channels]."""
        return upsample(features)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape of the output."""
        batch, height, width, channels = input_shape
        return batch, 2 * height, 2 * width, channels


@keras.saving.register_keras_serializable(package="dtrain")
class Downsample(keras.layers.Layer):
    """Makes features half as large, by `downsample`."""

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """Returns [b, h / 2, w / 2, channels]."""
        return downsample(features)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape of the output."""
        batch, height, width, channels = input_shape
        return batch, height // 2, width // 2, channels


def _filter_of(images: tf.Tensor) -> tf.Tensor:
    """Returns the filter for each channel, [4, 4, channels, 1]."""
    whole = np.tile(_FILTER[:, :, None, None], (1, 1, images.shape[3], 1))
    return tf.constant(whole, images.dtype)
