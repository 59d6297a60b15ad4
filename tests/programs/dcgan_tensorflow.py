"""TensorFlow's tutorial DCGAN: BatchNorm in one network, Dropout in the other.

Radford, Metz and Chintala 2016, "Unsupervised Representation Learning with
Deep Convolutional Generative Adversarial Networks", section 3; both losses are
Goodfellow et al. 2014, the generator's not saturating.

    --model=tests.programs.dcgan_tensorflow:make --r1_gamma=0
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from dtrain.models.batch_norm import BatchNorm


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[keras.Model, keras.Model]:
    """Makes both networks; the step is that of the flags."""
    del num_classes
    height, width, channels = image_shape
    small, base = (height // 4, width // 4), config.base_channels
    generator = keras.Sequential(
        [
            keras.Input([config.latent_size]),
            layers.Dense(small[0] * small[1] * 4 * base, use_bias=False),
            *_activated(),
            layers.Reshape((*small, 4 * base)),
            *(
                layer
                for factor in (2, 1)
                for layer in (
                    layers.Conv2DTranspose(
                        factor * base, 5, 2, "same", use_bias=False
                    ),
                    *_activated(),
                )
            ),
            layers.Conv2D(channels, 5, padding="same", activation="tanh"),
        ],
        name="generator",
    )
    discriminator = keras.Sequential(
        [
            keras.Input(image_shape),
            *(
                layer
                for factor in (1, 2)
                for layer in (
                    layers.Conv2D(factor * base, 5, 2, "same"),
                    layers.LeakyReLU(0.3),
                    layers.Dropout(0.3),
                )
            ),
            layers.Flatten(),
            layers.Dense(1),
        ],
        name="discriminator",
    )
    return generator, discriminator


def _activated() -> tuple[keras.Layer, keras.Layer]:
    return BatchNorm(), layers.LeakyReLU(0.3)
