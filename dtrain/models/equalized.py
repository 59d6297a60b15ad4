"""Layers whose weights are standard normal at first, and scaled when used.

    y = act(x W / sqrt(fan in) + b)

Karras et al. 2018, Progressive Growing of GANs, section 4.1, equalized learning
rate: Adam's steps are as large for all weights, whatever their layer's size.
The activation is a leaky ReLU times the square root of 2, which keeps the
variance.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from dtrain.models import resampling

_SLOPE = 0.2
# Beyond, float16 overflows in what follows; Karras et al. 2020, Training
# Generative Adversarial Networks with Limited Data, appendix D.
_FLOAT16_MOST = 256.0


def standard_normal() -> keras.initializers.Initializer:
    """Returns an initializer that draws other numbers than all others."""
    return keras.initializers.RandomNormal(stddev=1.0)


def activated(features: tf.Tensor, gain: float = 1.0) -> tf.Tensor:
    """Returns the activation of features, times a gain."""
    features = math.sqrt(2.0) * gain * tf.nn.leaky_relu(features, _SLOPE)
    if features.dtype == tf.float16:
        most = _FLOAT16_MOST * gain
        features = tf.clip_by_value(features, -most, most)
    return features


@keras.saving.register_keras_serializable(package="dtrain")
class EqualizedDense(keras.layers.Layer):
    """Multiplies vectors by a matrix."""

    def __init__(
        self,
        units: int,
        activation: bool = False,
        multiplier: float = 1.0,
        first_bias: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Creates the layer.

        Args:
            units: numbers that it makes.
            activation: whether there is one.
            multiplier: of the learning rate, by which weights and biases are
                multiplied when used, and weights divided at first.
            first_bias: what a bias is at first.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.units, self.activation = units, activation
        self.multiplier, self.first_bias = multiplier, first_bias

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the variables, for vectors [b, numbers]."""
        numbers = input_shape[-1]
        assert numbers is not None
        self.kernel = self.add_weight(
            shape=(numbers, self.units),
            initializer=keras.initializers.RandomNormal(
                stddev=1.0 / self.multiplier
            ),
            name="kernel",
        )
        self.bias = self.add_weight(
            shape=(self.units,),
            initializer=keras.initializers.Constant(self.first_bias),
            name="bias",
        )
        self._gain = self.multiplier / math.sqrt(numbers)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns [b, units], in the compute type of the layer."""
        made = inputs @ (self._gain * self.kernel)
        made += self.multiplier * self.bias
        return activated(made) if self.activation else made

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {
            **super().get_config(),
            "units": self.units,
            "activation": self.activation,
            "multiplier": self.multiplier,
            "first_bias": self.first_bias,
        }


@keras.saving.register_keras_serializable(package="dtrain")
class EqualizedConv2D(keras.layers.Layer):
    """Convolves with zeros around the image, and may halve it."""

    def __init__(
        self,
        filters: int,
        kernel_size: int,
        activation: bool = True,
        use_bias: bool = True,
        halves: bool = False,
        gain: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Creates the layer.

        Args:
            filters: channels that it makes.
            kernel_size: pixels a side, odd.
            activation: whether there is one.
            use_bias: whether a number is added to each channel.
            halves: whether the image is filtered, and every other pixel made.
            gain: of what it returns.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.filters, self.kernel_size = filters, kernel_size
        self.activation, self.use_bias = activation, use_bias
        self.halves, self.gain = halves, gain

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the variables, for images [b, h, w, channels]."""
        size, channels = self.kernel_size, input_shape[-1]
        assert channels is not None
        self.kernel = self.add_weight(
            shape=(size, size, channels, self.filters),
            initializer=standard_normal(),
            name="kernel",
        )
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(self.filters,), initializer="zeros", name="bias"
            )
        self._scale = 1.0 / math.sqrt(size * size * channels)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns [b, h, w, filters], or half of the height and width."""
        kernel = self._scale * self.kernel
        if self.halves and self.kernel_size == 1:
            made = tf.nn.conv2d(
                resampling.downsample(inputs), kernel, 1, "SAME"
            )
        elif self.halves:
            # The filter's 4 pixels and the kernel's are around each that stays.
            edge = self.kernel_size // 2 + 1
            blurred = resampling.blur(inputs, edge)
            made = tf.nn.conv2d(blurred, kernel, 2, "VALID")
        else:
            made = tf.nn.conv2d(inputs, kernel, 1, "SAME")
        if self.use_bias:
            made = tf.nn.bias_add(made, self.bias)
        return (
            activated(made, self.gain) if self.activation else self.gain * made
        )

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        names = ("filters", "kernel_size", "activation", "use_bias")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in names},
            "halves": self.halves,
            "gain": self.gain,
        }
