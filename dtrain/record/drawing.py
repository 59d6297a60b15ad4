"""Draws pictures of a run: grids, and animations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from dtrain.config import Config, ModelSettings
from dtrain.record import images

# Draws a picture for each latent vector, float32 [n, latent_size], and label,
# int32 [n] or None, of which the first has a number among all that are drawn.
Draw = Callable[[tf.Tensor, Any, int], tf.Tensor]

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
    draw_some: Draw,
    latents: tf.Tensor,
    labels: npt.NDArray[np.int32] | None,
) -> npt.NDArray[np.float32]:
    """Draws one image for each latent vector.

    Args:
        draw_some: draws some of them, as `gan.pictures.Pictures` does.
        latents: float32 [n, latent_size].
        labels: int32 [n] for a conditional model; None for any other.

    Returns:
        float32 [n, h, w, C] in [-1, 1].
    """
    batches = []
    # Thousands of images at once need gigabytes.
    for start in range(0, latents.shape[0], 256):
        some = None if labels is None else labels[start : start + 256]
        given = None if some is None else tf.constant(some)
        drawn = draw_some(latents[start : start + 256], given, start)
        batches.append(tf.cast(drawn, tf.float32).numpy())
    return np.clip(np.concatenate(batches), -1.0, 1.0)


def fixed_grid(
    draw_some: Draw, config: Config, num_classes: int
) -> npt.NDArray[np.uint8]:
    """Draws the grid that a run writes as it goes, from the same latents.

    Args:
        draw_some: see `draw`.
        config: the run's settings.
        num_classes: number of classes of the data.

    Returns:
        uint8 [height, width, C]; with `conditional` one row for each class.
    """
    rows = num_classes if config.conditional else GRID_SIZE
    num_images = rows * GRID_SIZE
    labels = class_rows(config, num_classes, num_images)
    drawn = draw(draw_some, latents(config, config.seed, num_images), labels)
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
    draw_some: Draw, config: ModelSettings, num_classes: int, seed: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Draws an animation that can repeat: 16 images that change steadily.

    The latents of each go round a circle, cos(t) a + sin(t) b, all of whose
    points are standard normal, as a and b are.

    Args:
        draw_some: see `draw`.
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
        yield images.make_grid(draw(draw_some, point, labels), 4, min_width=256)
