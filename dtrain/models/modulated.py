"""Convolutions whose kernel each example scales by its style.

Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN,
section 2.2. Styles scale the features instead of the kernel, equation (1), and
the deviation that this brings is divided out of what is made, equation (3): so
one convolution serves all examples.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from dtrain.models import equalized, resampling

_EPSILON = 1e-8


class _Modulated(keras.layers.Layer):
    """What both of them have: an affine map of styles, a kernel, biases."""

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters

    def _add_weights(
        self, channels: int, size_of_style: int, size: int
    ) -> None:
        # A style is 1 at first: it changes nothing.
        self.affine = equalized.EqualizedDense(
            channels, first_bias=1.0, dtype="float32", name="affine"
        )
        self.affine.build((None, size_of_style))
        self.kernel = self.add_weight(
            shape=(size, size, channels, self.filters),
            initializer=equalized.standard_normal(),
            name="kernel",
        )
        self.bias = self.add_weight(
            shape=(self.filters,), initializer="zeros", name="bias"
        )
        self._scale = 1.0 / math.sqrt(size * size * channels)

    def _modulate(
        self, features: tf.Tensor, style: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the features times the styles, and these, float32 [b, c]."""
        scales = self.affine(style)
        return features * _of_images(scales, features.dtype), scales

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {**super().get_config(), "filters": self.filters}


def _of_images(values: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tf.cast(values, dtype)[:, None, None, :]


@keras.saving.register_keras_serializable(package="dtrain")
class ModulatedConv2D(_Modulated):
    """Modulates, convolves 3x3, demodulates, adds noise, a bias; activates."""

    def __init__(
        self, filters: int, doubles: bool = False, **kwargs: Any
    ) -> None:
        """Creates the layer.

        Args:
            filters: channels that it makes.
            doubles: whether the image is made twice as large.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(filters, **kwargs)
        self.doubles = doubles

    def build(self, input_shape: Any) -> None:
        """Makes the variables; for the shapes see `call`."""
        (*_, channels), (*_, size_of_style), _ = input_shape
        self._add_weights(channels, size_of_style, 3)
        self.noise_strength = self.add_weight(
            shape=(), initializer="zeros", name="noise_strength"
        )

    def call(self, inputs: Any) -> tf.Tensor:
        """Makes features [b, H, W, filters], in the compute type.

        Args:
            inputs: features [b, h, w, channels], a style [b, numbers] of each,
                and noise [b, H, W, 1], of the size that is made.
        """
        features, style, noise = inputs
        features, scales = self._modulate(features, style)
        kernel = self._scale * self.kernel
        if self.doubles:
            made = _doubled(features, kernel)
        else:
            made = tf.nn.conv2d(features, kernel, 1, "SAME")
        # float32, for a sum of squares of 16 bits would be rough.
        squares = tf.reduce_sum(tf.square(tf.cast(kernel, tf.float32)), [0, 1])
        variances = tf.square(scales) @ squares
        made *= _of_images(tf.math.rsqrt(variances + _EPSILON), made.dtype)
        made += self.noise_strength * tf.cast(noise, made.dtype)
        return equalized.activated(tf.nn.bias_add(made, self.bias))

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {**super().get_config(), "doubles": self.doubles}


def _doubled(features: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """Puts zeros between pixels, convolves and filters; [b, 2 h, 2 w, filters].

    The convolution comes first, for it then meets the pixels alone.
    """
    height, width = features.shape[1:3]
    size, _, _, filters = kernel.shape
    made = tf.nn.conv2d_transpose(
        features,
        tf.transpose(kernel, [0, 1, 3, 2]),
        [
            tf.shape(features)[0],
            *(2 * side + size - 2 for side in (height, width)),
            filters,
        ],
        2,
        "VALID",
    )
    # Four values where there was one: the filter's mean is to stay.
    return 4.0 * resampling.blur(made, 1)


@keras.saving.register_keras_serializable(package="dtrain")
class ToImage(_Modulated):
    """Modulates, and convolves 1x1 to the channels of an image."""

    def build(self, input_shape: Any) -> None:
        """Makes the variables; for the shapes see `call`."""
        (*_, channels), (*_, size_of_style) = input_shape
        self._add_weights(channels, size_of_style, 1)

    def call(self, inputs: Any) -> tf.Tensor:
        """Makes an image, float32 [b, h, w, filters].

        Args:
            inputs: features [b, h, w, channels], a style [b, numbers] of each.
        """
        features, _ = self._modulate(*inputs)
        made = tf.nn.conv2d(features, self._scale * self.kernel, 1, "SAME")
        return tf.cast(tf.nn.bias_add(made, self.bias), tf.float32)
