"""Keras' example conditional GAN: the label is a part of what each sees.

Mirza and Osindero 2014, "Conditional Generative Adversarial Nets", equation 2.

    --model=tests.programs.conditional_gan:make --conditional --r1_gamma=0
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[keras.Model, keras.Model]:
    """Makes both networks; the step is that of the flags."""
    height, width, channels = image_shape
    small, base = (height // 2, width // 2), config.base_channels
    latents = keras.Input([config.latent_size])
    labels = keras.Input([], dtype="int32")
    one_hot = layers.CategoryEncoding(num_classes, output_mode="one_hot")
    features = layers.Concatenate()([latents, one_hot(labels)])
    features = layers.Dense(small[0] * small[1] * base)(features)
    features = layers.Reshape((*small, base))(layers.LeakyReLU(0.2)(features))
    features = layers.Conv2DTranspose(base, 4, 2, "same")(features)
    made = layers.Conv2D(channels, 7, padding="same", activation="tanh")(
        layers.LeakyReLU(0.2)(features)
    )
    generator = keras.Model([latents, labels], made, name="generator")

    images = keras.Input(image_shape)
    maps = layers.RepeatVector(height * width)(one_hot(labels))
    maps = layers.Reshape((height, width, num_classes))(maps)
    features = layers.Concatenate()([images, maps])
    for factor in (1, 2):
        features = layers.Conv2D(factor * base, 3, 2, "same")(features)
        features = layers.LeakyReLU(0.2)(features)
    logits = layers.Dense(1)(layers.GlobalMaxPooling2D()(features))
    return generator, keras.Model(
        [images, labels], logits, name="discriminator"
    )
