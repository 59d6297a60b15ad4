"""SNGAN: residual networks, with spectral normalization in the discriminator.

Miyato et al. 2018, Spectral Normalization for GANs; with `--conditional`,
Miyato and Koyama 2018, cGANs with Projection Discriminator. With
--base_channels=64 the networks are the papers' at 32, 48, 64 and 128 pixels:

    32  generator      4x4x256 - 8x8x256 - 16x16x256 - 32x32x256 - image
        discriminator  image - 16x16x128 - 8x8x128 - 8x8x128 - 8x8x128 - logit
    64  generator      4x4x1024 - 8x8x512 - 16x16x256 - 32x32x128 - 64x64x64
        discriminator  image - 32x32x64 - 16x16x128 - 8x8x256 - ... - 2x2x1024

and other sizes follow in the same way.
"""

from __future__ import annotations

from typing import Any

import keras

from dtrain.config import Config, ModelSettings
from dtrain.models import batch_norm, residual, sizes, spectral_norm

# How many times the base channels they have up to 32 pixels.
_GENERATOR_FACTOR, _DISCRIMINATOR_FACTOR = 4, 2


def make(
    config: Config, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[keras.Model, keras.Model]:
    """Makes the generator and the discriminator.

    Args:
        config: latent_size, base_channels and conditional count.
        image_shape: height, width and channels.
        num_classes: number of labels; only looked at if conditional.

    Returns:
        As `dcgan.make`.

    Raises:
        UserError: sngan cannot make images of this shape.
    """
    sizes.check("sngan", image_shape)
    labels = num_classes if config.conditional else 0
    return (
        _make_generator(config, image_shape, labels),
        _make_discriminator(config, image_shape, labels),
    )


def _initializer(kernel_size: int) -> keras.initializers.Initializer:
    """Returns that of Glorot, times the square root of 2 before a ReLU."""
    return keras.initializers.VarianceScaling(
        2.0 if kernel_size > 1 else 1.0, "fan_avg", "uniform"
    )


def _make_generator(
    config: ModelSettings, image_shape: tuple[int, int, int], num_classes: int
) -> keras.Model:
    """Makes the generator; `num_classes` is 0 if it is not conditional."""
    layers = keras.layers
    latents = keras.Input((config.latent_size,), name="latents")
    inputs, normalize = latents, _normalize
    if num_classes:
        labels = keras.Input((), dtype="int32", name="labels")
        inputs = [latents, labels]
        normalize = _conditional(labels, num_classes)
    first, *widths = residual.generator_channels(
        config.base_channels, image_shape[0], _GENERATOR_FACTOR
    )
    size = image_shape[0] >> len(widths)
    name = f"project_{size}x{size}"
    features = layers.Dense(size * size * first, name=name)(latents)
    shape = size, size, first
    features = layers.Reshape(shape, name=f"{name}_reshape")(features)
    for width in widths:
        size *= 2
        features = residual.up_block(
            *(features, width, _convolve, normalize, f"up_{size}x{size}")
        )
    # float32 in mixed precision too: bfloat16 has 8 bits for 256 grey levels.
    to_image = layers.Conv2D(
        image_shape[-1], 3, padding="same", dtype="float32", name="to_image"
    )
    images = residual.to_images(features, _normalize, to_image)
    return keras.Model(inputs, images, name="generator")


def _convolve(features: Any, filters: int, kernel_size: int, name: str) -> Any:
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        padding="same",
        kernel_initializer=_initializer(kernel_size),
        name=name,
    )(features)


def _normalize(features: Any, name: str) -> Any:
    return batch_norm.BatchNorm(name=name)(features)


def _conditional(labels: Any, num_classes: int) -> residual.Normalize:
    """Makes norms whose scale and shift are learnt for each label."""
    return residual.conditional(
        lambda channels, name: keras.layers.Embedding(
            num_classes, channels, embeddings_initializer="zeros", name=name
        )(labels)
    )


def _make_discriminator(
    config: ModelSettings, image_shape: tuple[int, int, int], num_classes: int
) -> keras.Model:
    """Makes the discriminator; `num_classes` is 0 if it is not conditional."""
    images = keras.Input(image_shape, name="images")
    features, size = images, image_shape[0]
    blocks = residual.discriminator_channels(
        config.base_channels, size, _DISCRIMINATOR_FACTOR
    )
    for number, (width, halves) in enumerate(blocks):
        size = size // 2 if halves else size
        is_first = number == 0
        features = residual.down_block(
            features,
            width,
            _convolve_normalized,
            f"block_{number}_{size}x{size}",
            hidden=width if is_first else features.shape[-1],
            halves=halves,
            is_first=is_first,
        )
    features = residual.pooled(features)
    logits = spectral_norm.SpectralDense(1, dtype="float32", name="logits")(
        features
    )
    inputs = images
    if num_classes:
        labels = keras.Input((), dtype="int32", name="labels")
        inputs = [images, labels]
        embed = spectral_norm.SpectralEmbedding(
            num_classes, features.shape[-1], dtype="float32", name="projection"
        )
        logits = residual.projected(logits, features, embed(labels))
    return keras.Model(inputs, logits, name="discriminator")


def _convolve_normalized(
    features: Any, filters: int, kernel_size: int, name: str
) -> Any:
    return spectral_norm.SpectralConv2D(
        filters,
        kernel_size,
        kernel_initializer=_initializer(kernel_size),
        name=name,
    )(features)
