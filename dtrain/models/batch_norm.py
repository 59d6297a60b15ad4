"""BatchNorm over the whole batch of all replicas, in one all-reduce a pass."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="dtrain")
class BatchNorm(keras.layers.Layer):
    """Normalizes each channel over the global batch.

        y = gamma * (x - mean) / sqrt(variance + epsilon) + beta

    Ioffe and Szegedy 2015, Batch Normalization. The values and gradients are
    those of `keras.layers.BatchNormalization(synchronized=True)`, in two
    all-reduces instead of five: one forward, which carries both sums of the
    layer in one tensor, and one backward. The moving statistics, which every
    replica computes from those sums, do not travel at all.

    The moving statistics stay equal on all replicas, so a checkpoint holds
    those of all. Every replica must be given equally many examples.
    """

    def __init__(
        self, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any
    ) -> None:
        """Creates the layer.

        Args:
            momentum: the share of the old moving statistics that a training
                pass keeps, in [0, 1).
            epsilon: what is added to the variance.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.momentum = momentum
        self.epsilon = epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the four variables, float32 [channels].

        Args:
            input_shape: any rank, the channels last.
        """
        # Statistics are float32 under every precision policy.
        common = {
            "shape": (input_shape[-1],),
            "dtype": "float32",
            "autocast": False,
        }
        # All replicas assign equal values, so one of them may stand for all:
        # averaging them would be a collective for nothing.
        moving = {
            **common,
            "trainable": False,
            "aggregation": "only_first_replica",
        }
        self.gamma = self.add_weight(name="gamma", initializer="ones", **common)
        self.beta = self.add_weight(name="beta", initializer="zeros", **common)
        self.moving_mean = self.add_weight(
            name="moving_mean", initializer="zeros", **moving
        )
        self.moving_variance = self.add_weight(
            name="moving_variance", initializer="ones", **moving
        )

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Normalizes by the batch, or by the moving statistics.

        Args:
            inputs: float [b, ..., channels].
            training: whether to use the statistics of the batch and to move
                the moving ones towards them. Within a strategy's replicas,
                every replica must then call this.

        Returns:
            The compute type of the layer, the shape of `inputs`.
        """
        values = tf.cast(inputs, tf.float32)
        if training:
            mean, variance = self._batch_statistics(values)
            self._move(mean, variance)
        else:
            mean = tf.convert_to_tensor(self.moving_mean)
            variance = tf.convert_to_tensor(self.moving_variance)
        scale = self.gamma * tf.math.rsqrt(variance + self.epsilon)
        return tf.cast((values - mean) * scale + self.beta, self.compute_dtype)

    def _batch_statistics(
        self, values: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Computes the mean and variance over all replicas, in one all-reduce.

        E[x^2] - E[x]^2 loses its digits when the mean is far larger than the
        deviation; so the sums are those of x - moving_mean, which is equal on
        all replicas and near the mean. The shift drops out of the results, and
        of their gradients, so none flows into it.

        Args:
            values: float32 [b, ..., channels].

        Returns:
            float32 [channels] each.
        """
        shift = tf.stop_gradient(tf.convert_to_tensor(self.moving_mean))
        shifted = values - shift
        axes = list(range(len(values.shape) - 1))
        count = tf.cast(tf.size(values) // values.shape[-1], tf.float32)
        sums = tf.stack(
            [
                tf.reduce_sum(shifted, axes),
                tf.reduce_sum(shifted**2, axes),
            ]
        )
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            sums = context.all_reduce(tf.distribute.ReduceOp.SUM, sums)
            count *= context.num_replicas_in_sync
        shifted_mean, mean_square = tf.unstack(sums / count)
        variance = tf.nn.relu(mean_square - shifted_mean**2)
        return shift + shifted_mean, variance

    def _move(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        # An overflow is forgotten with its batch, as the loss scale forgets
        # its gradients; in the averages it would stay for ever. The sums are
        # equal on all replicas, so all decide alike.
        finite = tf.reduce_all(tf.math.is_finite(tf.stack([mean, variance])))
        for moving, value in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            old = tf.convert_to_tensor(moving)
            new = old + (1.0 - self.momentum) * (tf.stop_gradient(value) - old)
            moving.assign(tf.where(finite, new, old))

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        """Returns the shape of the output, which is that of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "epsilon": self.epsilon,
        }
