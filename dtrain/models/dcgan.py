"""A convolutional generator and discriminator for sizes from 8 to 128.

After Radford et al. 2015, Unsupervised Representation Learning with Deep
Convolutional GANs, without its BatchNorm (`--batch_norm` brings that of the
generator back) and with one more convolution at the full size in each network,
which is what makes small images sharp. For 28x28 and --base_channels=32:

    generator        latents - Dense - 7x7x128 - 14x14x64 - 28x28x32 - image
    discriminator    image - 28x28x32 - 14x14x64 - 7x7x128 - Dense - logit
"""

from __future__ import annotations

from typing import Any

import keras

from dtrain.config import Config, ModelSettings
from dtrain.models import batch_norm, sizes

# Beyond this, more channels cost memory and time and gain little: images of 128
# pixels would end with 32 times the base channels.
_MAX_CHANNEL_FACTOR = 8
_SLOPE = 0.2


def make(
    config: Config, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[keras.Model, keras.Model]:
    """Makes the generator and the discriminator.

    Args:
        config: latent_size, base_channels, batch_norm and conditional count.
        image_shape: height, width and channels.
        num_classes: number of labels; only looked at if conditional.

    Returns:
        The generator of images float32 [b, H, W, C] in [-1, 1] from latents
        float32 [b, latent_size], and the discriminator of images to logits
        float32 [b, 1]. If conditional, each takes a list whose second element
        is the labels, int32 [b].

    Raises:
        UserError: dcgan cannot make images of this shape.
    """
    sizes.check("dcgan", image_shape)
    channels = _feature_channels(config.base_channels, image_shape[0])
    labels = num_classes if config.conditional else 0
    return (
        _make_generator(config, image_shape, channels, labels),
        _make_discriminator(image_shape, channels, labels),
    )


def _feature_channels(base_channels: int, image_size: int) -> list[int]:
    """Returns the channels at each size, the image's own first."""
    num_halvings = sizes.num_halvings(image_size)
    return [
        base_channels * min(2**level, _MAX_CHANNEL_FACTOR)
        for level in range(num_halvings + 1)
    ]


def _activate(features: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return keras.layers.LeakyReLU(
        negative_slope=_SLOPE, name=f"{name}_activation"
    )(features)


def _make_generator(
    config: ModelSettings,
    image_shape: tuple[int, int, int],
    channels: list[int],
    num_classes: int,
) -> keras.Model:
    """Makes the generator; `num_classes` is 0 if it is not conditional."""
    layers = keras.layers

    def finish(features: keras.KerasTensor, name: str) -> keras.KerasTensor:
        if config.batch_norm:
            features = batch_norm.BatchNorm(name=f"{name}_norm")(features)
        return _activate(features, name)

    latents = keras.Input((config.latent_size,), name="latents")
    inputs, features = latents, latents
    if num_classes:
        labels = keras.Input((), dtype="int32", name="labels")
        inputs = [latents, labels]
        embedded = _embed(labels, num_classes, config.latent_size)
        condition = layers.Concatenate(name="conditioned_latents")
        features = condition([latents, embedded])
    size = image_shape[0] >> (len(channels) - 1)
    name = f"project_{size}x{size}"
    features = layers.Dense(size * size * channels[-1], name=name)(features)
    features = layers.Reshape(
        (size, size, channels[-1]), name=f"{name}_reshape"
    )(features)
    features = finish(features, name)
    for width in reversed(channels[:-1]):
        size *= 2
        name = f"upsample_{size}x{size}"
        # A kernel of twice the stride covers each pixel equally often, which
        # is what keeps the checkerboard out (Odena et al. 2016).
        features = layers.Conv2DTranspose(
            width, 4, strides=2, padding="same", name=name
        )(features)
        features = finish(features, name)
    # float32 in mixed precision too: bfloat16 has 8 bits for 256 grey levels.
    images = layers.Conv2D(
        image_shape[-1],
        3,
        padding="same",
        activation="tanh",
        dtype="float32",
        name="to_image",
    )(features)
    return keras.Model(inputs, images, name="generator")


def _embed(
    labels: keras.KerasTensor, num_classes: int, latent_size: int
) -> keras.KerasTensor:
    # As large as the latents beside it, or it is learnt much later.
    unit_normal: Any = keras.initializers.RandomNormal(stddev=1.0)
    return keras.layers.Embedding(
        num_classes,
        latent_size,
        embeddings_initializer=unit_normal,
        name="label_embedding",
    )(labels)


def _make_discriminator(
    image_shape: tuple[int, int, int], channels: list[int], num_classes: int
) -> keras.Model:
    """Makes the discriminator; `num_classes` is 0 if it is not conditional."""
    layers = keras.layers
    images = keras.Input(image_shape, name="images")
    size = image_shape[0]
    name = f"from_image_{size}x{size}"
    features = layers.Conv2D(channels[0], 3, padding="same", name=name)(images)
    features = _activate(features, name)
    for width in channels[1:]:
        size //= 2
        name = f"downsample_{size}x{size}"
        features = layers.Conv2D(
            width, 4, strides=2, padding="same", name=name
        )(features)
        features = _activate(features, name)
    features = layers.Flatten(name="flatten")(features)
    logits = layers.Dense(1, dtype="float32", name="logits")(features)
    inputs = images
    if num_classes:
        labels = keras.Input((), dtype="int32", name="labels")
        inputs = [images, labels]
        # Miyato and Koyama 2018, cGANs with Projection Discriminator:
        # D(x, y) = embedding(y) . features(x) + logit(x)
        embedded = layers.Embedding(
            num_classes, features.shape[-1], dtype="float32", name="projection"
        )(labels)
        dot = layers.Dot(axes=1, dtype="float32", name="projected")
        add = layers.Add(dtype="float32", name="conditioned_logits")
        logits = add([logits, dot([features, embedded])])
    return keras.Model(inputs, logits, name="discriminator")
