"""Pictures as they are in files -> pixels: one step for all formats.

TensorFlow's C++ decodes JPEG and PNG: with its alpha, with all of its 16 bits,
and turned as the camera's note in a JPEG asks for. All else is Pillow's, one
picture at a time. What a file is follows from its content, not from its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dtrain.data.sources import (
    by_pillow,
    conversion,
    pictures,
    python_calls,
)
from dtrain.errors import UserError

ALL_BITS = 65535
# What TensorFlow is told of a picture before it decodes it. The first is any
# that it decodes by itself.
_PLAIN, _ALPHA, _16_BITS, _PILLOWS = range(4)
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"
_HEAD_BYTES = 32
# Where a PNG says how many bits a channel has, and which channels.
_DEPTH_AT, _COLOURS_AT = 24, 25
# Where all that is asked of the chunks before the pixels is, and the EXIF of a
# camera. RE2 is quick, but not for nothing.
_CHUNK_BYTES, _EXIF_BYTES = 16384, 4096
# \C is any byte. A byte that looks like it elsewhere does no harm: with an
# alpha of its own the picture comes out the same.
_COLOUR_KEY, _TURNED_PNG = r"\C*tRNS\C*", r"\C*eXIf\C*"
_TOLD_PNG = r"\C*(?:tRNS|eXIf)\C*"
_EXIF = r"\C*Exif\x00\x00(?:II|MM)\C*"
_ENTRIES = r"(?:\C{12}){0,60}?"
# In its first directory, where all cameras put it: tag 0x112, one short.
_ORIENTATION = (
    r"\C*?Exif\x00\x00(?:"
    rf"II\*\x00\x08\x00\x00\x00\C\C{_ENTRIES}"
    r"\x12\x01\x03\x00\x01\x00\x00\x00([\x01-\x08])\x00"
    rf"|MM\x00\*\x00\x00\x00\x08\C\C{_ENTRIES}"
    r"\x01\x12\x00\x03\x00\x00\x00\x01\x00([\x01-\x08])"
    r")\C*"
)
_USUAL_EXIF = (
    r"\C*Exif\x00\x00(?:II\*\x00\x08\x00\x00\x00|MM\x00\*\x00\x00\x00\x08)\C*"
)


class Decoder(NamedTuple):
    """Decodes the pictures of one data set, to one form.

    Attributes:
        form: of the images.
        colours: 1 or 3, that all pictures have; 0 if `form` converts them.
        white_level: what is white where a picture has 16 bits.
        room: how much memory decoding may take.
    """

    form: conversion.Form
    colours: int
    white_level: int
    room: pictures.Room

    def of_any_level(self) -> Decoder:
        """Returns one that decodes pictures of 16 bits whatever they hold."""
        return self._replace(white_level=ALL_BITS)

    def is_for_pillow(self, content: tf.Tensor) -> tf.Tensor:
        """Tells, bool [], whether a picture is left to Pillow.

        Args:
            content: string []; a whole file.
        """
        return is_for_pillow(content)

    def pixels(self, content: bytes) -> np.ndarray:
        """Decodes what is for Pillow, outside of a graph.

        Args:
            content: a whole file.

        Returns:
            [H, W, C].

        Raises:
            PictureError: it cannot be decoded; see `by_pillow`.
        """
        return by_pillow.decode(content, self.white_level, self.room)

    def by_tensorflow(self, content: tf.Tensor) -> tf.Tensor:
        """Decodes what is not for Pillow.

        Args:
            content: string []; a whole file.

        Returns:
            uint8 [H, W, C]; C is 1 to 4.
        """
        # As it always was, for runs that were begun so.
        channels = self.form.channels if self.form.channels != 4 else 0

        def plain() -> tf.Tensor:
            image = tf.io.decode_image(
                content, channels, expand_animations=False
            )
            return _turned(image, content)

        def with_alpha() -> tf.Tensor:
            return tf.concat(_parts(content, tf.uint8), -1)

        def of_16_bits() -> tf.Tensor:
            colours, alpha = _parts(content, tf.uint16)
            levels = conversion.Levels(0.0, self.white_level)
            alpha = conversion.Levels(0.0, ALL_BITS).to_8_bits(alpha)
            return tf.concat([levels.to_8_bits(colours), alpha], -1)

        branches = [plain, with_alpha, of_16_bits]
        is_png = _begins(_head(content), _PNG)
        plain_kind = tf.constant(_PLAIN)
        kind = tf.cond(is_png, lambda: _kind(content), lambda: plain_kind)
        image = tf.switch_case(kind, branches)
        return tf.ensure_shape(image, (None, None, None))

    def by_pillow(self, content: tf.Tensor) -> tf.Tensor:
        """Decodes what is for Pillow; see `by_tensorflow`."""
        dtype = tf.uint16 if self.form.is_map else tf.uint8

        def decode(content: Any) -> tuple[np.ndarray, bytes]:
            data = content if isinstance(content, bytes) else content.item()
            try:
                image = self.pixels(data)
            except by_pillow.PictureError as error:
                # TensorFlow would print all of its stack.
                nothing = np.zeros((1, 1, 1), dtype.as_numpy_dtype)
                return nothing, str(error).encode()
            return image, b""

        image, why = python_calls.numpy_function(
            decode, [content], (dtype, tf.string)
        )
        is_sound = tf.debugging.Assert(tf.equal(why, ""), [why])
        with tf.control_dependencies([] if is_sound is None else [is_sound]):
            return tf.ensure_shape(image, (None, None, None))

    def decode(
        self, content: tf.Tensor, by_tensorflow: Callable[[Any], tf.Tensor]
    ) -> tf.Tensor:
        """Decodes any picture, one at a time.

        Args:
            content: string []; a whole file.
            by_tensorflow: the function of that name, which may be traced.
        """
        return tf.cond(
            is_for_pillow(content),
            lambda: self.by_pillow(content),
            lambda: by_tensorflow(content),
        )

    def converted(self, image: tf.Tensor) -> tf.Tensor:
        """Converts a decoded picture to the form of the data set.

        Args:
            image: what one of the others returned.

        Returns:
            uint8 [height, width, channels]; of another shape if the picture
            has other colours than `colours`.
        """
        form = self.form._replace(channels=self.form.channels or self.colours)
        if not self.form.channels:
            channels = tf.shape(image)[-1]
            is_alike = tf.debugging.Assert(
                tf.equal(channels < 3, self.colours < 3), ["other colours"]
            )
            with tf.control_dependencies(
                [] if is_alike is None else [is_alike]
            ):
                image = tf.identity(image)
        return conversion.convert(image, form)


class MapDecoder(Decoder):
    """Decodes label maps, all by Pillow: TensorFlow knows no palettes."""

    def is_for_pillow(self, content: tf.Tensor) -> tf.Tensor:
        """Tells that it is; see `Decoder.is_for_pillow`."""
        return tf.fill(tf.shape(content), value=True)

    def pixels(self, content: bytes) -> np.ndarray:
        """Returns uint16 [H, W, 1]; see `Decoder.pixels`.

        Raises:
            PictureError: it cannot be decoded; see `by_pillow`.
        """
        return by_pillow.decode_map(content, self.room)

    def by_tensorflow(self, content: tf.Tensor) -> tf.Tensor:
        """Fails for what is empty: nothing else comes here."""
        # Python here would let one thread at a time decode all other pictures.
        return tf.io.decode_png(content, 1, tf.uint16)

    def decode(
        self, content: tf.Tensor, by_tensorflow: Callable[[Any], tf.Tensor]
    ) -> tf.Tensor:
        """Decodes any label map; see `Decoder.decode`."""
        del by_tensorflow
        return tf.ensure_shape(self.by_pillow(content), (None, None, 1))


def _parts(content: tf.Tensor, dtype: tf.DType) -> list[tf.Tensor]:
    """Decodes a PNG to its colours and its alpha.

    TensorFlow decodes to none or all of both.
    """
    image = tf.io.decode_png(content, 4, dtype)
    is_grey = _is_grey_png(_head(content))
    return [image[..., : tf.where(is_grey, 1, 3)], image[..., 3:]]


def colours_of(channels: int) -> int:
    """Returns how many channels are left on a background."""
    return 1 if channels < 3 else 3


def is_for_pillow(content: tf.Tensor) -> tf.Tensor:
    """Tells, bool [], whether TensorFlow does not decode a picture rightly.

    Args:
        content: string []; a whole file.
    """
    return tf.equal(_kind(content), _PILLOWS)


def _head(content: tf.Tensor) -> tf.Tensor:
    head = tf.io.decode_raw(content, tf.uint8, fixed_length=_HEAD_BYTES)
    return tf.cast(head, tf.int32)


def _is_grey_png(head: tf.Tensor) -> tf.Tensor:
    return tf.equal(head[_COLOURS_AT] & 3, 0)


def _begins(head: tf.Tensor, magic: bytes) -> tf.Tensor:
    return tf.reduce_all(head[: len(magic)] == list(magic))


def highest(content: bytes, room: pictures.Room) -> int:
    """Returns the highest value of a picture of 16 bits; or else -1.

    Args:
        content: a whole file; 0 is said of one that is damaged.
        room: how much memory it may take.
    """
    kind = int(_kind(tf.constant(content)))
    if kind == _PILLOWS:
        return by_pillow.highest(content, room)
    if kind != _16_BITS:
        return -1
    try:
        pictures.check("", content, room)
        return int(tf.reduce_max(tf.io.decode_png(content, 3, tf.uint16)))
    except (UserError, tf.errors.OpError):
        return 0


def _kind(content: tf.Tensor) -> tf.Tensor:
    """Says, int32 [], which way a picture goes."""
    head = _head(content)
    start = tf.strings.substr(content, 0, _EXIF_BYTES)

    def of_png() -> tf.Tensor:
        chunks = tf.strings.substr(content, 0, _CHUNK_BYTES)
        of_colours = tf.where(head[_COLOURS_AT] >= 4, _ALPHA, _PLAIN)

        def of_chunks() -> tf.Tensor:
            has_key = _matches(chunks, _COLOUR_KEY)
            kind = tf.where(has_key, _ALPHA, of_colours)
            return tf.where(_matches(chunks, _TURNED_PNG), _PILLOWS, kind)

        kind = tf.cond(
            _matches(chunks, _TOLD_PNG), of_chunks, lambda: of_colours
        )
        return tf.where(tf.equal(head[_DEPTH_AT], 16), _16_BITS, kind)

    def of_exif() -> tf.Tensor:
        return tf.where(_matches(start, _USUAL_EXIF), _PLAIN, _PILLOWS)

    # What is asked of each of millions is asked in turn.
    return tf.cond(
        _begins(head, _PNG),
        of_png,
        lambda: tf.cond(
            _begins(head, _JPEG) & _matches(start, _EXIF),
            of_exif,
            lambda: tf.where(_begins(head, _JPEG), _PLAIN, _PILLOWS),
        ),
    )


def _matches(text: tf.Tensor, pattern: str) -> tf.Tensor:
    return tf.strings.regex_full_match(text, pattern)


def _turned(image: tf.Tensor, content: tf.Tensor) -> tf.Tensor:
    """Turns an image as a camera has noted in a JPEG, in one of eight ways."""
    start = tf.strings.substr(content, 0, _EXIF_BYTES)

    def turn() -> tf.Tensor:
        number = tf.strings.regex_replace(start, _ORIENTATION, r"\1\2")
        orientation = tf.cast(tf.io.decode_raw(number, tf.uint8)[0], tf.int32)

        def of(*numbers: int) -> tf.Tensor:
            return tf.reduce_any(orientation == list(numbers))

        upside = tf.where(of(3, 4, 6, 7), tf.reverse(image, [0]), image)
        sides = tf.where(of(2, 3, 7, 8), tf.reverse(upside, [1]), upside)
        return tf.transpose(
            sides, tf.where(orientation >= 5, [1, 0, 2], [0, 1, 2])
        )

    image = tf.ensure_shape(image, (None, None, None))
    return tf.cond(
        _matches(start, _EXIF),
        lambda: tf.cond(_matches(start, _ORIENTATION), turn, lambda: image),
        lambda: image,
    )
