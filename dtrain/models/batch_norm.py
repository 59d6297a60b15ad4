"""BatchNorm over the whole batch of all replicas, in one all-reduce a pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

# Of this thread, since a strategy traces each replica in one of its own.
_ghost = threading.local()


@contextlib.contextmanager
def ghost_batch(
    active: bool = True,
) -> Iterator[list[tuple[BatchNorm, tf.Tensor]]]:
    """Makes every `BatchNorm` normalize over the batch that it is given alone.

    Hoffer et al. 2017, Train longer, generalize better: ghost batches. Within
    this context a training pass sums over no other replica and moves no moving
    statistics: the caller does that, by `BatchNorm.move`. A layer that is
    called twice, for real and for fake images, is in the list twice.

    Args:
        active: if false, nothing changes, and the list stays empty.

    Yields:
        The layers that were called in training, with the mean and variance of
        their batch, float32 [2, channels], in the order of the calls.
    """
    passes: list[tuple[BatchNorm, tf.Tensor]] = []
    if active:
        _ghost.passes = passes
    try:
        yield passes
    finally:
        if active:
            _ghost.passes = None


@keras.saving.register_keras_serializable(package="dtrain")
class BatchNorm(keras.layers.Layer):
    """Normalizes each channel over the global batch.

        y = gamma * (x - mean) / sqrt(variance + epsilon) + beta

    Ioffe and Szegedy 2015, Batch Normalization. The values and gradients are
    those of `keras.layers.BatchNormalization(synchronized=True)`, in two
    all-reduces instead of five: one forward, which carries both sums of the
    layer in one tensor, and one backward. The moving statistics, which every
    replica computes from those sums, do not travel at all.

    With `ghost_batch` it is over a micro-batch instead.

    The moving statistics are equal on all replicas, and saved once. Every
    replica must be given equally many examples.
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

    def build(self, input_shape: Any) -> None:
        """Makes the four variables, float32 [channels].

        Args:
            input_shape: any rank, the channels last.
        """
        common = _float32(input_shape[-1])
        self.gamma = self.add_weight(name="gamma", initializer="ones", **common)
        self.beta = self.add_weight(name="beta", initializer="zeros", **common)
        self._add_moving(input_shape[-1])

    def _add_moving(self, num_channels: int) -> None:
        # All replicas assign equal values, so one of them may stand for all:
        # averaging them would be a collective for nothing.
        moving = {
            **_float32(num_channels),
            "trainable": False,
            "aggregation": "only_first_replica",
        }
        self.moving_mean = self.add_weight(
            name="moving_mean", initializer="zeros", **moving
        )
        self.moving_variance = self.add_weight(
            name="moving_variance", initializer="ones", **moving
        )

    def call(self, inputs: Any, training: bool = False) -> tf.Tensor:
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
        mean, variance = self._statistics(values, training)
        scale = self.gamma * tf.math.rsqrt(variance + self.epsilon)
        return tf.cast((values - mean) * scale + self.beta, self.compute_dtype)

    def _statistics(
        self, values: tf.Tensor, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the mean and variance to normalize by; see `call`."""
        if training:
            passes = getattr(_ghost, "passes", None)
            mean, variance = self._batch_statistics(values, passes is not None)
            if passes is None:
                self.move(mean, variance)
            else:
                statistics = tf.stop_gradient(tf.stack([mean, variance]))
                passes.append((self, statistics))
        else:
            mean = tf.convert_to_tensor(self.moving_mean)
            variance = tf.convert_to_tensor(self.moving_variance)
        return mean, variance

    def _batch_statistics(
        self, values: tf.Tensor, is_alone: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Computes the mean and variance over all replicas, in one all-reduce.

        E[x^2] - E[x]^2 loses its digits when the mean is far larger than the
        deviation. So the sums are those of x - moving_mean, which is equal on
        all replicas and near the mean; the shift cancels out of the results
        and of their gradients. `is_alone` leaves the other replicas out.
        """
        shift = tf.stop_gradient(tf.convert_to_tensor(self.moving_mean))
        shifted = values - shift
        axes = list(range(len(values.shape) - 1))
        count = tf.cast(tf.size(values) // values.shape[-1], tf.float32)
        sums = tf.stack(
            [tf.reduce_sum(shifted, axes), tf.reduce_sum(shifted**2, axes)]
        )
        context = None if is_alone else tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            sums = context.all_reduce(tf.distribute.ReduceOp.SUM, sums)
            count *= context.num_replicas_in_sync
        shifted_mean, mean_square = tf.unstack(sums / count)
        variance = tf.nn.relu(mean_square - shifted_mean**2)
        return shift + shifted_mean, variance

    def move(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        """Moves the moving statistics towards those of a batch.

        Args:
            mean: float32 [channels], equal on all replicas.
            variance: the same.
        """
        # A batch that overflows is left out, as the loss scale leaves out its
        # gradients: in the averages it would stay for ever. The sums are equal
        # on all replicas, so all decide alike.
        finite = tf.reduce_all(tf.math.is_finite(tf.stack([mean, variance])))
        for moving, value in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            old = tf.convert_to_tensor(moving)
            new = old + (1.0 - self.momentum) * (tf.stop_gradient(value) - old)
            moving.assign(tf.where(finite, new, old))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Returns the shape of the output, which is that of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="dtrain")
class ConditionalBatchNorm(BatchNorm):
    """A `BatchNorm` whose scale and shift each example brings along.

        y = (1 + gain) * (x - mean) / sqrt(variance + epsilon) + bias

    De Vries et al. 2017, Modulating early visual processing by language. The 1
    is what a gain near 0, of new weights, leaves the features as they are by.
    """

    def build(self, input_shape: Any) -> None:
        """Makes the moving statistics, float32 [channels].

        Args:
            input_shape: of the features, the gains and the biases.
        """
        self._add_moving(input_shape[0][-1])

    def call(self, inputs: Any, training: bool = False) -> tf.Tensor:
        """Normalizes as `BatchNorm` does.

        Args:
            inputs: features float [b, h, w, channels], gains and biases float
                [b, channels].
            training: see `BatchNorm.call`.

        Returns:
            The compute type of the layer, the shape of the features.
        """
        values, gains, biases = (tf.cast(each, tf.float32) for each in inputs)
        mean, variance = self._statistics(values, training)
        normalized = (values - mean) * tf.math.rsqrt(variance + self.epsilon)
        gains, biases = gains[:, None, None, :], biases[:, None, None, :]
        return tf.cast(normalized * (1.0 + gains) + biases, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Returns the shape of the output, which is that of the features."""
        return input_shape[0]


def _float32(num_channels: int) -> dict[str, Any]:
    """Says of variables that they are float32 under every precision policy."""
    return {"shape": (num_channels,), "dtype": "float32", "autocast": False}
