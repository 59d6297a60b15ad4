"""Draws pictures of a run: grids, and animations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from dtrain.config import Config, ModelSettings
from dtrain.data.sources import points
from dtrain.record import images, scatter

# Draws a picture for each latent vector, float32 [n, latent_size], and label,
# int32 [n] or None, of which the first has a number among all that are drawn.
Draw = Callable[[tf.Tensor, Any, int], tf.Tensor]

# Rows and columns of the grid that a run writes as it goes; a conditional
# model has a row for each class instead.
GRID_SIZE = 8
# Pictures of seeds that are drawn at once: a row of a grid. A point is less.
_BLOCK, _BLOCK_OF_POINTS = 8, 256
# Points of a picture, and real ones behind them.
NUM_POINTS, _NUM_BEHIND = 1024, 5000


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
        uint8 [height, width, C].
    """
    classes = range(num_classes) if config.conditional else ()
    return grid(draw_some, config, default_seeds(config), classes)


def default_seeds(config: Config) -> Sequence[int]:
    """Returns the seeds of the grid that a run writes as it goes."""
    number = NUM_POINTS if _is_of_points(config) else GRID_SIZE * GRID_SIZE
    return range(number // GRID_SIZE if config.conditional else number)


def _is_of_points(config: Config) -> bool:
    return config.dataset.startswith(points.KIND)


def behind(config: Config) -> scatter.Behind | None:
    """Returns what points are drawn over; None of other data, or of none."""
    found = points.of_run(config)
    if found is None:
        return None
    corners = found.plane.to_points(np.array([[-1.0, -1.0], [1.0, 1.0]]))
    real = found.plane.to_images(found.values[:_NUM_BEHIND])
    return scatter.Behind(real, (corners[0], corners[1]))


def grid(
    draw_some: Draw,
    config: Config,
    seeds: Sequence[int],
    classes: Sequence[int],
    truncation: float = 0.0,
) -> npt.NDArray[np.uint8]:
    """Lays out the pictures of seeds.

    Args:
        draw_some: see `draw`.
        config: the run's settings.
        seeds: at least one.
        classes: of a conditional model, for each of which there are rows with
            all seeds; empty for any other.
        truncation: see `of_seeds`.

    Returns:
        uint8 [height, width, C].
    """
    columns = min(len(seeds), 2 * GRID_SIZE) if classes else GRID_SIZE
    drawn = [
        draw_seeds(draw_some, config, seeds, label, truncation)
        for label in classes or [None]
    ]
    under = behind(config)
    return images.make_grid(np.concatenate(drawn), columns, behind=under)


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


def of_seeds(
    config: ModelSettings, seeds: Sequence[int], truncation: float = 0.0
) -> tf.Tensor:
    """Draws the latents of pictures that have a seed each.

    Args:
        config: `latent_size` counts.
        seeds: at least 0.
        truncation: no number is farther from 0; those that would be are drawn
            from within instead (Brock, Donahue and Simonyan 2019, BigGAN,
            section 3.1). 0 is no limit.

    Returns:
        float32 [n, latent_size], normal.
    """
    shape = [config.latent_size]
    if not truncation:
        return tf.stack(
            [tf.random.stateless_normal(shape, [seed, 2]) for seed in seeds]
        )
    uniforms = tf.stack(
        [tf.random.stateless_uniform(shape, [seed, 2]) for seed in seeds]
    )
    # The inverse of the distribution function, between its values at the ends.
    within = math.erf(truncation / math.sqrt(2.0))
    return math.sqrt(2.0) * tf.math.erfinv(within * (2.0 * uniforms - 1.0))


def draw_seeds(
    draw_some: Draw,
    config: Config,
    seeds: Sequence[int],
    label: int | None = None,
    truncation: float = 0.0,
) -> npt.NDArray[np.float32]:
    """Draws the picture of each seed.

    A seed is drawn together with its neighbours, always the same ones at the
    same places: sums of another order would give it other bits, if other
    seeds were asked for. What a program draws at random itself, and which
    examples of the data it uses, follow from the seed, too.

    Args:
        draw_some: see `draw`.
        config: the run's settings.
        seeds: at least 0.
        label: class of all pictures of a conditional model.
        truncation: see `of_seeds`.

    Returns:
        float32 [n, h, w, C] in [-1, 1].
    """
    pictures, size = {}, _BLOCK
    if _is_of_points(config):
        size = _BLOCK_OF_POINTS
    for block in sorted({seed // size for seed in seeds}):
        start = block * size
        neighbours = range(start, start + size)
        labels = None if label is None else tf.fill([size], label)
        some = of_seeds(config, neighbours, truncation)
        drawn = tf.cast(draw_some(some, labels, start), tf.float32).numpy()
        wanted = set(seeds).intersection(neighbours)
        pictures |= {seed: drawn[seed - start] for seed in wanted}
    return np.clip(np.stack([pictures[seed] for seed in seeds]), -1.0, 1.0)


class Walk(NamedTuple):
    """An animation that can repeat: images that change steadily.

    Attributes:
        num_frames: of the whole.
        num_images: side by side, at most.
        width: pixels, at least.
        through_classes: whether each image passes through all classes, and
            stays at its seed; otherwise it passes through seeds.
    """

    num_frames: int = 48
    num_images: int = 16
    width: int = 256
    through_classes: bool = False


def interpolation(
    draw_some: Draw,
    config: Config,
    seeds: Sequence[int],
    classes: Sequence[int],
    walk: Walk,
    truncation: float = 0.0,
) -> Iterator[npt.NDArray[np.uint8]]:
    """Draws an animation between the pictures of seeds.

    Between two of them the latents are cos(t) a + sin(t) b, all of which are
    standard normal, as a and b are.

    Args:
        draw_some: see `draw`.
        config: the run's settings.
        seeds: at least two; at least one, if it walks through classes.
        classes: of a conditional model; empty for any other. There is an image
            of each, or all images walk through them.
        walk: how long, and how large.
        truncation: see `of_seeds`.

    Yields:
        Frames, uint8 [height, width, C].
    """
    if walk.through_classes:
        ways = [[seed] for seed in seeds[: walk.num_images]]
    elif classes:
        ways = [list(seeds)] * min(len(classes), walk.num_images)
    else:
        number = max(1, min(walk.num_images, len(seeds) // 2))
        each = len(seeds) // number
        ways = [
            list(seeds[start * each : (start + 1) * each])
            for start in range(number)
        ]
    latents = tf.stack([of_seeds(config, way, truncation) for way in ways])
    under = behind(config)
    columns = math.ceil(math.sqrt(len(ways)))
    for frame in range(walk.num_frames):
        point = _on_the_way(latents, frame / walk.num_frames)
        labels = None
        if walk.through_classes:
            label = classes[frame * len(classes) // walk.num_frames]
            labels = np.full([len(ways)], label, np.int32)
        elif classes:
            labels = np.array(classes[: len(ways)], np.int32)
        drawn = draw(draw_some, point, labels)
        yield images.make_grid(
            drawn, columns, min_width=walk.width, behind=under
        )


def _on_the_way(latents: tf.Tensor, share: float) -> tf.Tensor:
    """Returns where on their ways, [n, stops, latent_size], images are."""
    stops = latents.shape[1]
    if stops == 1:
        return latents[:, 0]
    stop = int(share * stops)
    angle = 0.5 * math.pi * (share * stops - stop)
    start, end = latents[:, stop], latents[:, (stop + 1) % stops]
    return math.cos(angle) * start + math.sin(angle) * end
