"""TensorFlow's tutorial pix2pix: images side by side, L1, Dropout as noise.

Isola, Zhu, Zhou and Efros 2017, "Image-to-Image Translation with Conditional
Adversarial Networks", equation (4) with lambda 100, and section 6.2 for the
jitter. The data has the target at the left and the input at the right.

    --model=tests.programs.pix2pix:make
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

import dtrain
from dtrain import losses

L1_WEIGHT, MARGIN = 100.0, 2


def prepare(example: dtrain.Example) -> dtrain.Example:
    """Cuts a pair in two, and moves both by the same few pixels."""
    target, given = tf.split(example.real_images, 2, axis=2)
    both = tf.concat([target, given], axis=3)
    height, width = both.shape[1:3]
    sides = [[0, 0], [MARGIN, MARGIN], [MARGIN, MARGIN], [0, 0]]
    padded = tf.pad(both, sides, "REFLECT")
    starts = tf.cast(example.uniform((2,)) * (2 * MARGIN + 1), tf.int32)
    rows = starts[:, :1] + tf.range(height)
    columns = starts[:, 1:] + tf.range(width)
    moved = tf.gather(padded, rows, axis=1, batch_dims=1)
    moved = tf.gather(moved, columns, axis=2, batch_dims=1)
    target, given = tf.split(moved, 2, axis=3)
    return example.replace(
        real_images=target, inputs={**example.inputs, "given": given}
    )


def make_generator(
    image_shape: tuple[int, int, int], width: int
) -> keras.Model:
    """Makes a U-Net, whose Dropout draws in training."""
    given = keras.Input(image_shape)
    outer = layers.Conv2D(width, 4, 2, "same", activation="leaky_relu")(given)
    inner = layers.Conv2D(2 * width, 4, 2, "same")(outer)
    inner = layers.LeakyReLU()(layers.GroupNormalization(-1)(inner))
    inner = layers.Conv2DTranspose(width, 4, 2, "same")(inner)
    inner = layers.Dropout(0.5)(layers.GroupNormalization(-1)(inner))
    joined = layers.Concatenate()([layers.ReLU()(inner), outer])
    made = layers.Conv2DTranspose(
        image_shape[-1], 4, 2, "same", activation="tanh"
    )(joined)
    return keras.Model(given, made, name="generator")


def make_discriminator(
    image_shape: tuple[int, int, int], width: int
) -> keras.Model:
    """Makes a PatchGAN, which sees the input, too."""
    given, image = keras.Input(image_shape), keras.Input(image_shape)
    features = layers.Concatenate()([given, image])
    features = layers.Conv2D(width, 4, 2, "same")(features)
    features = layers.Conv2D(2 * width, 4, padding="same")(
        layers.LeakyReLU()(features)
    )
    logits = layers.Conv2D(1, 4, padding="same")(layers.LeakyReLU()(features))
    return keras.Model([given, image], logits, name="discriminator")


def objective(networks: Any, example: dtrain.Example) -> Any:
    """Computes both losses from one forward pass, as the tutorial does."""
    given, target = example.inputs["given"], example.real_images
    made = networks.generator(given, training=True)
    real_logits = networks.discriminator([given, target], training=True)
    fake_logits = networks.discriminator([given, made], training=True)
    distance = losses.absolute_error(made, target)
    generator = losses.cross_entropy(fake_logits, 1.0) + L1_WEIGHT * distance
    discriminator = losses.cross_entropy(real_logits, 1.0)
    discriminator += losses.cross_entropy(fake_logits, 0.0)
    both = {"generator": generator, "discriminator": discriminator}
    return both, {"l1_distance": distance}


def draw(networks: Any, example: dtrain.Example) -> tf.Tensor:
    """Shows input, translation and target side by side."""
    given = example.inputs["given"]
    made = networks.generator(given)
    return tf.concat([given, made, example.real_images], axis=2)


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes both networks."""
    del num_classes
    height, width, channels = image_shape
    shape, base = (height, width // 2, channels), config.base_channels
    names = ("generator", "discriminator")
    return dtrain.Program(
        networks={
            "generator": make_generator(shape, base),
            "discriminator": make_discriminator(shape, base),
        },
        phases=[dtrain.Phase(names, objective)],
        optimizers={
            name: keras.optimizers.Adam(2e-4, beta_1=0.5) for name in names
        },
        prepare=prepare,
        draw=draw,
    )
