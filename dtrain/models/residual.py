"""Residual blocks of generators that upsample and critics that downsample.

Gulrajani et al. 2017, Improved Training of Wasserstein GANs, appendix F; Miyato
et al. 2018, Spectral Normalization for GANs, figure 8; Brock et al. 2019,
BigGAN, figure 15. They differ in their convolutions and norms alone, which the
callers bring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from dtrain.models import batch_norm, sizes

# Features, filters, pixels a side of the kernel, a name -> features.
Convolve = Callable[[Any, int, int, str], Any]
# Features, a name -> features.
Normalize = Callable[[Any, str], Any]

# Wider than so many times the base, features cost more than they bring.
_MAX_CHANNEL_FACTOR = 16
# To here, all sizes have as many channels.
_MAX_CONSTANT_SIZE = 32
_MAX_HALVINGS = 5


def conditional(project: Callable[[int, str], Any]) -> Normalize:
    """Makes norms whose gains and biases are made of a condition.

    Args:
        project: makes so many numbers of the condition, by a layer of a name.
    """

    def normalize(features: Any, name: str) -> Any:
        gains, biases = (
            project(features.shape[-1], f"{name}_{what}")
            for what in ("gains", "biases")
        )
        norm = batch_norm.ConditionalBatchNorm(name=name)
        return norm([features, gains, biases])

    return normalize


def generator_channels(
    base_channels: int, image_size: int, constant_factor: int
) -> list[int]:
    """Returns the channels of a generator at each size, the smallest first.

    Args:
        base_channels: at the size of the images, where they are large.
        image_size: pixels a side, which `sizes.check` has passed.
        constant_factor: how many times as many there are at all sizes of
            images up to 32 pixels.
    """
    num_halvings = sizes.num_halvings(image_size)
    if image_size <= _MAX_CONSTANT_SIZE:
        return [constant_factor * base_channels] * (num_halvings + 1)
    return [
        base_channels * min(2**level, _MAX_CHANNEL_FACTOR)
        for level in reversed(range(num_halvings + 1))
    ]


def discriminator_channels(
    base_channels: int, image_size: int, constant_factor: int
) -> list[tuple[int, bool]]:
    """Returns the channels of a discriminator's blocks, and which halve.

    Args:
        base_channels: see `generator_channels`.
        image_size: likewise.
        constant_factor: likewise.
    """
    if image_size <= _MAX_CONSTANT_SIZE:
        width = constant_factor * base_channels
        return [(width, True), (width, True), (width, False), (width, False)]
    num_blocks = max(_MAX_HALVINGS, sizes.num_halvings(image_size) + 1)
    size, blocks = image_size, []
    for level in range(num_blocks):
        halves = size % 2 == 0 and level < _MAX_HALVINGS
        size = size // 2 if halves else size
        width = base_channels * min(2**level, _MAX_CHANNEL_FACTOR)
        blocks.append((width, halves))
    return blocks


def up_block(
    features: Any,
    width: int,
    convolve: Convolve,
    normalize: Normalize,
    name: str,
) -> Any:
    """Doubles the size: norm, ReLU and convolution, twice, beside a skip.

    Args:
        features: [b, h, w, channels].
        width: channels of what it returns, [b, 2 h, 2 w, width].
        convolve: makes a convolution.
        normalize: makes a norm.
        name: of the block.
    """
    layers = keras.layers
    inner = normalize(features, f"{name}_norm_1")
    inner = layers.ReLU(name=f"{name}_activation_1")(inner)
    inner = layers.UpSampling2D(name=f"{name}_upsample")(inner)
    inner = convolve(inner, width, 3, f"{name}_conv_1")
    inner = normalize(inner, f"{name}_norm_2")
    inner = layers.ReLU(name=f"{name}_activation_2")(inner)
    inner = convolve(inner, width, 3, f"{name}_conv_2")
    # A convolution of single pixels gives the same before it as after.
    skip = convolve(features, width, 1, f"{name}_skip")
    skip = layers.UpSampling2D(name=f"{name}_skip_upsample")(skip)
    return layers.Add(name=f"{name}_add")([inner, skip])


def down_block(
    features: Any,
    width: int,
    convolve: Convolve,
    name: str,
    *,
    hidden: int,
    halves: bool,
    is_first: bool,
) -> Any:
    """Halves the size, or not: ReLU and convolution, twice, beside a skip.

    Args:
        features: [b, h, w, channels].
        width: channels of what it returns.
        convolve: makes a convolution.
        name: of the block.
        hidden: channels between the two convolutions.
        halves: whether neighbours are averaged.
        is_first: whether these are images, which have no ReLU of their own.
    """
    layers = keras.layers
    inner = features
    if not is_first:
        inner = layers.ReLU(name=f"{name}_activation_1")(inner)
    inner = convolve(inner, hidden, 3, f"{name}_conv_1")
    inner = layers.ReLU(name=f"{name}_activation_2")(inner)
    inner = convolve(inner, width, 3, f"{name}_conv_2")
    skip = features
    if halves:
        inner = layers.AveragePooling2D(2, name=f"{name}_pool")(inner)
        skip = layers.AveragePooling2D(2, name=f"{name}_skip_pool")(skip)
    if halves or features.shape[-1] != width:
        skip = convolve(skip, width, 1, f"{name}_skip")
    return layers.Add(name=f"{name}_add")([inner, skip])


def to_images(
    features: Any, normalize: Normalize, convolution: keras.layers.Layer
) -> Any:
    """Makes images in [-1, 1] of the features of the last block.

    Args:
        features: [b, H, W, channels].
        normalize: makes a norm.
        convolution: to the channels of an image.
    """
    features = normalize(features, "final_norm")
    features = keras.layers.ReLU(name="final_activation")(features)
    pixels = convolution(features)
    return keras.layers.Activation("tanh", dtype="float32", name="images")(
        pixels
    )


def pooled(features: Any) -> Any:
    """Sums the features of the last block over the image, float32.

    Args:
        features: [b, h, w, channels].
    """
    layers = keras.layers
    height, width = features.shape[1:3]
    features = layers.ReLU(name="final_activation")(features)
    pool = layers.GlobalAveragePooling2D(dtype="float32", name="final_pool")
    sum_up = layers.Rescaling(height * width, dtype="float32", name="final_sum")
    return sum_up(pool(features))


def projected(logits: Any, features: Any, embedded: Any) -> Any:
    """Adds what a label says to the logits, float32.

        D(x, y) = embedding(y) . features(x) + logit(x)

    Miyato and Koyama 2018, cGANs with Projection Discriminator.

    Args:
        logits: [b, 1].
        features: [b, channels].
        embedded: a vector for each label, [b, channels].
    """
    dot = keras.layers.Dot(axes=1, dtype="float32", name="projected")
    add = keras.layers.Add(dtype="float32", name="conditioned_logits")
    return add([logits, dot([features, embedded])])
