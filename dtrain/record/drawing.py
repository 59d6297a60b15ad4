"""Draws images with the EMA generator of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from dtrain.config import Config, ModelSettings
from dtrain.record import images

# Rows and columns of the grid that a run writes as it goes; a conditional
# model has a row for each class instead.
GRID_SIZE = 8


def latents(config: ModelSettings, seed: int, num_images: int) -> tf.Tensor:
    """Draws latents for pictures: the first are the same for any number.

    Args:
        config: the run's settings.
        seed: at least 0; the grids of a run use its own.
        num_images: how many.

    Returns:
        float32 [num_images, latent_size], standard normal.
    """
    # 2 keeps it apart from the seeds of training, see `gan`.
    return tf.random.stateless_normal(
        [num_images, config.latent_size], tf.stack([seed, 2])
    )


def draw(
    generator: keras.Model,
    latents: tf.Tensor,
    labels: npt.NDArray[np.int32] | None,
) -> npt.NDArray[np.float32]:
    """Draws one image for each latent vector.

    Args:
        generator: the EMA generator of a run.
        latents: float32 [n, latent_size].
        labels: int32 [n] for a conditional model; None for any other.

    Returns:
        float32 [n, H, W, C] in [-1, 1].
    """
    batches = []
    # Thousands of images at once need gigabytes.
    for start in range(0, latents.shape[0], 256):
        inputs = latents[start : start + 256]
        if labels is not None:
            inputs = [inputs, tf.constant(labels[start : start + 256])]
        drawn = generator(inputs, training=False)
        batches.append(tf.cast(drawn, tf.float32).numpy())
    return np.clip(np.concatenate(batches), -1.0, 1.0)


def fixed_grid(
    generator: keras.Model, config: Config, num_classes: int
) -> npt.NDArray[np.uint8]:
    """Draws the grid that a run writes as it goes, from the same latents.

    Args:
        generator: the EMA generator of the run.
        config: the run's settings.
        num_classes: number of classes of the data.

    Returns:
        uint8 [height, width, C]; with `conditional` one row for each class.
    """
    rows = num_classes if config.conditional else GRID_SIZE
    num_images = rows * GRID_SIZE
    labels = class_rows(config, num_classes, num_images)
    drawn = draw(generator, latents(config, config.seed, num_images), labels)
    return images.make_grid(drawn, GRID_SIZE)


def class_rows(
    config: ModelSettings, num_classes: int, num_images: int
) -> npt.NDArray[np.int32] | None:
    """Labels images so that each row of a grid shows one class.

    Returns:
        int32 [num_images]; None for a model that is not conditional.
    """
    if not config.conditional:
        return None
    return (np.arange(num_images) // GRID_SIZE % num_classes).astype(np.int32)


def class_columns(
    config: ModelSettings, num_classes: int, num_images: int
) -> npt.NDArray[np.int32] | None:
    """Labels images with all classes in turn: 0, 1, 2, ..., 0, 1, 2, ...

    Returns:
        int32 [num_images]; None for a model that is not conditional.
    """
    if not config.conditional:
        return None
    return (np.arange(num_images) % num_classes).astype(np.int32)


def num_columns(config: ModelSettings, num_classes: int) -> int:
    """Chooses the width of a grid of `class_columns`.

    Returns:
        The number of columns, near `GRID_SIZE`: with `conditional` a multiple
        of the classes, so that each column shows one, unless they are many.
    """
    if not config.conditional:
        return GRID_SIZE
    columns = num_classes * max(1, GRID_SIZE // num_classes)
    return min(columns, 2 * GRID_SIZE)


def interpolation(
    generator: keras.Model, config: ModelSettings, num_classes: int, seed: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Draws an animation that can repeat: 16 images that change steadily.

    The latents of each go round a circle, cos(t) a + sin(t) b, all of whose
    points are standard normal, as a and b are.

    Args:
        generator: the EMA generator of a run.
        config: the run's settings.
        num_classes: number of classes of the data.
        seed: at least 0.

    Yields:
        48 frames, uint8 [height, width, C].
    """
    start, end = tf.split(latents(config, seed, 32), 2)
    labels = class_columns(config, num_classes, 16)
    for frame in range(48):
        angle = 2.0 * math.pi * frame / 48
        point = math.cos(angle) * start + math.sin(angle) * end
        yield images.make_grid(draw(generator, point, labels), 4, min_width=256)
