"""Keras' example WGAN-GP: five updates of a critic for one of the generator.

Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville 2017, "Improved Training of
Wasserstein GANs", algorithm 1.

    --model=tests.programs.wgan_gp:make
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

import dtrain
from dtrain import losses
from tests.programs import dcgan_tensorflow

CRITIC_STEPS, PENALTY_WEIGHT = 5, 10.0


def criticize(networks: Any, example: dtrain.Example) -> Any:
    """Trains the critic, whose gradient between real and fake has norm 1."""
    reals = example.real_images
    fakes = tf.stop_gradient(networks.generator(example.latents, training=True))
    penalty = losses.one_centered_penalty(
        networks.critic, losses.between(reals, fakes, example.uniforms)
    )
    distance = (networks.critic(reals) - networks.critic(fakes))[:, 0]
    metrics = {"distance": distance, "gradient_penalty": penalty}
    return PENALTY_WEIGHT * penalty - distance, metrics


def generate(networks: Any, example: dtrain.Example) -> Any:
    """Trains the generator to score high."""
    fakes = networks.generator(example.latents, training=True)
    loss = -networks.critic(fakes)[:, 0]
    return loss, {"generator_loss": loss}


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes both networks."""
    # Without Dropout: the penalty is of the critic itself.
    generator, _ = dcgan_tensorflow.make(config, image_shape, num_classes)
    layers, base = keras.layers, config.base_channels
    critic = keras.Sequential(
        [
            keras.Input(image_shape),
            layers.Conv2D(base, 5, 2, "same", activation="leaky_relu"),
            layers.Conv2D(2 * base, 5, 2, "same", activation="leaky_relu"),
            layers.Flatten(),
            layers.Dense(1),
        ],
        name="critic",
    )
    adam = {"learning_rate": 2e-4, "beta_1": 0.5, "beta_2": 0.9}
    return dtrain.Program(
        networks={"generator": generator, "critic": critic},
        phases=[
            *[dtrain.Phase("critic", criticize)] * CRITIC_STEPS,
            dtrain.Phase("generator", generate),
        ],
        optimizers={
            name: keras.optimizers.Adam(**adam)
            for name in ("generator", "critic")
        },
    )
