"""R3GAN: residual networks of grouped convolutions, without normalization.

Huang et al. 2024, The GAN is dead; long live the GAN! A Modern Baseline GAN
(arXiv 2501.05441), and the authors' code, brownvc/R3GAN. For 32 pixels, with
--base_channels=768 as for CIFAR-10:

    generator        latents - basis 4x4 - 2 blocks - 8x8 - 2 blocks - 16x16 -
                     2 blocks - 32x32 - 2 blocks - image
    discriminator    the same from the end to the beginning

A block is an inverted bottleneck: 1x1 to twice the channels, 3x3 in groups, 1x1
back, which begins as zero, so that a network begins as a chain of resamplings;
the weights before it are scaled by L^(-1/4) for L blocks. There is no tanh.

A grouped convolution has a gradient on GPUs, and on CPUs by oneDNN, which
TensorFlow uses on x86 unless TF_ENABLE_ONEDNN_OPTS=0.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.models import resampling

# Sides of the smallest features.
_BASE_SIZES = range(4, 8)
# To here, all sizes have as many channels.
_MAX_CONSTANT_SIZE = 32
_EXPANSION = 2
_SLOPE = 0.2
# Keeps the variance of what a leaky ReLU returns.
_GAIN = math.sqrt(2.0 / (1.0 + _SLOPE**2))


def make(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    blocks: int = 2,
    group_width: int = 16,
) -> tuple[keras.Model, keras.Model]:
    """Makes the generator and the discriminator.

    Args:
        config: latent_size, base_channels (at the full size; of 32 pixels and
            less, at all sizes) and conditional count.
        image_shape: height, width and channels.
        num_classes: number of labels; only looked at if conditional.
        blocks: at each size, at least 1.
        group_width: channels of a group of a 3x3 convolution, which divides
            twice base_channels.

    Returns:
        The generator of images float32 [b, H, W, C] from latents float32
        [b, latent_size], and the discriminator of images to logits float32
        [b, 1]. If conditional, each takes a list whose second element is the
        labels, int32 [b].

    Raises:
        UserError: no such networks can be made.
    """
    _check(config, image_shape, blocks, group_width)
    widths = _widths(config.base_channels, image_shape[0])
    labels = num_classes if config.conditional else 0
    build = _Build(blocks, group_width, len(widths), labels)
    return (
        _make_generator(build, config.latent_size, image_shape, widths),
        _make_discriminator(build, image_shape, widths),
    )


def _check(
    config: Config,
    image_shape: tuple[int, int, int],
    blocks: int,
    group_width: int,
) -> None:
    height, width, _ = image_shape
    if height != width or not _base_size(height):
        raise UserError(
            f"r3gan makes no images of {height}x{width} pixels: they must be "
            "square and halve to 4, 5, 6 or 7; try --image_size=32"
        )
    if config.precision == "mixed_float16":
        raise UserError(
            "precision (mixed_float16) is too narrow for r3gan, as its authors "
            "have measured; give mixed_bfloat16, or float32"
        )
    if blocks < 1:
        raise UserError(f"model_flag blocks ({blocks}) must be at least 1")
    expanded = _EXPANSION * config.base_channels
    if group_width < 1 or expanded % group_width:
        raise UserError(
            f"base_channels ({config.base_channels}), twice, must be a "
            f"multiple of group_width ({group_width}); try "
            f"--base_channels={max(8, config.base_channels // 8 * 8)}, or "
            "--model_flag=group_width=2"
        )


def _base_size(image_size: int) -> int:
    """Returns the side of the smallest features; 0 if there is none."""
    while image_size % 2 == 0 and image_size > _BASE_SIZES[-1]:
        image_size //= 2
    return image_size if image_size in _BASE_SIZES else 0


def _widths(base_channels: int, image_size: int) -> dict[int, int]:
    """Returns the channels by the side of features, the smallest first."""
    size, widths = _base_size(image_size), {}
    while size <= image_size:
        doublings = image_size // max(size, min(_MAX_CONSTANT_SIZE, image_size))
        widths[size] = base_channels * max(1, doublings)
        size *= 2
    return widths


# Layers.


class _Layer(keras.layers.Layer):
    def _kernel(self, shape: tuple[int, ...], deviation: float) -> Any:
        initializer: Any = "zeros"
        if deviation:
            initializer = keras.initializers.RandomNormal(stddev=deviation)
        return self.add_weight(
            name="kernel", shape=shape, initializer=initializer
        )


@keras.saving.register_keras_serializable(package="dtrain")
class Convolution(_Layer):
    """A convolution in groups, without bias, whose size stays.

    Unlike Keras' own it is no function of XLA, which takes ten times as long on
    a CPU.
    """

    def __init__(
        self,
        channels: int,
        side: int = 1,
        groups: int = 1,
        gain: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Creates the layer.

        Args:
            channels: of the output.
            side: of the kernel, odd.
            groups: that channels go into; each is of its own.
            gain: of the initial weights, beyond 1 / sqrt(inputs of each).
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.channels, self.side = channels, side
        self.groups, self.gain = groups, gain

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the kernel, [side, side, channels of a group, channels]."""
        channels = int(input_shape[-1] or 0) // self.groups
        deviation = self.gain / math.sqrt(self.side**2 * channels)
        shape = (self.side, self.side, channels, self.channels)
        self.kernel = self._kernel(shape, deviation)

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """Convolves features, [b, h, w, channels]."""
        return tf.nn.conv2d(
            features, tf.convert_to_tensor(self.kernel), 1, "SAME"
        )

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape of the output."""
        return (*input_shape[:-1], self.channels)

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {
            **super().get_config(),
            **{"channels": self.channels, "side": self.side},
            **{"groups": self.groups, "gain": self.gain},
        }


@keras.saving.register_keras_serializable(package="dtrain")
class BiasedActivation(keras.layers.Layer):
    """A leaky ReLU of features with a bias of each channel.

    Nothing scales what it returns; the initial weights have its gain.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the bias, [channels]."""
        shape = (input_shape[-1],)
        self.bias = self.add_weight(
            name="bias", shape=shape, initializer="zeros"
        )

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """Adds the bias, and takes a fifth of what is negative."""
        return tf.nn.leaky_relu(features + self.bias, _SLOPE)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape of the output, which is that of the input."""
        return input_shape


