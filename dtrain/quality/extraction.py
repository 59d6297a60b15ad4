"""Runs an extractor over images: on all replicas, in the order of the images.

A replica is always given as many images at once, from one that this number
divides: sums of another order would have other bits, and a run that was killed
in an evaluation, or goes on with other replicas, other figures. They are few,
so that a notice is heard between two rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.cluster.workers import Workers
from dtrain.errors import UserError
from dtrain.quality.extractors import Extractor
from dtrain.quality.sample import Rows

# Larger images, in numbers, are few at once, whatever extracts.
_SMALL_IMAGE = 64 * 64 * 3
_FEW = 8

# Makes images, float [b, H, W, C] in [-1, 1], and labels, int32 [b], of their
# indices, int64 [b]; in a graph, on a replica.
Make = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
# Reads the same on the host, and eagerly.
Read = Make


class Extraction:
    """What an extractor says of images that are made, or read, by index."""

    def __init__(
        self,
        extractor: Extractor,
        workers: Workers,
        *,
        make: Make | None = None,
        read: Read | None = None,
    ) -> None:
        """Traces nothing yet. Every worker calls this.

        Args:
            extractor: made in the scope of the workers' strategy.
            workers: whose replicas share the images.
            make: makes images on the replicas; or
            read: reads them on the host.
        """
        assert (make is None) != (read is None)
        self._extractor, self._workers, self._read = extractor, workers, read
        replicas = workers.strategy.num_replicas_in_sync
        self._replicas = replicas // workers.cluster.num_workers
        is_small = math.prod(extractor.image_shape) <= _SMALL_IMAGE
        self._size = extractor.at_once if is_small else _FEW

        def of_replica(indices: tf.Tensor, *given: tf.Tensor) -> Any:
            images, labels = make(indices) if make else given
            images = tf.clip_by_value(tf.cast(images, tf.float32), -1.0, 1.0)
            features, probabilities = extractor(images)
            return features, probabilities, labels

        def run(*given: Any) -> Any:
            return workers.strategy.run(of_replica, args=given)

        self._function = tf.function(run, autograph=False)

    def rows(
        self, start: int, total: int, is_stopped: Callable[[], bool]
    ) -> Iterator[Rows]:
        """Yields what is said of images. Every worker calls this.

        Every worker gets the rows of all of them, and goes through all rounds.

        Args:
            start: index of the first image; 0, or where it was stopped.
            total: how many there are; the last round may go beyond.
            is_stopped: asked after each round; one worker's word ends it.

        Raises:
            UserError: an image is not finite, or cannot be read.
        """
        while start < total:
            rows = self._round(start)
            [stop] = self._workers.agree(is_stopped())
            self._check(rows, start, total)
            yield rows
            if stop:
                return
            start += len(rows.labels)

    def _round(self, start: int) -> Rows:
        """Takes the next images, as many on each replica."""
        # Together, for reading, or the memory, may fail on one worker alone.
        features, probabilities, labels = self._workers.together(
            lambda: self._of_this_worker(start)
        )
        # As one message: labels by their bits.
        columns = [features, probabilities, labels.view(np.float32)[:, None]]
        rows = self._workers.concatenate(np.concatenate(columns, axis=1))
        ends = np.cumsum([features.shape[1], probabilities.shape[1]])
        features, probabilities, labels = np.split(rows, ends, axis=1)
        labels = np.ascontiguousarray(labels[:, 0])
        return Rows(features, probabilities, labels.view(np.int32))

    def _of_this_worker(self, start: int) -> list[np.ndarray]:
        """Takes the images of this worker's replicas.

        Raises:
            UserError: an image cannot be read, or there is no memory.
        """
        strategy = self._workers.strategy
        first = self._workers.cluster.index * self._replicas
        values = []
        for replica in range(first, first + self._replicas):
            place = start + replica * self._size
            indices = tf.range(place, place + self._size, dtype=tf.int64)
            read = self._read(indices) if self._read else ()
            values.append((indices, *read))
        columns = values[0]
        if strategy.num_replicas_in_sync > 1:
            columns = tuple(
                self._distributed(column, first)
                for column in zip(*values, strict=True)
            )
        try:
            made = self._function(*columns)
        except tf.errors.ResourceExhaustedError as error:
            raise UserError(
                f"the extractor {self._extractor.name} needs more memory than "
                "the device has beside the training; use a smaller one"
            ) from error
        return [
            np.concatenate(
                [
                    part.numpy()
                    for part in strategy.experimental_local_results(array)
                ]
            )
            for array in made
        ]

    def _distributed(self, column: Any, first: int) -> Any:
        """Gives each replica of this worker its tensor."""
        strategy = self._workers.strategy
        return strategy.experimental_distribute_values_from_function(
            lambda context: column[context.replica_id_in_sync_group - first]
        )

    def _check(self, rows: Rows, start: int, total: int) -> None:
        """Refuses what no figure can be made of.

        Raises:
            UserError: a feature is not finite.
        """
        is_fine = np.isfinite(rows.features[: total - start]).all(axis=1)
        if not np.all(is_fine):
            number = start + int(np.argmin(is_fine))
            raise UserError(
                f"image {number} has features that are not finite, by the "
                f"extractor {self._extractor.name}: it holds NaN or infinite "
                "pixels, or the extractor does not suit it; try another "
                "checkpoint or another extractor"
            )
