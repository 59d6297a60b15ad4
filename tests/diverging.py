"""A GAN whose loss is spoiled at steps that a test chooses.

DTRAIN_TEST_SPOIL names steps, as in `5=nan,9=1e6`: what the loss of the first
image is multiplied by. The latents tell which step it is, so a spoiled step is
a function of the run's data, as a broken image would be.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import keras
import tensorflow as tf

from dtrain import gan, registry
from dtrain.config import Config
from dtrain.models import dcgan


def make(
    config: Config, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[keras.Model, keras.Model, Sequence[registry.Phase]]:
    """Makes the default networks, to be trained on a spoiled objective."""
    spoils = dict(
        part.split("=") for part in os.environ["DTRAIN_TEST_SPOIL"].split(",")
    )
    marks = tf.stack(
        [
            gan.latents_at(config, tf.constant(int(step) - 1), 0, 1)[0, 0]
            for step in spoils
        ]
    )
    factors = tf.constant([float(factor) for factor in spoils.values()])
    discriminate, generate = registry.adversarial_phases(config)

    def objective(
        networks: registry.Networks, example: registry.Example
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        losses, metrics = discriminate.objective(networks, example)
        is_here = tf.abs(example.latents[:, :1] - marks) < 1e-7
        factor = tf.where(is_here, factors, tf.ones_like(factors))
        return losses * tf.reduce_prod(factor, axis=1), metrics

    return (
        *dcgan.make(config, image_shape, num_classes),
        (discriminate._replace(objective=objective), generate),
    )
