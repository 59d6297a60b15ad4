"""The networks of StyleGAN2: a mapping, a synthesis, a discriminator.

Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN, in
configuration F: a generator whose images are sums of one for each size, and a
residual discriminator. For 256x256 and --base_channels=64:

    mapping        latents (and labels) - Dense, some times - style
    synthesis      constant 4x4x512 - 8x8x512 - ... - 128x128x128 - 256x256x64
                       each by its styles and noise, each adds to the image
    discriminator  image - 256x256x64 - ... - 8x8x512 - 4x4x512 - Dense - logit
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from dtrain.models import (
    equalized,
    minibatch_deviation,
    modulated,
    resampling,
    sizes,
)

MAX_IMAGE_SIZE = 1024

# Of the learning rate of a mapping: section B of Karras et al. 2019, A Style-
# Based Generator Architecture.
_MAPPING_MULTIPLIER = 0.01
# Two ways are added, whose variance is to stay.
_OF_TWO = math.sqrt(0.5)
_NUM_LABEL_LAYERS = 8


def channels_at(
    base_channels: int, image_size: int, max_channels: int
) -> list[int]:
    """Returns the channels at each size, the smallest first.

    Args:
        base_channels: at the size of the images.
        image_size: pixels a side, which `sizes.check` has passed.
        max_channels: at any size.
    """
    return [
        min(base_channels * 2**level, max_channels)
        for level in reversed(range(sizes.num_halvings(image_size) + 1))
    ]


def make_mapping(
    latent_size: int, num_classes: int, num_layers: int
) -> keras.Model:
    """Makes what turns latents, and labels, into styles of as many numbers.

    Args:
        latent_size: numbers of a latent, and of a style.
        num_classes: 0 if it is not conditional.
        num_layers: at least 1.
    """
    latents = keras.Input((latent_size,), name="latents")
    inputs, features = latents, _of_unit_variance(latents, "latents")
    if num_classes:
        labels = keras.Input((), dtype="int32", name="labels")
        inputs = [latents, labels]
        embedded = _embed(labels, num_classes, latent_size)
        beside = keras.layers.Concatenate(dtype="float32", name="conditioned")
        features = beside([features, embedded])
    styles = _map(features, latent_size, num_layers)
    return keras.Model(inputs, styles, name="mapping")


def _map(features: Any, units: int, num_layers: int) -> Any:
    for number in range(num_layers):
        features = equalized.EqualizedDense(
            units,
            activation=True,
            multiplier=_MAPPING_MULTIPLIER,
            dtype="float32",
            name=f"map_{number}",
        )(features)
    return features


def _embed(labels: Any, num_classes: int, units: int) -> Any:
    one_hot = keras.layers.CategoryEncoding(
        num_classes, "one_hot", dtype="float32", name="one_hot"
    )
    embed = equalized.EqualizedDense(units, dtype="float32", name="embed")
    return _of_unit_variance(embed(one_hot(labels)), "labels")


def _of_unit_variance(vectors: Any, name: str) -> Any:
    layers = keras.layers
    unit = layers.UnitNormalization(dtype="float32", name=f"{name}_normalized")
    scale = math.sqrt(vectors.shape[-1])
    scaled = layers.Rescaling(scale, dtype="float32", name=f"{name}_scaled")
    return scaled(unit(vectors))


@keras.saving.register_keras_serializable(package="dtrain")
class LearnedConstant(keras.layers.Layer):
    """Features that are the same for all examples."""

    def __init__(self, size: int, filters: int, **kwargs: Any) -> None:
        """Creates the layer.

        Args:
            size: pixels a side.
            filters: channels.
            **kwargs: those of `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.size, self.filters = size, filters

    def build(self, input_shape: Any) -> None:
        """Makes the variable."""
        del input_shape
        self.constant = self.add_weight(
            shape=(self.size, self.size, self.filters),
            initializer=equalized.standard_normal(),
            name="constant",
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns [b, size, size, filters], of anything [b, ...]."""
        constant = tf.cast(self.constant, self.compute_dtype)[None]
        return tf.repeat(constant, tf.shape(inputs)[0], axis=0)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Returns the shape of the output."""
        return (input_shape[0], self.size, self.size, self.filters)

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        own = {"size": self.size, "filters": self.filters}
        return {**super().get_config(), **own}


def make_synthesis(
    image_shape: tuple[int, int, int], channels: list[int], size_of_style: int
) -> keras.Model:
    """Makes what turns styles and noise into images.

    It takes a list: styles float32 [b, n, size_of_style], one for each
    convolution and one for the last image; and noise [b, h, w, 1] for each
    convolution, in their order.

    Args:
        image_shape: height, width and channels.
        channels: at each size, the smallest first.
        size_of_style: its numbers.
    """
    num_convolutions = 2 * len(channels) - 1
    styles = keras.Input((num_convolutions + 1, size_of_style), name="styles")
    noises, features, image = [], None, None
    size = image_shape[0] >> (len(channels) - 1)
    for level, width in enumerate(channels):
        if features is None:
            constant = LearnedConstant(size, width, name="constant")
            features = constant(styles)
        else:
            size *= 2
        name = f"{size}x{size}"
        for doubles in (True, False) if level else (False,):
            noise = keras.Input((size, size, 1), name=f"noise_{len(noises)}")
            style = styles[:, len(noises)]
            which = f"conv_{name}_{'up' if doubles else 'same'}"
            convolve = modulated.ModulatedConv2D(width, doubles, name=which)
            features = convolve([features, style, noise])
            noises.append(noise)
        to_image = modulated.ToImage(image_shape[-1], name=f"to_image_{name}")
        # The style of the next convolution: they are of one size in between.
        added = to_image([features, styles[:, len(noises)]])
        if image is not None:
            up = resampling.Upsample(
                dtype="float32", name=f"image_{name}_upsample"
            )
            add = keras.layers.Add(dtype="float32", name=f"image_{name}")
            added = add([up(image), added])
        image = added
    return keras.Model([styles, *noises], image, name="synthesis")


def make_discriminator(
    image_shape: tuple[int, int, int],
    channels: list[int],
    num_classes: int,
    group_size: int,
) -> keras.Model:
    """Makes the discriminator, of images to logits float32 [b, 1].

    Args:
        image_shape: height, width and channels.
        channels: at each size, the smallest first.
        num_classes: 0 if it is not conditional.
        group_size: of `minibatch_deviation`.
    """
    images = keras.Input(image_shape, name="images")
    size = image_shape[0]
    convolution = equalized.EqualizedConv2D
    features = convolution(channels[-1], 1, name="from_image")(images)
    for width, next_width in zip(
        channels[:0:-1], channels[-2::-1], strict=True
    ):
        name = f"block_{size}x{size}"
        inner = convolution(width, 3, name=f"{name}_conv_0")(features)
        inner = convolution(
            next_width, 3, halves=True, gain=_OF_TWO, name=f"{name}_conv_1"
        )(inner)
        skip = convolution(
            *(next_width, 1, False, False, True),
            gain=_OF_TWO,
            name=f"{name}_skip",
        )(features)
        features = keras.layers.Add(name=f"{name}_add")([inner, skip])
        size //= 2
    features = _gathered(features, group_size)
    judge = equalized.EqualizedDense(
        channels[0] if num_classes else 1, dtype="float32", name="logits"
    )
    logits, inputs = judge(features), images
    if num_classes:
        labels = keras.Input((), dtype="int32", name="labels")
        inputs = [images, labels]
        logits = _matched(logits, labels, num_classes)
    return keras.Model(inputs, logits, name="discriminator")


def _gathered(features: Any, group_size: int) -> Any:
    """Makes one vector of the smallest features, float32 [b, channels]."""
    channels = features.shape[-1]
    deviation = minibatch_deviation.MinibatchDeviation(
        group_size, dtype="float32", name="minibatch_deviation"
    )
    features = deviation(features)
    features = equalized.EqualizedConv2D(
        channels, 3, dtype="float32", name="final_conv"
    )(features)
    features = keras.layers.Flatten(dtype="float32", name="flatten")(features)
    return equalized.EqualizedDense(
        channels, activation=True, dtype="float32", name="final_dense"
    )(features)


def _matched(features: Any, labels: Any, num_classes: int) -> Any:
    """Computes how well features fit labels, [b, 1]."""
    layers = keras.layers
    units = features.shape[-1]
    embedded = _embed(labels, num_classes, units)
    mapped = _map(embedded, units, _NUM_LABEL_LAYERS)
    dot = layers.Dot(axes=1, dtype="float32", name="matched")
    scale = layers.Rescaling(
        1.0 / math.sqrt(units), dtype="float32", name="conditioned_logits"
    )
    return scale(dot([features, mapped]))
