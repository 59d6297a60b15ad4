"""A convolution, a matrix and an embedding of the spectral norm 1."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

_EPSILON = 1e-12


class SpectralNorm(keras.layers.Layer):
    """Divides its kernel by the kernel's largest singular value.

        v = W u / |W u|,  u' = W^T v / |W^T v|,  sigma = v^T W u'

    Miyato et al. 2018, Spectral Normalization for GANs, algorithm 1: one round
    of the power iteration from the vector that was kept. v and u' are constants
    to the gradient, sigma is not.

    A forward pass reads the vector and assigns nothing; who trains calls
    `iterate` once for each update of the kernel, as the algorithm has it. So
    real and fake images, penalties and all micro-batches of an update see one
    kernel, and the vector follows from the kernels alone: it has the same bits
    on any number of replicas. `keras.layers.SpectralNormalization` assigns the
    divided kernel to the kernel itself at each training pass: passes of one
    update see different ones, and an optimizer's step starts from none that the
    gradient is of.
    """

    def __init__(self, kernel_initializer: Any, **kwargs: Any) -> None:
        """Creates the layer; `build` is to call `add_kernel`."""
        super().__init__(**kwargs)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def add_kernel(self, shape: tuple[int, ...]) -> None:
        """Makes the kernel and its vector, both float32.

        Args:
            shape: of the kernel; all but the last are the rows of W.
        """
        # float32 under every precision policy, or the norm would be rough.
        common: dict[str, Any] = {"dtype": "float32", "autocast": False}
        self.kernel = self.add_weight(
            shape=shape,
            initializer=self.kernel_initializer,
            name="kernel",
            **common,
        )
        self.vector = self.add_weight(
            shape=(shape[-1],),
            initializer=keras.initializers.RandomNormal(stddev=1.0),
            trainable=False,
            # All replicas assign equal values.
            aggregation="only_first_replica",
            name="vector",
            **common,
        )

    def normalized_kernel(self) -> tf.Tensor:
        """Returns the divided kernel, float32."""
        kernel = tf.convert_to_tensor(self.kernel)
        left, right = self._iterated(kernel)
        left, right = tf.stop_gradient(left), tf.stop_gradient(right)
        sigma = tf.reduce_sum(left * _times(_matrix(kernel), right))
        return kernel / tf.maximum(sigma, _EPSILON)

    def iterate(self) -> None:
        """Moves the vector by one round; within replicas, all call this."""
        self.vector.assign(self._iterated(tf.convert_to_tensor(self.kernel))[1])

    def _iterated(self, kernel: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        matrix = _matrix(kernel)
        left = _unit(_times(matrix, tf.convert_to_tensor(self.vector)))
        return left, _unit(_times(tf.transpose(matrix), left))

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        initializer = keras.initializers.serialize(self.kernel_initializer)
        return {**super().get_config(), "kernel_initializer": initializer}


def _matrix(kernel: tf.Tensor) -> tf.Tensor:
    return tf.reshape(kernel, [-1, kernel.shape[-1]])


def _times(matrix: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
    return tf.linalg.matvec(matrix, vector)


def _unit(vector: tf.Tensor) -> tf.Tensor:
    return vector / tf.maximum(tf.norm(vector), _EPSILON)


@keras.saving.register_keras_serializable(package="dtrain")
class SpectralConv2D(SpectralNorm):
    """Convolves with stride 1 and zeros around the image."""

    def __init__(
        self,
        filters: int,
        kernel_size: int,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        """Creates the layer.

        Args:
            filters: channels that it makes.
            kernel_size: pixels a side.
            use_bias: whether a number is added to each channel.
            kernel_initializer: of `keras.initializers`.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(kernel_initializer, **kwargs)
        self.filters, self.kernel_size = filters, kernel_size
        self.use_bias = use_bias

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the variables, for images [b, h, w, channels]."""
        size, channels = self.kernel_size, input_shape[-1]
        assert channels is not None
        self.add_kernel((size, size, channels, self.filters))
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(self.filters,), initializer="zeros", name="bias"
            )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns [b, h, w, filters], in the compute type of the layer."""
        kernel = tf.cast(self.normalized_kernel(), inputs.dtype)
        made = tf.nn.conv2d(inputs, kernel, 1, "SAME")
        return tf.nn.bias_add(made, self.bias) if self.use_bias else made

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "use_bias": self.use_bias,
        }


@keras.saving.register_keras_serializable(package="dtrain")
class SpectralDense(SpectralNorm):
    """Multiplies vectors by a matrix."""

    def __init__(
        self,
        units: int,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        """Creates the layer.

        Args:
            units: numbers that it makes.
            use_bias: whether a number is added to each.
            kernel_initializer: of `keras.initializers`.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(kernel_initializer, **kwargs)
        self.units, self.use_bias = units, use_bias

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the variables, for vectors [b, numbers]."""
        numbers = input_shape[-1]
        assert numbers is not None
        self.add_kernel((numbers, self.units))
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(self.units,), initializer="zeros", name="bias"
            )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns [b, units], in the compute type of the layer."""
        made = inputs @ tf.cast(self.normalized_kernel(), inputs.dtype)
        return made + self.bias if self.use_bias else made

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {
            **super().get_config(),
            "units": self.units,
            "use_bias": self.use_bias,
        }


@keras.saving.register_keras_serializable(package="dtrain")
class SpectralEmbedding(SpectralNorm):
    """Has a vector for each label."""

    def __init__(
        self,
        num_labels: int,
        units: int,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        """Creates the layer.

        Args:
            num_labels: labels are below it.
            units: numbers of a vector.
            kernel_initializer: of `keras.initializers`.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(kernel_initializer, **kwargs)
        self.num_labels, self.units = num_labels, units

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the variables."""
        del input_shape
        self.add_kernel((self.num_labels, self.units))

    def call(self, labels: tf.Tensor) -> tf.Tensor:
        """Returns [b, units] of labels int32 [b], in the compute type."""
        vectors = tf.gather(self.normalized_kernel(), labels)
        return tf.cast(vectors, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {
            **super().get_config(),
            "num_labels": self.num_labels,
            "units": self.units,
        }
