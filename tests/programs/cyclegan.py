"""CycleGAN: two generators and two discriminators, from one forward pass.

Zhu, Park, Isola and Efros 2017, "Unpaired Image-to-Image Translation using
Cycle-Consistent Adversarial Networks", equations (1) to (3), with the losses
of section 4 (least squares) and the identity loss of section 5.2.

    --model=tests.programs.cyclegan:make --unpaired=other=DATASET
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

import dtrain
from dtrain import losses

CYCLE_WEIGHT = 10.0
IDENTITY_WEIGHT = 5.0


def make_generator(
    image_shape: tuple[int, int, int], width: int
) -> keras.Model:
    """Makes a ResNet that keeps the size, as in the paper's appendix."""
    images = keras.Input(image_shape)
    features = layers.Conv2D(width, 7, padding="same")(images)
    features = _activated(features)
    features = _activated(
        layers.Conv2D(2 * width, 3, strides=2, padding="same")(features)
    )
    for _ in range(2):
        inner = _activated(
            layers.Conv2D(2 * width, 3, padding="same")(features)
        )
        inner = layers.Conv2D(2 * width, 3, padding="same")(inner)
        features = layers.Add()(
            [features, layers.GroupNormalization(-1)(inner)]
        )
    features = _activated(
        layers.Conv2DTranspose(width, 3, strides=2, padding="same")(features)
    )
    made = layers.Conv2D(image_shape[-1], 7, padding="same", activation="tanh")(
        features
    )
    return keras.Model(images, made)


def _activated(features: Any) -> Any:
    # With as many groups as channels it is InstanceNorm.
    return layers.ReLU()(layers.GroupNormalization(-1)(features))


def make_discriminator(
    image_shape: tuple[int, int, int], width: int
) -> keras.Model:
    """Makes a PatchGAN: a logit for each patch."""
    return keras.Sequential(
        [
            keras.Input(image_shape),
            layers.Conv2D(width, 4, strides=2, padding="same"),
            layers.LeakyReLU(0.2),
            layers.Conv2D(2 * width, 4, padding="same"),
            layers.GroupNormalization(-1),
            layers.LeakyReLU(0.2),
            layers.Conv2D(1, 4, padding="same"),
        ]
    )


def objective(
    networks: Any, example: dtrain.Example, error: Any = losses.squared_error
) -> Any:
    """Computes the losses of all four networks from one forward pass."""
    x, y = example.real_images, example.inputs["other"]
    fake_y = networks.x_to_y(x, training=True)
    fake_x = networks.y_to_x(y, training=True)
    cycle = losses.absolute_error(networks.y_to_x(fake_y, training=True), x)
    cycle += losses.absolute_error(networks.x_to_y(fake_x, training=True), y)
    by_network = {}
    for name, judge, real, fake in (
        ("x_to_y", "judge_y", y, fake_y),
        ("y_to_x", "judge_x", x, fake_x),
    ):
        generator, discriminator = (
            getattr(networks, each) for each in (name, judge)
        )
        fake_logits = discriminator(fake, training=True)
        real_logits = discriminator(real, training=True)
        same = losses.absolute_error(generator(real, training=True), real)
        by_network[name] = error(fake_logits, 1.0) + CYCLE_WEIGHT * cycle
        by_network[name] += IDENTITY_WEIGHT * same
        # Each network follows its own loss alone.
        by_network[judge] = error(real_logits, 1.0) + error(fake_logits, 0.0)
        by_network[judge] *= 0.5
    return by_network, {"cycle_loss": cycle}


def draw(networks: Any, example: dtrain.Example) -> tf.Tensor:
    """Puts both translations beside what they are made of."""
    x, y = example.real_images, example.inputs["other"]
    return tf.concat([x, networks.x_to_y(x), y, networks.y_to_x(y)], axis=2)


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes the four networks."""
    del num_classes
    width = config.base_channels
    names = ("x_to_y", "y_to_x", "judge_x", "judge_y")
    makers = (*[make_generator] * 2, *[make_discriminator] * 2)
    return dtrain.Program(
        networks={
            name: maker(image_shape, width)
            for name, maker in zip(names, makers, strict=True)
        },
        phases=[dtrain.Phase(names, objective)],
        optimizers={
            name: keras.optimizers.Adam(2e-4, beta_1=0.5) for name in names
        },
        averaged=("x_to_y", "y_to_x"),
        draw=draw,
    )
