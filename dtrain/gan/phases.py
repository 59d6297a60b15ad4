"""The phases of a step as the flags say: an adversarial loss with penalties."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from dtrain.config import Config, ModelSettings
from dtrain.gan import augmentation, losses, schedules
from dtrain.gan.example import Example
from dtrain.gan.program import DISCRIMINATOR, GENERATOR, Phase


def adversarial_phases(config: Config) -> tuple[Phase, ...]:
    """Makes the phases of a step with a loss of `losses.LOSSES`.

    Args:
        config: loss, r1_gamma, r2_gamma, gradient_penalty, conditional and
            discriminator_steps count.

    Returns:
        `discriminator_steps` phases of the discriminator, then one of the
        generator. Their metrics are discriminator_loss (without penalties),
        real_logits, fake_logits, r1_penalty, r2_penalty and gradient_penalty
        (each without its weight; left out where the weight is 0), and
        generator_loss.
    """
    # AutoGraph is for what a user brings: it takes a second of every start.
    as_it_is = tf.autograph.experimental.do_not_convert
    discriminator, generator = (
        as_it_is(functools.partial(objective, config))
        for objective in (_discriminator_objective, _generator_objective)
    )
    follow = None
    if augmentation.is_steered(config):
        follow = as_it_is(
            functools.partial(augmentation.steered, config, config.batch_size)
        )
    judged = Phase(DISCRIMINATOR, discriminator, update=follow)
    return (
        *[judged] * config.discriminator_steps,
        Phase(GENERATOR, generator),
    )


def adversarial_state(config: Config) -> dict[str, float]:
    """Returns the state that `adversarial_phases` update, for a program."""
    if augmentation.is_steered(config):
        return {augmentation.PROBABILITY: 0.0}
    return {}


def generate(
    config: ModelSettings, networks: Any, example: Example
) -> tf.Tensor:
    """Generates an image for each example, as in training.

    It is made of the latents, and of the label if the model is `conditional`.

    Returns:
        float32 [b, H, W, C].
    """
    inputs = example.latents
    if config.conditional:
        inputs = [example.latents, example.labels]
    return tf.cast(networks.generator(inputs, training=True), tf.float32)


def make_critic(
    config: Config, networks: Any, example: Example
) -> losses.Critic:
    """Makes the discriminator a function of images alone.

    It turns images float32 [b, H, W, C] into logits float32 [b], with the
    labels of the example if the model is `conditional`. They are changed as
    `--augment` says, anew at each call.
    """

    def critic(images: tf.Tensor) -> tf.Tensor:
        images = augmentation.augment(config, images, example)
        inputs = [images, example.labels] if config.conditional else images
        logits = networks.discriminator(inputs, training=True)
        return tf.reshape(tf.cast(logits, tf.float32), [-1])

    return critic


def _discriminator_objective(
    config: Config, networks: Any, example: Example
) -> tuple[tf.Tensor, ...]:
    critic = make_critic(config, networks, example)
    real_images = tf.cast(example.real_images, tf.float32)
    fake_images = tf.stop_gradient(generate(config, networks, example))
    real_logits, r1_penalty = _judge(critic, real_images, config.r1_gamma)
    fake_logits, r2_penalty = _judge(critic, fake_images, config.r2_gamma)
    loss = losses.LOSSES[config.loss].discriminator(real_logits, fake_logits)
    metrics = {
        "discriminator_loss": loss,
        "real_logits": real_logits,
        "fake_logits": fake_logits,
    }
    # Mescheder et al. 2018, equation (9): R1 = gamma / 2 E |grad D(x)|^2.
    half = 0.5 * schedules.gamma_factor(config, example.step)
    if r1_penalty is not None:
        metrics["r1_penalty"] = r1_penalty
        loss += half * config.r1_gamma * r1_penalty
    if r2_penalty is not None:
        metrics["r2_penalty"] = r2_penalty
        loss += half * config.r2_gamma * r2_penalty
    # Gulrajani et al. 2017, equation (3): the weight is not halved.
    if config.loss == "wgan_gp" and config.gradient_penalty:
        gradient_penalty = losses.one_centered_penalty(
            critic, losses.between(real_images, fake_images, example.uniforms)
        )
        metrics["gradient_penalty"] = gradient_penalty
        loss += config.gradient_penalty * gradient_penalty
    if augmentation.is_steered(config):
        return loss, metrics, {augmentation.SIGNS: tf.sign(real_logits)}
    return loss, metrics


def _judge(
    critic: losses.Critic, images: tf.Tensor, gamma: float
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Computes the logits, and the penalty if it has a weight."""
    if gamma:
        return losses.squared_gradient(critic, images)
    return critic(images), None


def _generator_objective(
    config: Config, networks: Any, example: Example
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    critic = make_critic(config, networks, example)
    loss_pair = losses.LOSSES[config.loss]
    fake_logits = critic(generate(config, networks, example))
    real_logits = None
    if loss_pair.uses_real_in_generator:
        real_logits = critic(tf.cast(example.real_images, tf.float32))
    loss = loss_pair.generator(real_logits, fake_logits)
    return loss, {"generator_loss": loss}
