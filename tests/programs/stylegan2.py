"""StyleGAN2: mapping and synthesis, noise, lazy R1 and path lengths.

Karras, Laine, Aittala, Hellsten, Lehtinen and Aila 2020, "Analyzing and
Improving the Image Quality of StyleGAN": modulated convolutions (section 2.2),
lazy regularization (3.1), path length regularization (3.2, equation 4).

    --model=tests.programs.stylegan2:make
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf
from keras import layers

import dtrain
from dtrain import losses

R1_EVERY_STEPS, PATH_EVERY_STEPS = 16, 4
R1_GAMMA, PATH_WEIGHT, PATH_DECAY = 1.0, 0.1, 0.01
STYLE_DECAY = 0.995


@keras.saving.register_keras_serializable(package="programs")
class ModulatedConv(layers.Layer):
    """Scales the weights by the style of each example, and demodulates."""

    def __init__(self, channels: int, **more: Any) -> None:
        super().__init__(**more)
        self.channels = channels

    def build(self, input_shape: Any) -> None:
        """Makes the kernel, and the affine map of the styles."""
        (*_, self.inputs), (*_, num_styles), _ = input_shape
        self.kernel = self.add_weight(
            shape=(3, 3, self.inputs, self.channels),
            initializer="random_normal",
        )
        self.affine = self.add_weight(shape=(num_styles, self.inputs))
        self.noise_strength = self.add_weight(shape=(), initializer="zeros")
        self.bias = self.add_weight(shape=(self.channels,), initializer="zeros")

    def call(self, inputs: Any) -> tf.Tensor:
        """Turns features [b, h, w, c], styles and noise into features."""
        features, styles, noise = inputs
        scales = 1.0 + styles @ self.affine
        made = tf.nn.conv2d(
            features * scales[:, None, None, :], self.kernel, 1, "SAME"
        )
        # Equation (3): what the modulated kernel does to the deviation.
        squares = tf.reduce_sum(tf.square(self.kernel), [0, 1])
        norms = tf.square(scales) @ squares
        made *= tf.math.rsqrt(norms + 1e-8)[:, None, None, :]
        made += self.noise_strength * noise
        return tf.nn.leaky_relu(made + self.bias)

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes the same layer of."""
        return {**super().get_config(), "channels": self.channels}


def make_mapping(latent_size: int, num_styles: int) -> keras.Model:
    """Makes what turns latents into styles."""
    latents = keras.Input([latent_size])
    styles = layers.UnitNormalization()(latents) * math.sqrt(latent_size)
    for _ in range(2):
        styles = layers.Dense(num_styles, activation="leaky_relu")(styles)
    return keras.Model(latents, styles)


def make_synthesis(
    image_shape: tuple[int, int, int], num_styles: int, width: int
) -> keras.Model:
    """Makes what turns styles [b, 2, styles] and noise into an image."""
    height, columns, channels = image_shape
    sides = height // 2, columns // 2
    styles = keras.Input([2, num_styles])
    noise = keras.Input([height, columns, 2])
    first, second = styles[:, 0], styles[:, 1]
    # The learned constant, of which nothing but the batch is of the input.
    constant = layers.Dense(
        math.prod(sides) * width,
        bias_initializer=keras.initializers.RandomNormal(stddev=1.0),
    )
    features = constant(0.0 * first)
    features = layers.Reshape((*sides, width))(features)
    coarse = layers.AveragePooling2D(2)(noise[..., :1])
    features = ModulatedConv(width)([features, first, coarse])
    image = layers.Conv2D(channels, 1)(features)
    features = layers.UpSampling2D(interpolation="bilinear")(features)
    features = ModulatedConv(width)([features, second, noise[..., 1:]])
    image = layers.UpSampling2D(interpolation="bilinear")(image)
    image = layers.Add()([image, layers.Conv2D(channels, 1)(features)])
    return keras.Model([styles, noise], image)


def make_discriminator(
    image_shape: tuple[int, int, int], width: int
) -> keras.Model:
    """Makes a residual block and a head."""
    images = keras.Input(image_shape)
    features = layers.Conv2D(width, 1, activation="leaky_relu")(images)
    inner = layers.Conv2D(width, 3, padding="same", activation="leaky_relu")(
        features
    )
    inner = layers.Conv2D(
        width, 3, strides=2, padding="same", activation="leaky_relu"
    )(inner)
    skipped = layers.Conv2D(width, 1)(layers.AveragePooling2D(2)(features))
    features = layers.Flatten()((inner + skipped) / math.sqrt(2.0))
    features = layers.Dense(width, activation="leaky_relu")(features)
    return keras.Model(images, layers.Dense(1)(features))


