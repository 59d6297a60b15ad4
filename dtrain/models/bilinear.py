"""Layers that double and halve the size of features, bilinearly.

The filter [1, 3, 3, 1], which is [1, 2, 1] beside a copy of itself, along each
side, with zeros around the features: of a doubled size each number is three
quarters of one and a quarter of its neighbour. Karras et al. 2020, Analyzing
and Improving the Image Quality of StyleGAN, resample so; and R3GAN.

Sums of slices, for which XLA, and second derivatives, need no convolution.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="dtrain")
class Upsample(keras.layers.Layer):
    """Doubles both sides of features."""

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """Upsamples features.

        Args:
            features: float [b, h, w, channels].

        Returns:
            The same type, [b, 2 h, 2 w, channels].
        """
        return _doubled(_doubled(features, 1), 2)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape of the output."""
        batch, height, width, channels = input_shape
        return batch, 2 * height, 2 * width, channels


@keras.saving.register_keras_serializable(package="dtrain")
class Downsample(keras.layers.Layer):
    """Halves both sides of features, which are even."""

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """Downsamples features.

        Args:
            features: float [b, 2 h, 2 w, channels].

        Returns:
            The same type, [b, h, w, channels].
        """
        return _halved(_halved(features, 1), 2)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape of the output."""
        batch, height, width, channels = input_shape
        return batch, height // 2, width // 2, channels


def _shifted(features: tf.Tensor, axis: int, by: int) -> tf.Tensor:
    """Moves features along a side by one; a zero comes in."""
    size = features.shape[axis]
    edges = [[0, 0]] * 4
    edges[axis] = [1, 0] if by > 0 else [0, 1]
    begin = [0] * 4
    begin[axis] = max(0, -by)
    lengths = [-1] * 4
    lengths[axis] = size - 1
    return tf.pad(tf.slice(features, begin, lengths), edges)


def _doubled(features: tf.Tensor, axis: int) -> tf.Tensor:
    before, after = _shifted(features, axis, 1), _shifted(features, axis, -1)
    both = [0.75 * features + 0.25 * before, 0.75 * features + 0.25 * after]
    shape = [-1, *features.shape[1:]]
    shape[axis] *= 2
    return tf.reshape(tf.stack(both, axis + 1), shape)


def _halved(features: tf.Tensor, axis: int) -> tf.Tensor:
    shape = [-1, *features.shape[1:]]
    shape[axis : axis + 1] = [shape[axis] // 2, 2]
    first, second = tf.unstack(tf.reshape(features, shape), axis=axis + 1)
    before, after = _shifted(second, axis, 1), _shifted(first, axis, -1)
    return 0.375 * (first + second) + 0.125 * (before + after)
