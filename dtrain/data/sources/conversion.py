"""Converts images to the size and the channels that a run asks for.

It is all done by TensorFlow's C++, and to one image as to many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dtrain.config import DataSettings
from dtrain.errors import UserError

# Of red, green and blue in grey, as in `tf.image.rgb_to_grayscale`.
_LUMA = (0.2989, 0.587, 0.114)
# What fails where values are out of the range of the others.
LEVELS = "values out of their range"


class Form(NamedTuple):
    """What all images of a data set are converted to.

    Attributes:
        height: in pixels; 0 keeps both sides.
        width: in pixels.
        channels: 1, 3 or 4; 0 keeps them.
        is_padded: whether images of other proportions get borders; or else
            their edges are cut off.
        background: red, green and blue in [0, 255], of borders and behind
            what is transparent.
        is_map: whether they are label maps: a pixel is taken from the nearest
            one, for between two classes there is none; borders are 0.
    """

    height: int = 0
    width: int = 0
    channels: int = 0
    is_padded: bool = False
    background: tuple[int, ...] = (255, 255, 255)
    is_map: bool = False

    @classmethod
    def of(cls, config: DataSettings, *, is_map: bool = False) -> Form:
        """Returns the form that flags ask for.

        Args:
            config: the flags.
            is_map: whether it is that of label maps.
        """
        return cls(
            config.image_size,
            config.image_width or config.image_size,
            1 if is_map else config.channels,
            config.image_fit == "pad",
            tuple(bytes.fromhex(config.background)),
            is_map,
        )

    def shape_of(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Returns height, width and channels of an image after `convert`.

        Args:
            shape: height, width and channels before.
        """
        height, width, channels = shape
        if self.height:
            height, width = self.height, self.width
        return height, width, self.channels or channels

    def colour(self, channels: int) -> list[int]:
        """Returns the background as a pixel; its alpha, if any, is 0."""
        if self.is_map:
            return [0]
        colour = list(self.background)
        if channels < 3:
            parts = zip(_LUMA, colour, strict=True)
            colour = [round(sum(part * value for part, value in parts))]
        return colour + [0] * (channels - len(colour))


def convert(images: tf.Tensor, form: Form) -> tf.Tensor:
    """Converts channels, crops the middle or adds borders, resizes.

    Resizing is bilinear, with antialiasing where it makes images smaller.
    RGB becomes grey by its luma. Of label maps the nearest pixel is taken.

    Args:
        images: uint8 [..., H, W, C], of rank 3 or 4; C is known. Label maps
            are uint16 and have one channel.
        form: what they become.

    Returns:
        [..., height, width, channels] of the same type.
    """
    images = with_channels(images, form)
    if form.channels:
        shape = (*images.shape[:-1], form.channels)
        images = tf.ensure_shape(images, shape)
    if not form.height:
        return images
    return _padded(images, form) if form.is_padded else _cropped(images, form)


def with_channels(images: tf.Tensor, form: Form) -> tf.Tensor:
    """Converts the channels alone; alpha goes onto the background.

    Args:
        images: uint8 [..., H, W, C] with 1 to 4 channels.
        form: its `channels` and `background` count.
    """
    old, new = images.shape[-1], form.channels
    if old == new or not new:
        return images
    # Of a picture it is known when it is decoded.
    channels = tf.shape(images)[-1] if old is None else old
    is_grey, has_alpha = channels < 3, channels % 2 == 0
    if new >= 3:
        images = _if(is_grey, images, _with_colours)
        channels += 2 * (tf.cast(is_grey, tf.int32) if old is None else is_grey)
    if new == 4:
        return _if(channels < 4, images, _with_alpha)
    images = _if(has_alpha, images, lambda x: _on_background(x, form, channels))
    return images if new == 3 else _if(channels >= 3, images, _as_grey)


def _if(
    condition: Any, images: tf.Tensor, change: Callable[[Any], tf.Tensor]
) -> tf.Tensor:
    """Changes images on a condition that is known, here or in the graph."""
    if tf.is_tensor(condition):
        return tf.cond(condition, lambda: change(images), lambda: images)
    return change(images) if condition else images


def _with_alpha(images: tf.Tensor) -> tf.Tensor:
    opaque = tf.fill(tf.shape(images[..., :1]), tf.constant(255, tf.uint8))
    return tf.concat([images, opaque], -1)


def _with_colours(images: tf.Tensor) -> tf.Tensor:
    grey = images[..., :1]
    return tf.concat([grey, grey, images], -1)


def _as_grey(images: tf.Tensor) -> tf.Tensor:
    images = tf.ensure_shape(images, (*images.shape[:-1], 3))
    return tf.image.rgb_to_grayscale(images)


def _on_background(images: tf.Tensor, form: Form, channels: Any) -> tf.Tensor:
    colours = tf.cast(images[..., :-1], tf.int32)
    alpha = tf.cast(images[..., -1:], tf.int32)
    grey, colour = form.colour(1) * 3, form.colour(3)
    behind = tf.where(channels < 3, grey, colour)[: channels - 1]
    mixed = (colours * alpha + behind * (255 - alpha) + 127) // 255
    return tf.cast(mixed, tf.uint8)


def _sides(images: tf.Tensor) -> Any:
    # Sides of the largest images times the largest form need 40 bits.
    shape = tf.shape(images, out_type=tf.int64)
    return shape[-3], shape[-2]


