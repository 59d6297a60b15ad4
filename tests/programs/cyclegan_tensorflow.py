"""TensorFlow's tutorial CycleGAN: the networks are those of pix2pix.

Zhu et al. 2017, as `cyclegan`, with a U-Net in place of the ResNet, the cross
entropy in place of squares, and a phase for each network: four optimizers.

    --model=tests.programs.cyclegan_tensorflow:make --unpaired=other=DATASET
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

import dtrain
from tests.programs import cyclegan, pix2pix

NAMES = ("x_to_y", "y_to_x", "judge_x", "judge_y")


def _cross_entropy(logits: tf.Tensor, label: float) -> tf.Tensor:
    losses = tf.nn.sigmoid_cross_entropy_with_logits(
        tf.fill(tf.shape(logits), label), logits
    )
    return tf.reduce_mean(losses, [1, 2, 3])


def objective(networks: Any, example: dtrain.Example) -> Any:
    """Computes the losses of all four networks from one forward pass."""
    x, y = example.real_images, example.inputs["other"]
    losses, cycle = {}, 0.0
    for real, there, back in (
        (x, networks.x_to_y, networks.y_to_x),
        (y, networks.y_to_x, networks.x_to_y),
    ):
        again = back(there(real, training=True), training=True)
        cycle += tf.reduce_mean(tf.abs(real - again), [1, 2, 3])
    for name, judge, real, source in (
        ("x_to_y", "judge_y", y, x),
        ("y_to_x", "judge_x", x, y),
    ):
        generator = getattr(networks, name)
        discriminator = getattr(networks, judge)
        same = generator(real, training=True)
        identity = tf.reduce_mean(tf.abs(real - same), [1, 2, 3])
        fake_logits = discriminator(generator(source, training=True))
        losses[name] = _cross_entropy(fake_logits, 1.0)
        losses[name] += 10.0 * cycle + 5.0 * identity
        losses[judge] = 0.5 * _cross_entropy(discriminator(real), 1.0)
        losses[judge] += 0.5 * _cross_entropy(fake_logits, 0.0)
    return losses, {"cycle_loss": cycle}


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes the four networks."""
    del num_classes
    makers = (
        *[pix2pix.make_generator] * 2,
        *[cyclegan.make_discriminator] * 2,
    )
    return dtrain.Program(
        networks={
            name: maker(image_shape, config.base_channels)
            for name, maker in zip(NAMES, makers, strict=True)
        },
        phases=[dtrain.Phase(NAMES, objective)],
        optimizers={
            name: keras.optimizers.Adam(2e-4, beta_1=0.5) for name in NAMES
        },
        averaged=("x_to_y", "y_to_x"),
        draw=cyclegan.draw,
    )
