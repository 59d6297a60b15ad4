"""Numbers that stand beside images: attributes, classes, label maps.

They are taken as they are, and nothing scales them.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from dtrain.data.sources import source
from dtrain.data.sources.source import Images, Source
from dtrain.errors import UserError

_MOST_OF_MAP = 2**16 - 1


class ValueSource(Source):
    """Numbers of each example, kept in memory."""

    in_memory = True

    def __init__(self, name: str, values: np.ndarray) -> None:
        """Copies the numbers.

        Args:
            name: the data set as the user named it.
            values: of `of`.
        """
        shape = (1, 1, int(np.prod(values.shape[1:])))
        super().__init__(name, len(values), shape, 0)
        with tf.device("CPU:0"):
            self._values = tf.constant(values)

    @property
    def stored(self) -> tf.DType:
        """Type of the numbers; see `Source`."""
        return self._values.dtype

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the numbers of one example; see `Source`."""
        return tuple(self._values.shape[1:])

    @property
    def spec(self) -> tf.TensorSpec:
        """The numbers of one example; see `Source`."""
        return tf.TensorSpec(self.stored_shape, self.stored)

    def said(self) -> str:
        """Says how many there are; see `Source.said`."""
        each = source.shown(self.spec.shape) or "one"
        kind = self.stored.name
        return f"{self.num_images:,} times {each} {kind}"

    def fetch(self, indices: tf.Tensor) -> tf.Tensor:
        """Passes the indices on; see `Source.fetch`."""
        return indices

    def decode(self, fetched: tf.Tensor) -> Images:
        """Gathers by index; see `Source.decode`."""
        labels = tf.zeros(tf.shape(fetched), tf.int32)
        return tf.gather(self._values, fetched), labels

    def seen(
        self, images: tf.Tensor, is_mirrored: tf.Tensor | None
    ) -> tf.Tensor:
        """Returns the numbers as they are; see `Source.seen`."""
        del is_mirrored
        return images


def of(name: str, values: np.ndarray) -> np.ndarray:
    """Makes numbers of each example of an array.

    Args:
        name: of the array, for an error.
        values: [n] or [n, k] of numbers.

    Returns:
        int32 [n] of whole numbers [n]; of others float32 [n, k].

    Raises:
        UserError: they are something else.
    """
    if values.ndim not in (1, 2) or not values.size:
        raise UserError(
            f"{name} is {source.shown(values.shape) or 'one number'}; numbers "
            "that are no images must be [n] or [n, k]"
        )
    if values.dtype.kind not in "iubf":
        raise UserError(
            f"{name} is of type {values.dtype}; store it as whole numbers or "
            "as floats"
        )
    if values.ndim == 1 and values.dtype.kind != "f":
        most = np.iinfo(np.int32).max
        if int(values.min()) < -most or int(values.max()) > most:
            raise UserError(
                f"{name} lies in [{values.min()}, {values.max()}]; whole "
                "numbers must fit into 32 bits"
            )
        return values.astype(np.int32)
    # What is too large for float32 becomes infinite, and is told below.
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32).reshape(len(values), -1)
    if not np.isfinite(floats).all():
        raise UserError(
            f"{name} holds what is no finite number of 32 bits; replace it, or "
            "no loss would be a number"
        )
    return floats


def numbers_of_map(name: str, images: np.ndarray) -> np.ndarray:
    """Makes label maps of an array.

    Args:
        name: of the array, for an error.
        images: [n, H, W, 1] of whole numbers.

    Returns:
        uint16 [n, H, W, 1].

    Raises:
        UserError: they are something else.
    """
    if images.dtype.kind not in "iub" or images.shape[-1] != 1:
        raise UserError(
            f"{name} is {source.shown(images.shape)} of {images.dtype}; label "
            "maps must be [n, height, width] of whole numbers"
        )
    low, high = int(images.min()), int(images.max())
    if low < 0 or high > _MOST_OF_MAP:
        raise UserError(
            f"{name} lies in [{low}, {high}]; the numbers of label maps must "
            f"lie in [0, {_MOST_OF_MAP}]"
        )
    return images.astype(np.uint16)