def _generate(networks: Any, example: dtrain.Example) -> Any:
    """Draws images, and returns the styles that they were made of, too."""
    height, width, _ = example.real_images.shape[1:]
    # Mixing of styles: half of the images have those of two latents.
    latents = example.latents
    others = example.normal(latents.shape[1:])
    is_mixed = example.uniforms[:, None] < 0.5
    styles = networks.mapping(latents)
    second = networks.mapping(tf.where(is_mixed, others, latents))
    styles = tf.stack([styles, second], axis=1)
    noise = example.normal((height, width, 2))
    return networks.synthesis([styles, noise], training=True), styles, noise


def judge(networks: Any, example: dtrain.Example) -> Any:
    """Computes the logistic loss of the discriminator."""
    fakes, _, _ = _generate(networks, example)
    real_logits = networks.discriminator(example.real_images)[:, 0]
    fake_logits = networks.discriminator(tf.stop_gradient(fakes))[:, 0]
    loss = tf.nn.softplus(-real_logits) + tf.nn.softplus(fake_logits)
    return loss, {"discriminator_loss": loss}


def penalize(networks: Any, example: dtrain.Example) -> Any:
    """Computes R1, lazily: Mescheder et al. 2018, equation (9)."""
    images = example.real_images
    _, penalty = losses.squared_gradient(networks.discriminator, images)
    return R1_EVERY_STEPS * 0.5 * R1_GAMMA * penalty, {"r1_penalty": penalty}


def generate(networks: Any, example: dtrain.Example) -> Any:
    """Computes the non-saturating loss of mapping and synthesis."""
    fakes, styles, _ = _generate(networks, example)
    loss = tf.nn.softplus(-networks.discriminator(fakes)[:, 0])
    return loss, {"generator_loss": loss}, {"style": styles[:, 0]}


def track(state: Any, means: Any) -> Any:
    """Moves the mean of the styles."""
    old, new = state["mean_style"], means["style"]
    return {"mean_style": new + STYLE_DECAY * (old - new)}


def lengthen(networks: Any, example: dtrain.Example) -> Any:
    """Computes how far path lengths are from their mean: equation (4)."""
    _, styles, noise = _generate(networks, example)
    with tf.GradientTape() as tape:
        tape.watch(styles)
        fakes = networks.synthesis([styles, noise], training=True)
        num_pixels = fakes.shape[1] * fakes.shape[2]
        directions = example.normal(fakes.shape[1:]) / math.sqrt(num_pixels)
        seen = tf.reduce_sum(fakes * directions)
    gradients = tape.gradient(seen, styles)
    # The square root has no gradient at 0.
    squares = tf.reduce_mean(tf.reduce_sum(tf.square(gradients), 2), 1)
    lengths = tf.sqrt(squares + 1e-8)
    distance = tf.square(lengths - example.state["mean_length"])
    loss = PATH_EVERY_STEPS * PATH_WEIGHT * distance
    return loss, {"path_length": lengths}


def track_length(state: Any, means: Any) -> Any:
    """Moves the mean of the path lengths."""
    old, new = state["mean_length"], means["path_length"]
    return {"mean_length": old + PATH_DECAY * (new - old)}


def draw(networks: Any, example: dtrain.Example) -> tf.Tensor:
    """Draws with styles near their mean: truncation, with psi 0.7."""
    height, width, _ = example.real_images.shape[1:]
    mean = example.state["mean_style"]
    psi = example.truncation or 0.7
    styles = mean + psi * (networks.mapping(example.latents) - mean)
    styles = tf.stack([styles, styles], axis=1)
    noise = example.normal((height, width, 2))
    return networks.synthesis([styles, noise])


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes the three networks."""
    del num_classes
    width, num_styles = config.base_channels, 2 * config.base_channels
    adam = {"learning_rate": 2e-3, "beta_1": 0.0, "beta_2": 0.99}
    together = keras.optimizers.Adam(**adam)
    generators = ("mapping", "synthesis")
    return dtrain.Program(
        networks={
            "mapping": make_mapping(config.latent_size, num_styles),
            "synthesis": make_synthesis(image_shape, num_styles, width),
            "discriminator": make_discriminator(image_shape, width),
        },
        phases=[
            dtrain.Phase("discriminator", judge),
            dtrain.Phase("discriminator", penalize, R1_EVERY_STEPS),
            dtrain.Phase(generators, generate, update=track),
            dtrain.Phase(
                generators, lengthen, PATH_EVERY_STEPS, update=track_length
            ),
        ],
        # One optimizer serves both generators.
        optimizers={
            **dict.fromkeys(generators, together),
            "discriminator": keras.optimizers.Adam(**adam),
        },
        averaged=generators,
        state={"mean_style": [0.0] * num_styles, "mean_length": 0.0},
        draw=draw,
    )
