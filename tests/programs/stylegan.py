"""Keras' example StyleGAN: AdaIN, noise, and a resolution that fades in.

Karras, Laine and Aila 2019, "A Style-Based Generator Architecture for
Generative Adversarial Networks", section 2; the fading in is Karras et al.
2018, "Progressive Growing of GANs", figure 2. Each size is a run of its own,
which grows from the one of half the size:

    --model=tests.programs.stylegan:make --image_size=16 --run_dir=runs/16
    --model=tests.programs.stylegan:make --image_size=32 --run_dir=runs/32 \
        --init_from=runs/16 --init_new=synthesis/size_32*,discriminator/size_32*
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

import dtrain
from dtrain import losses

FADE_STEPS, PENALTY_WEIGHT, SMALLEST = 1000, 10.0, 4


@keras.saving.register_keras_serializable(package="programs")
class AddNoise(layers.Layer):
    """Adds noise, each channel as much as it learns."""

    def build(self, input_shape: Any) -> None:
        """Makes the strengths."""
        (*_, channels), _ = input_shape
        self.strength = self.add_weight(shape=(channels,), initializer="zeros")

    def call(self, inputs: Any) -> tf.Tensor:
        """Adds noise [b, h, w, 1] to features [b, h, w, c]."""
        features, noise = inputs
        return features + self.strength * noise


def _sizes(size: int) -> list[int]:
    """Lists the sizes up to one, each twice as large as the one before."""
    sizes = [size]
    while sizes[0] >= 2 * SMALLEST and sizes[0] % 2 == 0:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def _adain(features: Any, styles: Any, name: str) -> Any:
    """Gives features the mean and deviation of a style: equation (1)."""
    channels = features.shape[-1]
    normal = layers.GroupNormalization(
        -1, center=False, scale=False, name=f"{name}_norm"
    )(features)
    style = layers.Dense(2 * channels, name=f"{name}_style")(styles)
    style = layers.Reshape((1, 1, 2 * channels))(style)
    return normal * (1.0 + style[..., :channels]) + style[..., channels:]


def make_synthesis(
    image_shape: tuple[int, int, int], num_styles: int, width: int
) -> keras.Model:
    """Makes what turns styles, noise and alpha into images."""
    size, _, channels = image_shape
    styles, alpha = keras.Input([num_styles]), keras.Input([])
    noise = keras.Input([size, size, 1])
    sizes = _sizes(size)
    features: Any = layers.Dense(
        sizes[0] ** 2 * width,
        bias_initializer=keras.initializers.RandomNormal(stddev=1.0),
        name="constant",
    )(0.0 * styles)
    features = layers.Reshape((sizes[0], sizes[0], width))(features)
    image: Any = None
    for side in sizes:
        name = f"size_{side}"
        if side > sizes[0]:
            features = layers.UpSampling2D(interpolation="bilinear")(features)
        before = image
        features = layers.Conv2D(width, 3, padding="same", name=name)(features)
        some = layers.AveragePooling2D(size // side)(noise)
        features = AddNoise(name=f"{name}_noise")([features, some])
        features = layers.LeakyReLU(0.2)(_adain(features, styles, name))
        image = layers.Conv2D(channels, 1, name=f"{name}_image")(features)
    if len(sizes) > 1:
        # What the smaller run would draw, less and less.
        before = layers.UpSampling2D()(before)
        share = layers.Reshape((1, 1, 1))(alpha)
        image = before + share * (image - before)
    return keras.Model([styles, noise, alpha], image, name="synthesis")


def make_discriminator(
    image_shape: tuple[int, int, int], width: int
) -> keras.Model:
    """Makes what judges images, of which the newest size fades in."""
    size, *_ = image_shape
    images, alpha = keras.Input(image_shape), keras.Input([])
    sizes = _sizes(size)
    features: Any = None
    for side in reversed(sizes):
        name = f"size_{side}"
        if features is None:
            features = layers.Conv2D(width, 1, name=f"{name}_in")(images)
        elif side == sizes[-2]:
            smaller = layers.AveragePooling2D(2)(images)
            smaller = layers.Conv2D(width, 1, name=f"{name}_in")(smaller)
            share = layers.Reshape((1, 1, 1))(alpha)
            features = smaller + share * (features - smaller)
        features = layers.Conv2D(
            width, 3, padding="same", activation="leaky_relu", name=name
        )(features)
        if side > sizes[0]:
            features = layers.AveragePooling2D(2)(features)
    logits = layers.Dense(1, name="head")(layers.Flatten()(features))
    return keras.Model([images, alpha], logits, name="discriminator")


def make_mapping(latent_size: int, num_styles: int) -> keras.Model:
    """Makes what turns latents into styles."""
    return keras.Sequential(
        [
            keras.Input([latent_size]),
            layers.UnitNormalization(),
            layers.Dense(num_styles, activation="leaky_relu"),
            layers.Dense(num_styles, activation="leaky_relu"),
        ],
        name="mapping",
    )


def _alpha(example: dtrain.Example) -> tf.Tensor:
    alpha = example.state["alpha"]
    return tf.fill(tf.shape(example.latents)[:1], alpha)


def _generate(networks: Any, example: dtrain.Example) -> tf.Tensor:
    noise = example.normal((*example.real_images.shape[1:3], 1))
    styles = networks.mapping(example.latents)
    return networks.synthesis([styles, noise, _alpha(example)])


def judge(networks: Any, example: dtrain.Example) -> Any:
    """Trains the discriminator as a critic, with a gradient penalty."""
    reals, alpha = example.real_images, _alpha(example)
    fakes = tf.stop_gradient(_generate(networks, example))
    penalty = losses.one_centered_penalty(
        lambda images: networks.discriminator([images, alpha]),
        losses.between(reals, fakes, example.uniforms),
    )
    real_scores = networks.discriminator([reals, alpha])[:, 0]
    fake_scores = networks.discriminator([fakes, alpha])[:, 0]
    loss = fake_scores - real_scores + PENALTY_WEIGHT * penalty
    # Or the scores would drift away from 0.
    loss += 1e-3 * tf.square(real_scores)
    return loss, {"discriminator_loss": loss}


def generate(networks: Any, example: dtrain.Example) -> Any:
    """Trains mapping and synthesis to score high."""
    fakes = _generate(networks, example)
    loss = -networks.discriminator([fakes, _alpha(example)])[:, 0]
    return loss, {"generator_loss": loss}


def grow(state: Any, means: Any) -> Any:
    """Fades the newest size in."""
    del means
    return {"alpha": tf.minimum(state["alpha"] + 1.0 / FADE_STEPS, 1.0)}


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes the three networks."""
    del num_classes
    width, num_styles = config.base_channels, 2 * config.base_channels
    adam = {"learning_rate": 1e-3, "beta_1": 0.0, "beta_2": 0.99}
    together = keras.optimizers.Adam(**adam)
    generators = ("mapping", "synthesis")
    return dtrain.Program(
        networks={
            "mapping": make_mapping(config.latent_size, num_styles),
            "synthesis": make_synthesis(image_shape, num_styles, width),
            "discriminator": make_discriminator(image_shape, width),
        },
        phases=[
            dtrain.Phase("discriminator", judge, update=grow),
            dtrain.Phase(generators, generate),
        ],
        optimizers={
            **dict.fromkeys(generators, together),
            "discriminator": keras.optimizers.Adam(**adam),
        },
        averaged=generators,
        state={"alpha": 0.0},
        draw=_generate,
    )
