"""Shows a discriminator how much the images of a group differ."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

_EPSILON = 1e-8


@keras.saving.register_keras_serializable(package="dtrain")
class MinibatchDeviation(keras.layers.Layer):
    """Adds a channel: the deviation over a group, in the mean of all features.

    Karras et al. 2018, Progressive Growing of GANs, section 3. A group is of
    neighbours, so that a batch has the same groups whatever micro-batches and
    replicas share it, as long as each part is a multiple of a group; otherwise
    groups are as large as divides the part.
    """

    def __init__(self, group_size: int = 4, **kwargs: Any) -> None:
        """Creates the layer.

        Args:
            group_size: most examples of a group.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.group_size = group_size

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns [b, h, w, channels + 1].

        Args:
            inputs: float [b, h, w, channels], b known when this is traced.
        """
        batch_size, height, width, channels = inputs.shape
        size = max(
            each
            for each in range(1, self.group_size + 1)
            if batch_size % each == 0
        )
        # float32: squares of differences that are small beside the values.
        groups = tf.reshape(
            tf.cast(inputs, tf.float32), [-1, size, height, width, channels]
        )
        variances = tf.math.reduce_variance(groups, 1)
        deviations = tf.reduce_mean(tf.sqrt(variances + _EPSILON), [1, 2, 3])
        shown = tf.broadcast_to(
            tf.repeat(deviations, size)[:, None, None, None],
            [batch_size, height, width, 1],
        )
        return tf.concat([inputs, tf.cast(shown, inputs.dtype)], 3)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Returns the shape of the output, which has one channel more."""
        *before, channels = input_shape
        return (*before, channels + 1)

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {**super().get_config(), "group_size": self.group_size}
