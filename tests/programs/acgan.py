"""ACGAN: the discriminator also tells the class, of real and fake images.

Odena, Olah and Shlens 2017, "Conditional Image Synthesis with Auxiliary
Classifier GANs", equations (2) and (3).

    --model=tests.programs.acgan:make --conditional
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

import dtrain
from dtrain import losses
from tests.programs import conditional_gan


def _loss(networks: Any, images: Any, labels: Any, is_real: float) -> Any:
    """Computes -L_S - L_C of the paper, [b]."""
    logits, class_logits = networks.discriminator(images, training=True)
    of_source = losses.cross_entropy(logits, is_real)
    return of_source + tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels, class_logits
    )


def _fakes(networks: Any, example: dtrain.Example) -> tf.Tensor:
    """Draws images of the classes of the real ones: so c is from p_c, too."""
    return networks.generator([example.latents, example.labels], training=True)


def judge(networks: Any, example: dtrain.Example) -> Any:
    """Trains the discriminator on L_S + L_C."""
    fakes = tf.stop_gradient(_fakes(networks, example))
    loss = _loss(networks, example.real_images, example.labels, 1.0)
    loss += _loss(networks, fakes, example.labels, 0.0)
    return loss, {"discriminator_loss": loss}


def generate(networks: Any, example: dtrain.Example) -> Any:
    """Trains the generator on L_C, and to be taken for real."""
    loss = _loss(networks, _fakes(networks, example), example.labels, 1.0)
    return loss, {"generator_loss": loss}


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes both networks."""
    generator, _ = conditional_gan.make(config, image_shape, num_classes)
    images = keras.Input(image_shape)
    features = images
    for factor in (1, 2):
        features = layers.Conv2D(factor * config.base_channels, 3, 2, "same")(
            features
        )
        features = layers.LeakyReLU(0.2)(features)
    features = layers.Dropout(0.5)(layers.Flatten()(features))
    outputs = [layers.Dense(1)(features), layers.Dense(num_classes)(features)]
    discriminator = keras.Model(images, outputs)
    return dtrain.Program(
        networks={"generator": generator, "discriminator": discriminator},
        phases=[
            dtrain.Phase("discriminator", judge),
            dtrain.Phase("generator", generate),
        ],
        needs={"conditional": True},
    )
