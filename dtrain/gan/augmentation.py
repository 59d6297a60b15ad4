"""Changes images before the discriminator sees them, so that few are enough.

Real and fake images are changed alike, each by its own random numbers, and the
generator's gradient goes through the change. So a discriminator cannot learn
few images by heart, and a generator does not learn to draw changed ones.

    diff    Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient
            GAN Training", section 4: colour, translation and cutout, always
    ada     Karras et al. 2020, "Training Generative Adversarial Networks with
            Limited Data", appendix B: pixel blits, geometry and colour, each
            with the same probability

What ada draws follows appendix B; in place of its wavelets, resampling is
bilinear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from dtrain.config import Config, ObjectiveSettings
from dtrain.gan import schedules
from dtrain.gan.example import Example

# Of the state of a program whose probability follows the discriminator.
PROBABILITY = "augment_probability"
SIGNS = "real_signs"

# Of DiffAugment: shares of the side of an image.
_SHIFT, _CUT = 0.125, 0.5
# Of ada: deviations, of logarithms to base 2, of shares of a side, of values.
_SCALE, _ADA_SHIFT = 0.2, 0.125
_BRIGHTNESS, _CONTRAST, _SATURATION = 0.2, 0.5, 1.0


def augment(config: Config, images: tf.Tensor, example: Example) -> tf.Tensor:
    """Changes images as `--augment` says.

    Args:
        config: `augment` and `augment_probability` count, and the burn-in
            over which a fixed probability rises.
        images: float32 [b, H, W, C] in [-1, 1].
        example: of each image; other numbers at each call.

    Returns:
        float32 [b, H, W, C], a little beyond [-1, 1] where colours change.
    """
    if config.augment == "diff":
        return diff_augment(images, example)
    if config.augment == "ada":
        if is_steered(config):
            chance = example.state[PROBABILITY]
        else:
            fixed = config.augment_probability
            chance = schedules.rising(config, example.step, fixed)
        return ada(images, example, chance)
    return images


def is_steered(config: ObjectiveSettings) -> bool:
    """Tells whether the probability follows the discriminator."""
    return config.augment == "ada" and not config.augment_probability


def steered(
    config: ObjectiveSettings,
    batch_size: int,
    state: Mapping[str, tf.Tensor],
    means: Mapping[str, tf.Tensor],
) -> dict[str, tf.Tensor]:
    """Moves the probability by r_t = E[sign(D(x))], of real images.

    Karras et al. 2020, section 3: up by a fixed amount where r_t is above its
    target, which says that real images are known by heart, and else down.

    Args:
        config: `augment_target` and `augment_ramp_images` count.
        batch_size: images of an update.
        state: of the program.
        means: over the batch.
    """
    up = tf.sign(means[SIGNS] - config.augment_target)
    moved = state[PROBABILITY] + up * batch_size / config.augment_ramp_images
    return {PROBABILITY: tf.clip_by_value(moved, 0.0, 1.0)}


# DiffAugment.


def diff_augment(images: tf.Tensor, example: Example) -> tf.Tensor:
    """Changes colours, shifts each image, and cuts a part out of it.

    Args:
        images: float32 [b, H, W, C].
        example: of each image.
    """
    images += _beside(example.uniform()) - 0.5
    grey = tf.reduce_mean(images, 3, keepdims=True)
    images = grey + (images - grey) * 2.0 * _beside(example.uniform())
    mean = tf.reduce_mean(images, [1, 2, 3], keepdims=True)
    images = mean + (images - mean) * (_beside(example.uniform()) + 0.5)
    for axis in (1, 2):
        images = _shifted(images, axis, example.uniform())
    inside = [_is_cut(images.shape[axis], example.uniform()) for axis in (1, 2)]
    is_cut = inside[0][:, :, None] & inside[1][:, None, :]
    return tf.where(is_cut[..., None], 0.0, images)


def _shifted(images: tf.Tensor, axis: int, uniforms: tf.Tensor) -> tf.Tensor:
    """Shifts each image by up to an eighth of a side; zeros come in."""
    size = images.shape[axis]
    most = int(size * _SHIFT + 0.5)
    shifts = tf.cast(tf.floor(uniforms * (2 * most + 1)), tf.int32) - most
    places = tf.range(size) + shifts[:, None]
    moved = tf.gather(
        images, tf.clip_by_value(places, 0, size - 1), axis=axis, batch_dims=1
    )
    is_inside = (places >= 0) & (places < size)
    shape = [-1, size, 1, 1] if axis == 1 else [-1, 1, size, 1]
    return tf.where(tf.reshape(is_inside, shape), moved, 0.0)


def _is_cut(size: int, uniforms: tf.Tensor) -> tf.Tensor:
    """Returns which rows, or columns, of each image are cut out: [b, size]."""
    cut = int(size * _CUT + 0.5)
    middle = tf.floor(uniforms * (size + 1 - cut % 2))
    first = tf.cast(middle, tf.int32)[:, None] - cut // 2
    places = tf.range(size)
    return (places >= first) & (places < first + cut)


# Adaptive augmentation.


def ada(images: tf.Tensor, example: Example, chance: Any) -> tf.Tensor:
    """Changes geometry and colours, each with a chance.

    Args:
        images: float32 [b, H, W, C].
        example: of each image.
        chance: of each change, in [0, 1]; float32 scalar or a number.
    """
    images = resampled(images, _geometry(images.shape, example, chance))
    return _recoloured(images, _colours(example, chance))


def _geometry(shape: Any, example: Example, chance: Any) -> tf.Tensor:
    """Draws where each pixel of an image comes from, float32 [b, 3, 3].

    Pixels are counted from the middle of the image, to the right and down.
    """
    _, height, width, _ = shape
    sides = tf.constant([width, height], tf.float32)

    def maybe(values: tf.Tensor, otherwise: float, p: Any = chance) -> Any:
        is_drawn = example.uniform() < p
        if values.shape.rank == 2:
            is_drawn = is_drawn[:, None]
        return tf.where(is_drawn, values, otherwise)

    one = tf.ones_like(example.latents[:, 0])
    flips = maybe(tf.sign(example.uniform() - 0.5), 1.0)
    matrix = _matrix(flips, 0.0 * one, 0.0 * one, one)
    # Exactly 0 and 1: a cosine of a quarter is not.
    quarters = tf.cast(maybe(tf.floor(4.0 * example.uniform()), 0.0), tf.int32)
    cosines = tf.gather([1.0, 0.0, -1.0, 0.0], quarters)
    sines = tf.gather([0.0, 1.0, 0.0, -1.0], quarters)
    matrix @= _matrix(cosines, -sines, sines, cosines)
    shares = _ADA_SHIFT * (2.0 * example.uniform((2,)) - 1.0)
    matrix @= _shift(tf.round(maybe(shares, 0.0) * sides))
    scales = maybe(_power(_SCALE * example.normal()), 1.0)
    matrix @= _matrix(scales, 0.0 * one, 0.0 * one, scales)
    # Of two rotations, so that either is drawn with the chance.
    each = 1.0 - tf.sqrt(tf.clip_by_value(1.0 - chance, 0.0, 1.0))
    matrix @= _rotation(maybe(_angle(example), 0.0, each))
    scales = maybe(_power(_SCALE * example.normal()), 1.0)
    matrix @= _matrix(scales, 0.0 * one, 0.0 * one, 1.0 / scales)
    matrix @= _rotation(maybe(_angle(example), 0.0, each))
    shares = _ADA_SHIFT * example.normal((2,))
    return matrix @ _shift(maybe(shares, 0.0) * sides)


def _angle(example: Example) -> tf.Tensor:
    return math.pi * (2.0 * example.uniform() - 1.0)


def _power(exponents: tf.Tensor) -> tf.Tensor:
    return tf.exp(math.log(2.0) * exponents)


def _rotation(angles: tf.Tensor) -> tf.Tensor:
    cosines, sines = tf.cos(angles), tf.sin(angles)
    return _matrix(cosines, -sines, sines, cosines)


def _shift(shifts: tf.Tensor) -> tf.Tensor:
    zeros, ones = 0.0 * shifts[:, 0], 1.0 + 0.0 * shifts[:, 0]
    return _matrix(ones, zeros, zeros, ones, shifts)


def _matrix(
    a: tf.Tensor, b: tf.Tensor, c: tf.Tensor, d: tf.Tensor, shifts: Any = None
) -> tf.Tensor:
    """Makes [[a, b, x], [c, d, y], [0, 0, 1]], of [b] and of shifts [b, 2]."""
    zeros, ones = tf.zeros_like(a), tf.ones_like(a)
    x, y = (zeros, zeros) if shifts is None else tf.unstack(shifts, axis=1)
    rows = (a, b, x), (c, d, y), (zeros, zeros, ones)
    return tf.stack([tf.stack(row, axis=1) for row in rows], axis=1)


def resampled(images: tf.Tensor, matrices: tf.Tensor) -> tf.Tensor:
    """Takes each pixel of an image from elsewhere in it, bilinearly.

    Beyond its edges an image is mirrored.

    Args:
        images: float32 [b, H, W, C].
        matrices: float32 [b, 3, 3], from the place of a pixel, (x, y, 1) from
            the middle of the image to the right and down, to where it is taken
            from.

    Returns:
        float32 [b, H, W, C]; linear in the images, with that gradient.
    """
    _, height, width, channels = images.shape
    middle = tf.constant([(width - 1) / 2.0, (height - 1) / 2.0])
    columns, rows = tf.meshgrid(
        tf.range(width, dtype=tf.float32), tf.range(height, dtype=tf.float32)
    )
    places = tf.reshape(tf.stack([columns, rows], axis=-1), [-1, 2]) - middle
    places = tf.concat([places, tf.ones([height * width, 1])], axis=1)
    found = tf.einsum("bij,nj->bni", matrices[:, :2], places) + middle
    x = _mirrored(found[..., 0], width)
    y = _mirrored(found[..., 1], height)
    left, top = tf.floor(x), tf.floor(y)
    flat = tf.reshape(images, [-1, height * width, channels])
    made: Any = 0.0
    for row, share_of_row in ((top, top + 1.0 - y), (top + 1.0, y - top)):
        for column, share in ((left, left + 1.0 - x), (left + 1.0, x - left)):
            # What is beyond the last has no share.
            index = tf.minimum(row, height - 1.0) * width
            index += tf.minimum(column, width - 1.0)
            pixels = tf.gather(
                flat, tf.cast(index, tf.int32), axis=1, batch_dims=1
            )
            made += (share_of_row * share)[..., None] * pixels
    return tf.reshape(made, [-1, height, width, channels])


def _mirrored(places: tf.Tensor, size: int) -> tf.Tensor:
    """Folds places into [0, size - 1]."""
    last = float(size - 1)
    if not last:
        return tf.zeros_like(places)
    folded = tf.math.floormod(places, 2.0 * last)
    return tf.minimum(folded, 2.0 * last - folded)


def _colours(example: Example, chance: Any) -> tf.Tensor:
    """Draws how colours change, float32 [b, 3, 4], of (red, green, blue, 1)."""

    def maybe(values: tf.Tensor, otherwise: float) -> tf.Tensor:
        drawn = tf.where(example.uniform() < chance, values, otherwise)
        return drawn[:, None, None]

    along = tf.fill([3, 3], 1.0 / 3.0)
    across = tf.eye(3) - along
    brightness = maybe(_BRIGHTNESS * example.normal(), 0.0)
    contrast = maybe(_power(_CONTRAST * example.normal()), 1.0)
    flip = maybe(tf.floor(2.0 * example.uniform()), 0.0)
    angle = maybe(_angle(example), 0.0)
    saturation = maybe(_power(_SATURATION * example.normal()), 1.0)
    # Rodrigues: a turn about the axis of greys, (1, 1, 1).
    third = 1.0 / math.sqrt(3.0)
    turned = tf.constant(
        [[0.0, -third, third], [third, 0.0, -third], [-third, third, 0.0]]
    )
    hue = along + tf.cos(angle) * across + tf.sin(angle) * turned
    matrix = (
        (along + saturation * across) @ hue @ (tf.eye(3) - 2.0 * flip * along)
    )
    shift = tf.fill([1, 3, 1], 1.0) * brightness * contrast
    # First brightness, then contrast; what follows turns both.
    turn = matrix @ shift
    return tf.concat([matrix * contrast, turn], axis=2)


def _recoloured(images: tf.Tensor, matrices: tf.Tensor) -> tf.Tensor:
    """Changes colours; those of grey images by the mean, and no alpha."""
    channels = images.shape[3]
    num_colours = channels - (channels + 1) % 2
    colours = images[..., :num_colours]
    if num_colours == 1:
        factor = tf.reduce_mean(tf.reduce_sum(matrices[..., :3], 2), 1)
        shift = tf.reduce_mean(matrices[..., 3], 1)
        colours = colours * _beside(factor) + _beside(shift)
    else:
        colours = tf.einsum("bij,bhwj->bhwi", matrices[..., :3], colours)
        colours += matrices[:, None, None, :, 3]
    return tf.concat([colours, images[..., num_colours:]], axis=3)


def _beside(values: tf.Tensor) -> tf.Tensor:
    """Gives [b] the rank of images."""
    return values[:, None, None, None]
