"""What changes with the images that were seen: functions of (config, step).

`--learning_rate_schedule` and `--warmup_steps` are of a run's length; what the
burn-in of R3GAN moves is of images (Huang et al. 2024, "The GAN is dead; long
live the GAN!", appendix D: all of it along one cosine).
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from dtrain.config import Config


def learning_rate_factor(config: Config, step: tf.Tensor) -> tf.Tensor:
    """Computes the factor of both learning rates at a step.

    Rises linearly over the first `warmup_steps`, then stays at 1 or falls
    along half a cosine to 0 at `num_steps` (Loshchilov and Hutter, 2017,
    "SGDR", equation 5, without restarts). What the burn-in makes of it is a
    factor more.

    Args:
        config: the run's settings.
        step: int64 scalar, the steps that are done.

    Returns:
        float32 scalar, at least 0.
    """
    done = tf.cast(step, tf.float32)
    factor = tf.constant(1.0)
    if config.learning_rate_schedule == "cosine":
        length = float(config.num_steps - config.warmup_steps)
        fraction = tf.clip_by_value(
            (done - config.warmup_steps) / length, 0.0, 1.0
        )
        factor = 0.5 * (1.0 + tf.cos(math.pi * fraction))
    if config.warmup_steps:
        factor *= tf.minimum((done + 1.0) / config.warmup_steps, 1.0)
    return factor * burnt_in(config, step, 1.0, config.end_learning_rate_factor)


def gamma_factor(config: Config, step: tf.Tensor) -> Any:
    """Computes the factor of the weights of R1 and R2 at a step.

    Args:
        config: the run's settings.
        step: int64 scalar, the steps that are done.

    Returns:
        float32 scalar; the number 1 where it does not change.
    """
    return burnt_in(config, step, 1.0, config.end_gamma_factor)


def beta_2(config: Config, step: tf.Tensor) -> Any:
    """Computes Adam's beta_2 at a step; arguments as `gamma_factor`."""
    last = config.end_beta_2 or config.beta_2
    return burnt_in(config, step, config.beta_2, last)


def half_life_images(config: Config, step: tf.Tensor) -> tf.Tensor:
    """Computes the half-life of the moving averages at a step.

    As in NVIDIA's StyleGAN2 it is at most a twentieth of the images so far, or
    an early average would be that of the initial weights; with a burn-in, as
    in R3GAN, it rises from 0 over that.

    Args:
        config: the run's settings.
        step: int64 scalar, the steps that are done.

    Returns:
        float32 scalar, in images.
    """
    most = config.ema_half_life_images
    if config.burn_in_images:
        return tf.maximum(rising(config, step + 1, most), 1e-3)
    seen = tf.cast((step + 1) * config.batch_size, tf.float32)
    return tf.minimum(most, 0.05 * seen)


def rising(config: Config, step: tf.Tensor, last: float) -> Any:
    """Computes where a value is that rises from 0 over the burn-in.

    Args:
        config: burn_in_images and batch_size count.
        step: int64 scalar, the steps that are done.
        last: from `burn_in_images` on, or always where there is no burn-in.

    Returns:
        float32 scalar; `last` itself where there is none.
    """
    first = 0.0 if config.burn_in_images else last
    return burnt_in(config, step, first, last)


def burnt_in(config: Config, step: tf.Tensor, first: float, last: float) -> Any:
    """Computes where a value is on its way from the first to the last.

    Args:
        config: burn_in_images and batch_size count.
        step: int64 scalar, the steps that are done.
        first: before the first image.
        last: from `burn_in_images` on.

    Returns:
        float32 scalar; `first` itself, where nothing changes.
    """
    if not config.burn_in_images or first == last:
        return first
    seen = tf.cast(step * config.batch_size, tf.float32)
    progress = tf.minimum(seen / config.burn_in_images, 1.0)
    return first + (last - first) * 0.5 * (1.0 - tf.cos(math.pi * progress))
