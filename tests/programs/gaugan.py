"""Keras' example GauGAN: an image from a map of labels, and a code of style.

Park, Liu, Wang and Zhu 2019, "Semantic Image Synthesis with Spatially-Adaptive
Normalization": SPADE (equation 1), the encoder (section 3) with the KL loss,
feature matching and perceptual losses as in pix2pixHD, the hinge loss.

    --model=tests.programs.gaugan:make --paired=classes=map:DATASET
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

import dtrain
from dtrain import losses

NUM_LABELS = 4
MATCHING_WEIGHT, FEATURE_WEIGHT, KL_WEIGHT = 10.0, 10.0, 0.05


def spade(features: Any, maps: Any, width: int) -> Any:
    """Normalizes features, and scales and shifts each place by its label."""
    normal = layers.GroupNormalization(-1, center=False, scale=False)(features)
    shared = layers.Conv2D(width, 3, padding="same", activation="relu")(maps)
    channels = features.shape[-1]
    gamma = layers.Conv2D(channels, 3, padding="same")(shared)
    beta = layers.Conv2D(channels, 3, padding="same")(shared)
    return layers.LeakyReLU(0.2)(normal * (1.0 + gamma) + beta)


def make_generator(
    image_shape: tuple[int, int, int], code_size: int, width: int
) -> keras.Model:
    """Makes what turns codes and maps [b, h, w, labels] into images."""
    height, columns, channels = image_shape
    small = height // 2, columns // 2
    codes = keras.Input([code_size])
    maps = keras.Input([height, columns, NUM_LABELS])
    features = layers.Dense(small[0] * small[1] * width)(codes)
    features = layers.Reshape((*small, width))(features)
    coarse = layers.AveragePooling2D(2)(maps)
    inner = layers.Conv2D(width, 3, padding="same")(
        spade(features, coarse, width)
    )
    features = layers.UpSampling2D()(layers.Add()([features, inner]))
    features = spade(features, maps, width)
    made = layers.Conv2D(channels, 3, padding="same", activation="tanh")
    return keras.Model([codes, maps], made(features))


def make_encoder(
    image_shape: tuple[int, int, int], code_size: int, width: int
) -> keras.Model:
    """Makes what turns images into means and logarithms of variances."""
    images = keras.Input(image_shape)
    features = layers.Conv2D(width, 3, 2, "same", activation="leaky_relu")(
        images
    )
    features = layers.Flatten()(features)
    outputs = [layers.Dense(code_size)(features) for _ in range(2)]
    return keras.Model(images, outputs)


def make_discriminator(
    image_shape: tuple[int, int, int], width: int
) -> keras.Model:
    """Makes a PatchGAN that also returns what it has seen on the way."""
    images = keras.Input(image_shape)
    maps = keras.Input([*image_shape[:2], NUM_LABELS])
    features = layers.Concatenate()([maps, images])
    first = layers.Conv2D(width, 4, 2, "same", activation="leaky_relu")(
        features
    )
    second = layers.Conv2D(
        2 * width, 4, padding="same", activation="leaky_relu"
    )(first)
    logits = layers.Conv2D(1, 4, padding="same")(second)
    return keras.Model([maps, images], [first, second, logits])


def _maps(example: dtrain.Example) -> tf.Tensor:
    return tf.one_hot(example.inputs["classes"], NUM_LABELS)


def _fakes(networks: Any, example: dtrain.Example) -> Any:
    """Draws images in the styles of the real ones."""
    mean, log_variance = networks.encoder(example.real_images)
    codes = mean + tf.exp(0.5 * log_variance) * example.latents
    divergence = -0.5 * tf.reduce_sum(
        1.0 + log_variance - tf.square(mean) - tf.exp(log_variance), 1
    )
    return networks.generator([codes, _maps(example)]), divergence


def judge(networks: Any, example: dtrain.Example) -> Any:
    """Computes the hinge loss of the discriminator."""
    fakes, _ = _fakes(networks, example)
    maps = _maps(example)
    *_, real_logits = networks.discriminator([maps, example.real_images])
    *_, fake_logits = networks.discriminator([maps, tf.stop_gradient(fakes)])
    loss = losses.LOSSES["hinge"].discriminator(real_logits, fake_logits)
    return 0.5 * losses.per_example(loss), {}


def generate(networks: Any, example: dtrain.Example) -> Any:
    """Trains generator and encoder together."""
    fakes, divergence = _fakes(networks, example)
    maps, reals = _maps(example), example.real_images
    *real_features, _ = networks.discriminator([maps, reals])
    *fake_features, logits = networks.discriminator([maps, fakes])
    matching: Any = 0.0
    for real, fake in zip(real_features, fake_features, strict=True):
        matching += losses.absolute_error(fake, tf.stop_gradient(real))
    seen = losses.absolute_error(
        networks.features(fakes), networks.features(reals)
    )
    loss = KL_WEIGHT * divergence - losses.per_example(logits)
    loss += MATCHING_WEIGHT * matching + FEATURE_WEIGHT * seen
    return loss, {"generator_loss": loss, "divergence": divergence}


def draw(networks: Any, example: dtrain.Example) -> tf.Tensor:
    """Shows map, real image, and an image of the map in a style by chance."""
    classes = tf.cast(example.inputs["classes"], tf.float32)
    shades = (2.0 / (NUM_LABELS - 1) * classes - 1.0)[..., tf.newaxis]
    made = networks.generator([example.latents, _maps(example)])
    shades = tf.broadcast_to(shades, tf.shape(made))
    return tf.concat([shades, example.real_images, made], axis=2)


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes three networks, and the frozen one of the perceptual loss."""
    del num_classes
    width, code_size = config.base_channels, config.latent_size
    # The paper's is a VGG that was trained; random features will do here.
    features = keras.Sequential(
        [
            keras.Input(image_shape),
            layers.Conv2D(8, 3, 2, activation="relu"),
        ]
    )
    together = keras.optimizers.Adam(1e-4, beta_1=0.0, beta_2=0.999)
    judging = keras.optimizers.Adam(4e-4, beta_1=0.0, beta_2=0.999)
    return dtrain.Program(
        networks={
            "generator": make_generator(image_shape, code_size, width),
            "encoder": make_encoder(image_shape, code_size, width),
            "discriminator": make_discriminator(image_shape, width),
            "features": features,
        },
        phases=[
            dtrain.Phase("discriminator", judge),
            dtrain.Phase(("generator", "encoder"), generate),
        ],
        optimizers={
            "generator": together,
            "encoder": together,
            "discriminator": judging,
        },
        draw=draw,
    )
