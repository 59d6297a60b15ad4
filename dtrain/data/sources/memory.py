"""Keeps the images of another source in memory, decoded once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.data.sources import source
from dtrain.data.sources.source import Images, Source
from dtrain.errors import UserError

Report = Callable[[str], None]

# In bytes; TensorFlow copies memory that begins elsewhere.
_ALIGNMENT = 64
_CHUNK_BYTES = 8 * 2**20
_REPORT_EVERY_SECS = 5.0


class MemorySource(Source):
    """Images that are gathered from one tensor."""

    in_memory = True

    def __init__(
        self, origin: Source, images: np.ndarray, labels: np.ndarray
    ) -> None:
        """Takes over the arrays, which must not change any more.

        Args:
            origin: where they were read from.
            images: `origin.stored` [n, H, W, C], of `aligned`.
            labels: int32 [n].
        """
        super().__init__(
            origin.name,
            origin.num_images,
            origin.image_shape,
            origin.num_classes,
        )
        self.files, self.digest = origin.files, origin.digest
        self.is_map = origin.is_map
        # The input pipeline runs on the host, and the memory of a GPU is dear.
        with tf.device("CPU:0"):
            # Neither DLPack nor a variable copies, while tf.data copies a
            # tensor that its functions capture.
            self._images = tf.Variable(
                tf.experimental.dlpack.from_dlpack(images.__dlpack__()),
                trainable=False,
                name="images",
            )
            self._labels = tf.convert_to_tensor(labels)

    def fetch(self, indices: tf.Tensor) -> tf.Tensor:
        """Passes the indices on; see `Source.fetch`."""
        return indices

    def decode(self, fetched: tf.Tensor) -> Images:
        """Gathers by index; see `Source.decode`."""
        images = tf.gather(self._images, fetched)
        return images, tf.gather(self._labels, fetched)


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocates an array that TensorFlow uses without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def aligned(images: np.ndarray) -> np.ndarray:
    """Copies images to memory that TensorFlow uses without a copy.

    Args:
        images: of any type and shape.
    """
    copy = _empty(images.shape, images.dtype)
    copy[:] = images
    return copy


def to_stderr(line: str) -> None:
    """Prints a line for the user to see that something goes on."""
    print(line, file=sys.stderr, flush=True)


def fits(origin: Source, cache_gib: float) -> bool:
    """Tells whether all images take at most `cache_gib` GiB."""
    return origin.num_bytes <= cache_gib * 2**30


def load(origin: Source, report: Report = to_stderr) -> MemorySource:
    """Reads all images of a source, in their order and by C++ threads.

    An image that cannot be read is a UserError that names it.

    Args:
        origin: the source.
        report: called with a line of progress every few seconds.
    """
    chunk = max(1, min(1024, _CHUNK_BYTES // origin.bytes_of_one))
    indices = tf.data.Dataset.range(origin.num_images).batch(chunk)
    return collect(origin, read(origin, indices), report)


def read(origin: Source, indices: tf.data.Dataset) -> tf.data.Dataset:
    """Reads images by C++ threads, in the order in which they are asked for.

    Args:
        origin: the source.
        indices: int64 [b] in [0, num_images), however many times.

    Returns:
        Images `origin.stored` [b, H, W, C] and labels int32 [b], as often.
    """

    @tf.autograph.experimental.do_not_convert
    def fetch(index: tf.Tensor) -> tuple[Any]:
        # In a tuple, so that the next map gets it as its one argument.
        return (origin.fetch(index),)

    @tf.autograph.experimental.do_not_convert
    def decode(fetched: Any) -> tuple[Any]:
        return (origin.decode(fetched),)

    finish = tf.autograph.experimental.do_not_convert(origin.finish)
    return (
        indices.map(fetch, num_parallel_calls=tf.data.AUTOTUNE)
        .map(decode, num_parallel_calls=tf.data.AUTOTUNE)
        .map(finish)
        .prefetch(1)
    )


def collect(
    origin: Source, batches: tf.data.Dataset, report: Report = to_stderr
) -> MemorySource:
    """Copies batches of images, one after another, into memory.

    Args:
        origin: says how many images there are, and of which shape.
        batches: of images [b, H, W, C] and labels int32 [b], in order.
        report: called with a line of progress every few seconds.

    Raises:
        UserError: an image cannot be read; it is named if it is known.
    """
    shape = (origin.num_images, *origin.image_shape)
    images = _empty(shape, origin.stored.as_numpy_dtype)
    labels = np.empty(origin.num_images, np.int32)
    done = 0
    due = time.monotonic() + _REPORT_EVERY_SECS
    try:
        for batch_images, batch_labels in batches.as_numpy_iterator():
            end = done + len(batch_labels)
            images[done:end], labels[done:end] = batch_images, batch_labels
            done = end
            if time.monotonic() >= due:
                due += _REPORT_EVERY_SECS
                report(
                    f"reading {origin.name} into memory: {done:,} of "
                    f"{origin.num_images:,} images"
                )
    except tf.errors.OpError as error:
        fault = origin.find_fault(range(done, origin.num_images))
        if fault is not None:
            fault = origin.refusal(fault)
        else:
            reason = source.reason(error)
            fault = UserError(
                f"dataset ({origin.name}) cannot be read: {reason}"
            )
        raise fault from error
    assert done == origin.num_images
    return MemorySource(origin, images, labels)
