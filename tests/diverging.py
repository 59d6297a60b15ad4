"""A GAN whose loss is spoiled at steps that a test chooses.

DTRAIN_TEST_SPOIL names steps, as in `5=nan,9=1e6`: what the loss of the first
image is multiplied by. `18=dead` throws the weights of the discriminator so
far off that it has no gradient any more. The latents tell which step it is, so
a spoiled step is a function of the run's data, as a broken image would be.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

import dtrain
from dtrain.config import Config
from dtrain.gan import draws, phases
from dtrain.models import dcgan

Objective = Callable[
    [Any, dtrain.Example],
    tuple[tf.Tensor, dict[str, tf.Tensor]],
]


def make(
    config: Config, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Networks:
    """Makes the default networks, to be trained on a spoiled objective."""
    discriminate, generate = phases.adversarial_phases(config)
    objective, optimizer = discriminate.objective, None
    for part in os.environ["DTRAIN_TEST_SPOIL"].split(","):
        step, spoil = part.split("=")
        done = tf.constant(int(step) - 1)
        mark = draws.latents_at(config, done, 0, 1)[0, 0]
        if spoil == "dead":
            optimizer = keras.optimizers.SGD(0.01)
            objective = _dead_after(mark, objective)
        else:
            objective = _multiplied(mark, float(spoil), objective)
    return dtrain.Networks(
        *dcgan.make(config, image_shape, num_classes),
        (discriminate._replace(objective=objective), generate),
        None,
        optimizer,
    )


def _multiplied(
    mark: tf.Tensor, factor: float, objective: Objective
) -> Objective:
    def spoiled(
        networks: Any, example: dtrain.Example
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        losses, metrics = objective(networks, example)
        is_here = tf.abs(example.latents[:, 0] - mark) < 1e-7
        return losses * tf.where(is_here, factor, 1.0), metrics

    return spoiled


def _dead_after(mark: tf.Tensor, objective: Objective) -> Objective:
    def spoiled(
        networks: Any, example: dtrain.Example
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        losses, metrics = objective(networks, example)
        weight = networks.discriminator.trainable_variables[0].value
        is_here = tf.abs(example.latents[:, 0] - mark) < 1e-7
        # A large gradient of a loss that is not.
        push = 1e5 * tf.reduce_sum(weight)
        push = tf.where(is_here, push - tf.stop_gradient(push), 0.0)
        is_dead = tf.reduce_max(tf.abs(weight)) > 5.0
        return tf.where(is_dead, 0.0, losses + push), metrics

    return spoiled