@keras.saving.register_keras_serializable(package="dtrain")
class GenerativeBasis(_Layer):
    """Pictures that are learned, one for each channel, times numbers."""

    def __init__(self, side: int = 4, **kwargs: Any) -> None:
        """Creates the layer.

        Args:
            side: of the pictures.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.side = side

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the pictures, [side, side, channels]."""
        channels = int(input_shape[-1] or 0)
        self.kernel = self._kernel((self.side, self.side, channels), 1.0)

    def call(self, numbers: tf.Tensor) -> tf.Tensor:
        """Makes features [b, side, side, channels] of [b, channels]."""
        return numbers[:, None, None, :] * tf.convert_to_tensor(self.kernel)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape of the output."""
        return input_shape[0], self.side, self.side, input_shape[-1]

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {**super().get_config(), "side": self.side}


@keras.saving.register_keras_serializable(package="dtrain")
class DiscriminativeBasis(_Layer):
    """How much of a learned picture there is in each channel."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the pictures, [h, w, channels]."""
        _, height, width, channels = (int(side or 0) for side in input_shape)
        deviation = 1.0 / math.sqrt(height * width)
        self.kernel = self._kernel((height, width, channels), deviation)

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """Makes numbers [b, channels] of [b, h, w, channels]."""
        kernel = tf.convert_to_tensor(self.kernel)
        return tf.reduce_sum(features * kernel, [1, 2])

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Returns the shape of the output."""
        return input_shape[0], input_shape[-1]


# Networks.


class _Build:
    """Makes what both networks are built of.

    Attributes:
        num_classes: 0 if they are not conditional.
    """

    def __init__(
        self, blocks: int, group_width: int, num_sizes: int, num_classes: int
    ) -> None:
        self.num_classes = num_classes
        self._blocks, self._group_width = blocks, group_width
        self._gain = _GAIN * (num_sizes * blocks) ** -0.25

    def blocks(self, features: Any, size: int) -> Any:
        """Puts the blocks of a size behind features."""
        channels = features.shape[-1]
        expanded = _EXPANSION * channels
        for number in range(self._blocks):
            name = f"block_{size}x{size}_{number}"
            inner = Convolution(
                expanded, gain=self._gain, name=f"{name}_expand"
            )(features)
            inner = BiasedActivation(name=f"{name}_activation_1")(inner)
            inner = Convolution(
                expanded,
                3,
                expanded // self._group_width,
                self._gain,
                name=f"{name}_grouped",
            )(inner)
            inner = BiasedActivation(name=f"{name}_activation_2")(inner)
            inner = Convolution(channels, gain=0.0, name=f"{name}_back")(inner)
            features = keras.layers.Add(name=f"{name}_add")([features, inner])
        return features

    def embed(self, labels: Any, channels: int, gain: float) -> Any:
        """Embeds labels, as a linear layer does that are one-hot."""
        deviation = gain / math.sqrt(self.num_classes)
        initializer: Any = keras.initializers.RandomNormal(stddev=deviation)
        return keras.layers.Embedding(
            self.num_classes,
            channels,
            embeddings_initializer=initializer,
            name="label_embedding",
        )(labels)


def _dense(units: int, inputs: int, name: str, **kwargs: Any) -> Any:
    initializer: Any = keras.initializers.RandomNormal(
        stddev=1.0 / math.sqrt(inputs)
    )
    return keras.layers.Dense(
        units,
        use_bias=False,
        kernel_initializer=initializer,
        name=name,
        **kwargs,
    )


def _make_generator(
    build: _Build,
    latent_size: int,
    image_shape: tuple[int, int, int],
    widths: dict[int, int],
) -> keras.Model:
    latents = keras.Input((latent_size,), name="latents")
    inputs, values = latents, latents
    if build.num_classes:
        labels = keras.Input((), dtype="int32", name="labels")
        inputs = [latents, labels]
        embedded = build.embed(labels, latent_size, 1.0)
        condition = keras.layers.Concatenate(name="conditioned_latents")
        values = condition([latents, embedded])
    (base, width), *larger = widths.items()
    values = _dense(width, values.shape[-1], "project")(values)
    features = GenerativeBasis(base, name="basis")(values)
    features = build.blocks(features, base)
    for size, channels in larger:
        name = f"up_{size}x{size}"
        # Before it is larger, which is the same and costs a quarter.
        if channels != features.shape[-1]:
            features = Convolution(channels, name=f"{name}_narrow")(features)
        features = resampling.Upsample(name=name)(features)
        features = build.blocks(features, size)
    # float32 in mixed precision too: bfloat16 has 8 bits for 256 grey levels.
    to_image = Convolution(image_shape[-1], dtype="float32", name="to_image")
    return keras.Model(inputs, to_image(features), name="generator")


def _make_discriminator(
    build: _Build, image_shape: tuple[int, int, int], widths: dict[int, int]
) -> keras.Model:
    images = keras.Input(image_shape, name="images")
    *larger, (base, width) = reversed(widths.items())
    features = Convolution(widths[image_shape[0]], name="from_image")(images)
    for size, _ in larger:
        features = build.blocks(features, size)
        smaller, name = size // 2, f"down_{size // 2}x{size // 2}"
        features = resampling.Downsample(name=name)(features)
        if widths[smaller] != features.shape[-1]:
            features = Convolution(widths[smaller], name=f"{name}_widen")(
                features
            )
    features = build.blocks(features, base)
    values = DiscriminativeBasis(name="basis", dtype="float32")(features)
    units = width if build.num_classes else 1
    values = _dense(units, width, "logits", dtype="float32")(values)
    if not build.num_classes:
        return keras.Model(images, values, name="discriminator")
    labels = keras.Input((), dtype="int32", name="labels")
    embedded = build.embed(labels, width, 1.0 / math.sqrt(width))
    # Miyato and Koyama 2018, cGANs with Projection Discriminator.
    project = keras.layers.Dot(axes=1, dtype="float32", name="projection")
    return keras.Model(
        [images, labels], project([values, embedded]), name="discriminator"
    )
