"""BigGAN, for data and devices that are not big.

Brock et al. 2019, Large Scale GAN Training for High Fidelity Natural Image
Synthesis: the networks of SNGAN with spectral norms in both, self-attention at
half of the size, one embedding of the labels for all of the generator's
conditional norms, each of which sees a part of the latents, too, and a penalty
on filters of the generator that are not orthogonal. With --base_channels=64 and
labels they are, at 32 and 128 pixels, those of the authors' PyTorch code.

What the paper calls truncation is `python -m dtrain.sample --truncation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dtrain.config import Config, ModelSettings
from dtrain.gan import phases
from dtrain.gan.example import Example
from dtrain.gan.program import GENERATOR, Networks, Phase
from dtrain.models import (
    attention,
    batch_norm,
    residual,
    sizes,
    spectral_norm,
)

# How many times the base channels both have up to 32 pixels.
_CONSTANT_FACTOR = 4


def make(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    orthogonal_weight: float = 1e-4,
) -> Networks:
    """Makes the networks, and the phases of the flags with one more penalty.

    Args:
        config: latent_size, base_channels and conditional count, and all that
            `phases.adversarial_phases` reads.
        image_shape: height, width and channels.
        num_classes: number of labels; only looked at if conditional.
        orthogonal_weight: beta of the paper's equation (3).

    Raises:
        UserError: there are no such networks for images of this shape.
    """
    sizes.check("biggan_small", image_shape)
    labels = num_classes if config.conditional else 0
    *judging, generating = phases.adversarial_phases(config)
    return Networks(
        _make_generator(config, image_shape, labels),
        _make_discriminator(config, image_shape, labels),
        (*judging, _penalized(generating, orthogonal_weight)),
    )


def _penalized(phase: Phase, weight: float) -> Phase:
    """Adds the penalty to the loss of the generator."""

    @tf.autograph.experimental.do_not_convert
    def objective(networks: Any, example: Example) -> tuple[Any, Any]:
        loss, metrics = phase.objective(networks, example)
        penalty = orthogonality(networks.generator)
        penalties = tf.fill(tf.shape(loss), penalty)
        metrics = {**metrics, "orthogonal_penalty": penalties}
        return loss + weight * penalties, metrics

    return phase._replace(networks=GENERATOR, objective=objective)


def orthogonality(network: keras.Model) -> tf.Tensor:
    """Computes how far filters are from orthogonal, over all kernels.

        R(W) = |W^T W * (1 - I)|^2

    Brock et al. 2019, equation (3), where each column of W is a filter.

    Args:
        network: kernels with spectral norms count, as they are before these.

    Returns:
        float32 scalar.
    """
    total = tf.constant(0.0)
    for layer in network._flatten_layers():
        if isinstance(layer, spectral_norm.SpectralNorm):
            kernel = tf.convert_to_tensor(layer.kernel)
            matrix = tf.reshape(kernel, [-1, kernel.shape[-1]])
            rows, columns = matrix.shape
            # |W^T W| = |W W^T|, of which one can be larger than the memory.
            products = tf.matmul(
                matrix,
                matrix,
                transpose_a=columns <= rows,
                transpose_b=columns > rows,
            )
            own = tf.reduce_sum(tf.square(matrix), 0)
            total += tf.reduce_sum(tf.square(products))
            total -= tf.reduce_sum(tf.square(own))
    return total


def _convolve(features: Any, filters: int, kernel_size: int, name: str) -> Any:
    return spectral_norm.SpectralConv2D(
        *(filters, kernel_size), kernel_initializer="orthogonal", name=name
    )(features)


def _normalize(features: Any, name: str) -> Any:
    return batch_norm.BatchNorm(name=name)(features)


def _conditional(condition: Any) -> residual.Normalize:
    """Makes norms whose scale and shift are linear in a condition."""
    return residual.conditional(
        lambda channels, name: spectral_norm.SpectralDense(
            channels,
            use_bias=False,
            kernel_initializer="orthogonal",
            name=name,
        )(condition)
    )


def _norms(
    latents: Any, labels: Any, num_classes: int, num_blocks: int
) -> tuple[Any, Sequence[residual.Normalize]]:
    """Shares the latents out.

    Returns:
        The part that the first layer sees; and the norms of each block.
    """
    if not num_classes:
        return latents, [_normalize] * num_blocks
    latent_size = latents.shape[-1]
    shared = keras.layers.Embedding(
        num_classes,
        latent_size,
        embeddings_initializer="orthogonal",
        name="label_embedding",
    )(labels)
    part = latent_size // (num_blocks + 1)
    # The first has what is left over.
    start, norms = latent_size - num_blocks * part, []
    for number in range(num_blocks):
        begin = start + number * part
        beside = keras.layers.Concatenate(name=f"condition_{number}")
        condition = beside([shared, latents[:, begin : begin + part]])
        norms.append(_conditional(condition))
    return latents[:, :start], norms


def _make_generator(
    config: ModelSettings, image_shape: tuple[int, int, int], num_classes: int
) -> keras.Model:
    """Makes the generator; `num_classes` is 0 if it is not conditional."""
    latents = keras.Input((config.latent_size,), name="latents")
    labels = keras.Input((), dtype="int32", name="labels")
    first, *widths = residual.generator_channels(
        config.base_channels, image_shape[0], _CONSTANT_FACTOR
    )
    features, norms = _norms(latents, labels, num_classes, len(widths))
    size = image_shape[0] >> len(widths)
    name = f"project_{size}x{size}"
    project = spectral_norm.SpectralDense(
        size * size * first, kernel_initializer="orthogonal", name=name
    )
    reshape = keras.layers.Reshape((size, size, first), name=f"{name}_reshape")
    features = reshape(project(features))
    for width, normalize in zip(widths, norms, strict=True):
        size *= 2
        name = f"up_{size}x{size}"
        features = residual.up_block(
            features, width, _convolve, normalize, name
        )
        if 2 * size == image_shape[0]:
            features = attention.SelfAttention(name="attention")(features)
    # float32 in mixed precision too: bfloat16 has 8 bits for 256 grey levels.
    to_image = spectral_norm.SpectralConv2D(
        *(image_shape[-1], 3),
        kernel_initializer="orthogonal",
        dtype="float32",
        name="to_image",
    )
    images = residual.to_images(features, _normalize, to_image)
    inputs = [latents, labels] if num_classes else latents
    return keras.Model(inputs, images, name="generator")


def _make_discriminator(
    config: ModelSettings, image_shape: tuple[int, int, int], num_classes: int
) -> keras.Model:
    """Makes the discriminator; `num_classes` is 0 if it is not conditional."""
    images = keras.Input(image_shape, name="images")
    features, size = images, image_shape[0]
    blocks = residual.discriminator_channels(
        config.base_channels, size, _CONSTANT_FACTOR
    )
    for number, (width, halves) in enumerate(blocks):
        size = size // 2 if halves else size
        features = residual.down_block(
            features,
            width,
            _convolve,
            f"block_{number}_{size}x{size}",
            hidden=width,
            halves=halves,
            is_first=number == 0,
        )
        if number == 0:
            features = attention.SelfAttention(name="attention")(features)
    features = residual.pooled(features)
    of_labels = {"kernel_initializer": "orthogonal", "dtype": "float32"}
    logits = spectral_norm.SpectralDense(1, name="logits", **of_labels)(
        features
    )
    inputs = images
    if num_classes:
        labels = keras.Input((), dtype="int32", name="labels")
        inputs = [images, labels]
        embed = spectral_norm.SpectralEmbedding(
            num_classes, features.shape[-1], name="projection", **of_labels
        )
        logits = residual.projected(logits, features, embed(labels))
    return keras.Model(inputs, logits, name="discriminator")