def _resized(
    images: tf.Tensor, height: Any, width: Any, form: Form
) -> tf.Tensor:
    def resized() -> tf.Tensor:
        if form.is_map:
            return tf.image.resize(images, (height, width), method="nearest")
        resized = tf.image.resize(images, (height, width), antialias=True)
        return tf.saturate_cast(tf.round(resized), tf.uint8)

    # It would come out the same, in more time than decoding a JPEG takes.
    old_height, old_width = _sides(images)
    is_so = tf.equal(old_height, tf.cast(height, tf.int64)) & tf.equal(
        old_width, tf.cast(width, tf.int64)
    )
    return tf.cond(is_so, lambda: images, resized)


def _cropped(images: tf.Tensor, form: Form) -> tf.Tensor:
    height, width = _sides(images)
    down = tf.minimum(height, width * form.height // form.width)
    right = tf.minimum(width, height * form.width // form.height)
    down, right = tf.maximum(down, 1), tf.maximum(right, 1)
    top, left = (height - down) // 2, (width - right) // 2
    images = images[..., top : top + down, left : left + right, :]
    return _resized(images, form.height, form.width, form)


def _padded(images: tf.Tensor, form: Form) -> tf.Tensor:
    height, width = _sides(images)
    down = (height * form.width + width // 2) // width
    right = (width * form.height + height // 2) // height
    down = tf.clip_by_value(down, 1, form.height)
    right = tf.clip_by_value(right, 1, form.width)
    top, left = (form.height - down) // 2, (form.width - right) // 2
    borders = [
        [top, form.height - down - top],
        [left, form.width - right - left],
        [0, 0],
    ]
    inside = tf.pad(tf.ones([down, right, 1], tf.int32), borders) > 0
    borders = [[0, 0]] * (images.shape.rank - 3) + borders
    down, right = tf.cast(down, tf.int32), tf.cast(right, tf.int32)
    channels = images.shape[-1]
    images = tf.pad(_resized(images, down, right, form), borders)
    images = tf.ensure_shape(
        images, (*images.shape[:-3], form.height, form.width, channels)
    )
    colour = tf.constant(form.colour(channels), images.dtype)
    return tf.where(inside, images, colour)


class Levels(NamedTuple):
    """Which values are black and white, in images that have not 8 bits.

    Attributes:
        black: becomes 0.
        white: becomes 255.
    """

    black: float = 0.0
    white: float = 255.0

    @property
    def scale(self) -> float:
        """What a value is multiplied with."""
        return 255.0 / (self.white - self.black)

    def to_8_bits(self, images: tf.Tensor) -> tf.Tensor:
        """Scales images, to the nearest value; another range fails.

        Args:
            images: uint8, uint16 or float32, of any shape.
        """
        if images.dtype == tf.uint8:
            return images
        images = tf.cast(images, tf.float32)
        are_in = (images >= self.black) & (images <= self.white)
        fits = tf.debugging.Assert(tf.reduce_all(are_in), [LEVELS])
        with tf.control_dependencies([] if fits is None else [fits]):
            scaled = images * self.scale - self.black * self.scale
        return tf.cast(tf.round(scaled), tf.uint8)

    def fault(self, name: str, images: tf.Tensor) -> UserError | None:
        """Says what `to_8_bits` fails for; None if it does not.

        Args:
            name: of the images, for the error.
            images: uint8, uint16 or float32, of any shape.
        """
        try:
            self.to_8_bits(images)
        except tf.errors.InvalidArgumentError:
            return UserError(
                f"{name} is not in [{self.black:g}, {self.white:g}], as those "
                "that were looked at are; give --white_level=65535, or store "
                "the set as uint8"
            )
        return None


def levels(
    name: str, dtype: np.dtype, low: float, high: float, config: DataSettings
) -> Levels:
    """Chooses the levels of images by the lowest and the highest of some.

    Args:
        name: of the images, for the error.
        dtype: uint8, uint16 or a float.
        low: the lowest value.
        high: the highest.
        config: `white_level` counts, for uint16.

    Returns:
        Of floats [0, 1], or [-1, 1] if some are negative.

    Raises:
        UserError: they are of another type, or in no range that is known.
    """
    if dtype == np.uint8:
        return Levels()
    if dtype == np.uint16:
        white = config.white_level or white_level(int(high))
        if high > white:
            raise UserError(
                f"{name} holds {high:g}, above white_level ({white}); raise it"
            )
        return Levels(0.0, white)
    if not np.issubdtype(dtype, np.floating):
        raise UserError(
            f"{name} is of type {dtype}; images must be uint8, uint16, or "
            "floats in [0, 1] or [-1, 1]"
        )
    # NaN must fail, too.
    if not (low >= -1 and high <= 1):
        raise UserError(
            f"{name} lies in [{low:g}, {high:g}]; floats must lie in [0, 1] "
            "or [-1, 1]; store 0 to 255 as uint8"
        )
    return Levels(-1.0 if low < 0 else 0.0, 1.0)


def white_level(highest: int) -> int:
    """Returns the smallest of 255, 511, ..., 65535 that is not exceeded.

    Args:
        highest: value of some images of 16 bits; those that are black say
            nothing.
    """
    bits = max(8, int(highest).bit_length()) if highest else 16
    return 2**bits - 1
