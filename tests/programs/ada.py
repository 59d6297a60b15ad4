"""ADA: augmentation whose probability follows a sign of overfitting.

Karras, Aittala, Hellsten, Laine, Lehtinen and Aila 2020, "Training Generative
Adversarial Networks with Limited Data", sections 2.2 and 3: r_t = E[sign(D)] of
the real images is held at 0.6. Of the augmentations, the blits: flips, quarter
turns and shifts by whole pixels.

    --model=tests.programs.ada:make
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

import dtrain
from dtrain import losses

TARGET_SIGN, SPEED_IMAGES = 0.6, 2000


def augment(images: tf.Tensor, example: dtrain.Example) -> tf.Tensor:
    """Changes images, each by its own chance and in its own way."""

    def maybe(changed: tf.Tensor, images: tf.Tensor) -> tf.Tensor:
        is_changed = example.uniform((1, 1, 1)) < example.state["probability"]
        return tf.where(is_changed, changed, images)

    images = maybe(tf.reverse(images, [2]), images)
    images = maybe(tf.transpose(tf.reverse(images, [1]), [0, 2, 1, 3]), images)
    size = images.shape[1]
    shifts = tf.cast(example.uniform((2,)) * size / 4, tf.int32)
    places = (tf.range(size) - shifts[..., tf.newaxis]) % size
    moved = tf.gather(images, places[:, 0], axis=1, batch_dims=1)
    moved = tf.gather(moved, places[:, 1], axis=2, batch_dims=1)
    return maybe(moved, images)


def judge(networks: Any, example: dtrain.Example) -> Any:
    """Computes the loss of the discriminator, and the sign of its logits."""
    fakes = tf.stop_gradient(networks.generator(example.latents, training=True))
    real_logits = networks.discriminator(augment(example.real_images, example))
    fake_logits = networks.discriminator(augment(fakes, example))
    loss = losses.cross_entropy(real_logits, 1.0)
    loss += losses.cross_entropy(fake_logits, 0.0)
    return loss, {"real_signs": tf.sign(real_logits)[:, 0]}


def generate(networks: Any, example: dtrain.Example) -> Any:
    """Computes the loss of the generator, on augmented images, too."""
    fakes = augment(networks.generator(example.latents, training=True), example)
    return losses.cross_entropy(networks.discriminator(fakes), 1.0), {}


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes both networks, and the probability."""
    del num_classes
    change = config.batch_size / SPEED_IMAGES

    def follow(state: Any, means: Any) -> Any:
        over = tf.sign(means["real_signs"] - TARGET_SIGN)
        probability = state["probability"] + change * over
        return {"probability": tf.clip_by_value(probability, 0.0, 0.8)}

    height, width, channels = image_shape
    generator = keras.Sequential(
        [
            keras.Input([config.latent_size]),
            layers.Dense(height // 2 * (width // 2) * config.base_channels),
            layers.LeakyReLU(0.2),
            layers.Reshape((height // 2, width // 2, config.base_channels)),
            layers.Conv2DTranspose(
                channels, 4, strides=2, padding="same", activation="tanh"
            ),
        ]
    )
    discriminator = keras.Sequential(
        [
            keras.Input(image_shape),
            layers.Conv2D(config.base_channels, 4, strides=2, padding="same"),
            layers.LeakyReLU(0.2),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    return dtrain.Program(
        networks={"generator": generator, "discriminator": discriminator},
        phases=[
            dtrain.Phase("discriminator", judge, update=follow),
            dtrain.Phase("generator", generate),
        ],
        state={"probability": 0.0},
    )
