"""Draws the random numbers of a step.

Each depends on the seed, the step, the phase and the position of its image in
the global batch, and on nothing else. So nothing random is ever saved, and any
number of replicas sees the same global batch.
"""

from __future__ import annotations

import tensorflow as tf

from dtrain.config import Config
from dtrain.data import pipeline
from dtrain.gan.phases import Example

# What a random draw is for, folded into its seed.
_LATENTS = 0
_UNIFORMS = 1


def latents_at(
    config: Config, step: tf.Tensor, phase: int, num_latents: int
) -> tf.Tensor:
    """Draws the latents of one phase's global batch.

    Args:
        config: the run's settings.
        step: int64 scalar, `GAN.data_step`.
        phase: place of the phase in the step.
        num_latents: how many; the first are the same for any number.

    Returns:
        float32 [num_latents, latent_size], standard normal.
    """
    return tf.random.stateless_normal(
        [num_latents, config.latent_size], _seed(config, _LATENTS, step, phase)
    )


def example_at(
    config: Config,
    step: tf.Tensor,
    phase: int,
    batch: pipeline.Batch,
    num_replicas: int,
    num_done: tf.Tensor,
) -> Example:
    """Makes an `Example` of a replica's images, with their random numbers.

    Args:
        config: the run's settings.
        step: see `latents_at`.
        phase: place of the phase in the step.
        batch: the replica's part of one draw of real images.
        num_replicas: how many share the batch.
        num_done: int64 scalar, the steps that are done.
    """
    size = config.batch_size // num_replicas
    start = tf.cast(batch.positions[0] % config.batch_size, tf.int32)
    latents = latents_at(config, step, phase, config.batch_size)
    uniforms = tf.random.stateless_uniform(
        [config.batch_size], _seed(config, _UNIFORMS, step, phase)
    )
    return Example(
        real_images=batch.images,
        labels=batch.labels,
        latents=tf.slice(latents, [start, 0], [size, config.latent_size]),
        uniforms=tf.slice(uniforms, [start], [size]),
        step=num_done,
    )


def _seed(
    config: Config, purpose: int, step: tf.Tensor, phase: int
) -> tf.Tensor:
    seed = tf.stack([config.seed, purpose])
    seed = tf.random.fold_in(seed, tf.cast(step, tf.int64))
    # As int64, or the whole seed is folded into 32 bits.
    return tf.random.fold_in(seed, tf.constant(phase, tf.int64))
