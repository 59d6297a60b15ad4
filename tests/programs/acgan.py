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
from tests.programs import conditional_gan


def _losses(outputs: Any, is_real: bool, labels: tf.Tensor) -> Any:
    """Returns L_S and L_C of the paper, negative, [b] each."""
    logits, class_logits = outputs
    target = tf.ones_like(logits) if is_real else tf.zeros_like(logits)
    source = tf.nn.sigmoid_cross_entropy_with_logits(target, logits)[:, 0]
    return source, tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels, class_logits
    )


def _fakes(networks: Any, example: dtrain.Example) -> Any:
    """Draws images of classes by chance, and returns these, too."""
    num_classes = networks.discriminator.output[1].shape[-1]
    labels = tf.cast(example.uniform() * num_classes, tf.int32)
    made = networks.generator([example.latents, labels], training=True)
    return made, labels


def judge(networks: Any, example: dtrain.Example) -> Any:
    """Trains the discriminator on L_S + L_C."""
    fakes, fake_labels = _fakes(networks, example)
    losses: Any = 0.0
    for images, is_real, labels in (
        (example.real_images, True, example.labels),
        (tf.stop_gradient(fakes), False, fake_labels),
    ):
        outputs = networks.discriminator(images, training=True)
        source, of_class = _losses(outputs, is_real, labels)
        losses += source + of_class
    return losses, {"discriminator_loss": losses}


def generate(networks: Any, example: dtrain.Example) -> Any:
    """Trains the generator on L_C - L_S."""
    fakes, labels = _fakes(networks, example)
    outputs = networks.discriminator(fakes, training=True)
    source, of_class = _losses(outputs, True, labels)
    is_right = tf.equal(tf.argmax(outputs[1], 1, tf.int32), labels)
    metrics = {
        "generator_loss": source,
        "of_class": tf.cast(is_right, tf.float32),
    }
    return source + of_class, metrics


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
    return dtrain.Program(
        networks={
            "generator": generator,
            "discriminator": keras.Model(images, outputs),
        },
        phases=[
            dtrain.Phase("discriminator", judge),
            dtrain.Phase("generator", generate),
        ],
        needs={"conditional": True},
    )
