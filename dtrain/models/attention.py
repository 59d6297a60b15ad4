"""Self-attention over the positions of an image."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from dtrain.models import spectral_norm

# Channels of what is compared, and of what is carried, as parts of all.
_COMPARED, _CARRIED = 8, 2


@keras.saving.register_keras_serializable(package="dtrain")
class SelfAttention(keras.layers.Layer):
    """Adds to each position what others have, by how well they fit.

        beta = softmax(theta(x) phi(x)^T),  y = x + gamma * o(beta g(x))

    Zhang et al. 2019, Self-Attention GANs, equations (1) to (3), in the form of
    Brock et al. 2019: phi and g are pooled by 2, and all four convolutions of
    single pixels have spectral norms. gamma begins as 0.
    """

    def __init__(
        self, kernel_initializer: Any = "orthogonal", **kwargs: Any
    ) -> None:
        """Creates the layer.

        Args:
            kernel_initializer: of `keras.initializers`.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the convolutions, for features [b, h, w, channels]."""
        *_, channels = input_shape
        assert channels is not None
        compared, carried = (
            max(1, channels // part) for part in (_COMPARED, _CARRIED)
        )

        def convolution(
            name: str, takes: int, filters: int
        ) -> spectral_norm.SpectralConv2D:
            layer = spectral_norm.SpectralConv2D(
                filters,
                1,
                use_bias=False,
                # Each draws other numbers than the others.
                kernel_initializer=self.kernel_initializer.clone(),
                dtype=self.dtype_policy,
                name=name,
            )
            layer.build((None, None, None, takes))
            return layer

        self.theta = convolution("theta", channels, compared)
        self.phi = convolution("phi", channels, compared)
        self.g = convolution("g", channels, carried)
        self.o = convolution("o", carried, channels)
        self.gamma = self.add_weight(
            shape=(), initializer="zeros", dtype="float32", name="gamma"
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns the shape of `inputs`, [b, h, w, channels]."""
        queries = _flat(self.theta(inputs))
        keys, values = (
            _flat(_pooled(layer(inputs))) for layer in (self.phi, self.g)
        )
        fits = tf.cast(tf.matmul(queries, keys, transpose_b=True), tf.float32)
        shares = tf.cast(tf.nn.softmax(fits), values.dtype)
        height, width = inputs.shape[1:3]
        seen = tf.reshape(shares @ values, [-1, height, width, values.shape[2]])
        return inputs + tf.cast(self.gamma, inputs.dtype) * self.o(seen)

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        initializer = keras.initializers.serialize(self.kernel_initializer)
        return {**super().get_config(), "kernel_initializer": initializer}


def _pooled(features: tf.Tensor) -> tf.Tensor:
    """Returns the largest of each two by two, [b, h // 2, w // 2, channels].

    XLA has no gradient of `tf.nn.max_pool2d` that is the same each time, and a
    run asks for such.
    """
    _, height, width, channels = features.shape
    height, width = height // 2, width // 2
    even = features[:, : 2 * height, : 2 * width]
    squares = tf.reshape(even, [-1, height, 2, width, 2, channels])
    return tf.reduce_max(squares, [2, 4])


def _flat(features: tf.Tensor) -> tf.Tensor:
    """Returns [b, positions, channels]."""
    _, height, width, channels = features.shape
    return tf.reshape(features, [-1, height * width, channels])
