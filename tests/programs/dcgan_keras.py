"""Keras' example DCGAN: the labels of the discriminator are noisy.

Radford, Metz and Chintala 2016, as `dcgan_tensorflow`; noise on the labels is
Salimans et al. 2016, "Improved Techniques for Training GANs", section 3.4.

    --model=tests.programs.dcgan_keras:make
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

import dtrain
from dtrain import losses
from tests.programs import dcgan_tensorflow

NOISE = 0.05


def judge(networks: Any, example: dtrain.Example) -> Any:
    """Trains the discriminator on labels that are nearly 0 and 1."""
    fakes = tf.stop_gradient(networks.generator(example.latents, training=True))
    real_logits = networks.discriminator(example.real_images, training=True)
    fake_logits = networks.discriminator(fakes, training=True)
    loss = losses.cross_entropy(real_logits, 1.0 - NOISE * example.uniform())
    loss += losses.cross_entropy(fake_logits, NOISE * example.uniform())
    return 0.5 * loss, {"discriminator_loss": 0.5 * loss}


def generate(networks: Any, example: dtrain.Example) -> Any:
    """Trains the generator to be taken for real."""
    fakes = networks.generator(example.latents, training=True)
    logits = networks.discriminator(fakes, training=True)
    loss = losses.cross_entropy(logits, 1.0)
    return loss, {"generator_loss": loss}


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Networks:
    """Makes both networks, with optimizers of their own."""
    return dtrain.Networks(
        *dcgan_tensorflow.make(config, image_shape, num_classes),
        phases=(
            dtrain.Phase("discriminator", judge),
            dtrain.Phase("generator", generate),
        ),
        generator_optimizer=keras.optimizers.Adam(1e-4),
        discriminator_optimizer=keras.optimizers.Adam(1e-4),
    )
