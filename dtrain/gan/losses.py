"""Adversarial losses and gradient penalties, one number for each example.

A loss takes the discriminator's logits of real and of fake images, float32
[b], and returns float32 [b]; the step sums them over the batch. Nothing here
knows a network: a penalty is given the critic as a function of images.

    loss = losses.LOSSES["hinge"]
    loss.discriminator(real_logits, fake_logits)    # float32 [b]

For objectives of your own, `cross_entropy`, `squared_error` and
`absolute_error` take logits or images of any shape [b, ...], as the logits of
a PatchGAN are, and return float32 [b] likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

# Keeps the derivative of the norm finite where a critic is flat.
_NORM_EPSILON = 1e-12

Critic = Callable[[tf.Tensor], tf.Tensor]


class Loss(NamedTuple):
    """Both sides of an adversarial game.

    Attributes:
        discriminator: (real_logits, fake_logits), float32 [b] each, to the
            loss that the discriminator minimizes, float32 [b].
        generator: the same for the generator; `real_logits` may be None
            unless `uses_real_in_generator`.
        uses_real_in_generator: whether the generator's loss depends on the
            logits of real images, which then cost one more forward pass.
    """

    discriminator: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    generator: Callable[[Any, tf.Tensor], tf.Tensor]
    uses_real_in_generator: bool = False


def _softplus_discriminator(real: tf.Tensor, fake: tf.Tensor) -> tf.Tensor:
    return tf.math.softplus(-real) + tf.math.softplus(fake)


def _softplus_generator(_: Any, fake: tf.Tensor) -> tf.Tensor:
    return tf.math.softplus(-fake)


def _hinge_discriminator(real: tf.Tensor, fake: tf.Tensor) -> tf.Tensor:
    return tf.nn.relu(1.0 - real) + tf.nn.relu(1.0 + fake)


def _critic_discriminator(real: tf.Tensor, fake: tf.Tensor) -> tf.Tensor:
    return fake - real


def _critic_generator(_: Any, fake: tf.Tensor) -> tf.Tensor:
    return -fake


def _squares_discriminator(real: tf.Tensor, fake: tf.Tensor) -> tf.Tensor:
    return 0.5 * (tf.square(real - 1.0) + tf.square(fake))


def _squares_generator(_: Any, fake: tf.Tensor) -> tf.Tensor:
    return 0.5 * tf.square(fake - 1.0)


def _relativistic_discriminator(real: tf.Tensor, fake: tf.Tensor) -> tf.Tensor:
    return tf.math.softplus(fake - real)


def _relativistic_generator(real: tf.Tensor, fake: tf.Tensor) -> tf.Tensor:
    return tf.math.softplus(real - fake)


LOSSES: dict[str, Loss] = {
    # Goodfellow et al. 2014, Generative Adversarial Nets, section 3:
    #   D: -log sigma(D(x)) - log(1 - sigma(D(G(z)))),  G: -log sigma(D(G(z)))
    # and -log sigma(a) = softplus(-a).
    "non_saturating": Loss(_softplus_discriminator, _softplus_generator),
    # Lim and Ye 2017, Geometric GAN; Miyato et al. 2018, Spectral
    # Normalization for GANs, equations (16) and (17):
    #   D: max(0, 1 - D(x)) + max(0, 1 + D(G(z))),  G: -D(G(z))
    "hinge": Loss(_hinge_discriminator, _critic_generator),
    # Gulrajani et al. 2017, Improved Training of Wasserstein GANs, equation
    # (3) without its penalty, which is `one_centered_penalty`:
    #   D: D(G(z)) - D(x),  G: -D(G(z))
    "wgan_gp": Loss(_critic_discriminator, _critic_generator),
    # Mao et al. 2017, Least Squares GANs, equation (9):
    #   D: (D(x) - 1)^2 / 2 + D(G(z))^2 / 2,  G: (D(G(z)) - 1)^2 / 2
    "least_squares": Loss(_squares_discriminator, _squares_generator),
    # Jolicoeur-Martineau 2018, The relativistic discriminator (RpGAN): each
    # fake is paired with one real; the loss of R3GAN, Huang et al. 2024:
    #   D: softplus(D(G(z)) - D(x)),  G: softplus(D(x) - D(G(z)))
    "relativistic": Loss(
        _relativistic_discriminator,
        _relativistic_generator,
        uses_real_in_generator=True,
    ),
}


def per_example(values: Any) -> tf.Tensor:
    """Computes the mean of each example, over all of its numbers.

    Args:
        values: float [b, ...].

    Returns:
        float32 [b].
    """
    values = tf.cast(values, tf.float32)
    return tf.reduce_mean(values, list(range(1, values.shape.rank)))


def cross_entropy(logits: tf.Tensor, target: Any) -> tf.Tensor:
    """Computes -t log sigma(a) - (1 - t) log(1 - sigma(a)) of logits a.

    Args:
        logits: float [b, ...].
        target: t, in [0, 1]: a number, or float [b], one for each example.

    Returns:
        float32 [b], the mean over the logits of an example.
    """
    logits = tf.cast(logits, tf.float32)
    return per_example(
        tf.nn.sigmoid_cross_entropy_with_logits(
            tf.broadcast_to(_beside(target, logits), logits.shape), logits
        )
    )


def squared_error(values: tf.Tensor, target: Any) -> tf.Tensor:
    """Computes the mean of (a - t)^2 of each example.

    Args:
        values: a, float [b, ...].
        target: t, a number, float [b], or the shape of the values.

    Returns:
        float32 [b].
    """
    values = tf.cast(values, tf.float32)
    return per_example(tf.square(values - _beside(target, values)))


def absolute_error(values: tf.Tensor, target: Any) -> tf.Tensor:
    """Computes the mean of |a - t| of each example, as `squared_error`."""
    values = tf.cast(values, tf.float32)
    return per_example(tf.abs(values - _beside(target, values)))


def _beside(target: Any, values: tf.Tensor) -> tf.Tensor:
    """Gives targets of the examples the rank of their values.

    [b] beside [b, 1] would be taken for a row, and make [b, b] of them.
    """
    target = tf.cast(target, tf.float32)
    if target.shape.rank == 1:
        ones = [1] * (values.shape.rank - 1)
        return tf.reshape(target, [-1, *ones])
    return target


def squared_gradient(
    critic: Critic, images: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes a critic's logits and the squared norm of its gradient.

    The norm can be differentiated again, so that a penalty trains the critic.
    All is float32 whatever type the critic computes in.

    Args:
        critic: a function of images [b, H, W, C] to logits [b] or [b, 1], in
            which no image changes the logits of another.
        images: float [b, H, W, C].

    Returns:
        The logits, float32 [b], and for each image the sum over its pixels of
        (d logit / d pixel)^2, float32 [b].
    """
    images = tf.cast(images, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = tf.reshape(tf.cast(critic(images), tf.float32), [-1])
    # The gradient of the sum is, at each image, that of the image's own logit.
    gradient = tf.convert_to_tensor(
        tape.gradient(
            logits, images, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
    )
    axes = list(range(1, len(images.shape)))
    return logits, tf.reduce_sum(tf.square(gradient), axes)


def between(
    real_images: tf.Tensor, fake_images: tf.Tensor, uniforms: tf.Tensor
) -> tf.Tensor:
    """Makes the images at which WGAN-GP takes its penalty.

    Gulrajani et al. 2017, algorithm 1, line 6: a point on the way from a fake
    image to a real one.

    Args:
        real_images: float [b, H, W, C].
        fake_images: likewise.
        uniforms: float [b] in [0, 1), as `Example.uniforms` are.
    """
    share = _beside(uniforms, real_images)
    return fake_images + share * (real_images - fake_images)


def one_centered_penalty(critic: Critic, images: tf.Tensor) -> tf.Tensor:
    """Computes (|grad D(x)| - 1)^2, the penalty of WGAN-GP.

    Gulrajani et al. 2017, equation (3), without its factor lambda.

    Args:
        critic: as in `squared_gradient`.
        images: float [b, H, W, C], between real and fake ones.

    Returns:
        float32 [b].
    """
    squared_norm = squared_gradient(critic, images)[1]
    return tf.square(tf.sqrt(squared_norm + _NORM_EPSILON) - 1.0)
