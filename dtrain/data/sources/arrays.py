"""Images that lie in one NumPy array: of IDX and npz files."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from dtrain.config import DataSettings
from dtrain.data.sources import conversion, python_calls
from dtrain.data.sources.source import Images, Source


class ArraySource(Source):
    """Images of one array, which may be mapped from a file."""

    def __init__(
        self,
        config: DataSettings,
        images: np.ndarray,
        labels: np.ndarray | None,
        *,
        is_map: bool = False,
    ) -> None:
        """Takes over the arrays, which must not change any more.

        Args:
            config: `dataset` and the form of the images count.
            images: uint8 [n, H, W, C]; label maps are uint16 [n, H, W, 1].
            labels: int32 [n], at least 0, or None.
            is_map: whether they are label maps.
        """
        num_images, *shape = images.shape
        self.is_map = is_map
        self._form = conversion.Form.of(config, is_map=is_map)
        super().__init__(
            config.dataset,
            num_images,
            self._form.shape_of(shape),
            0 if labels is None else int(labels.max()) + 1,
        )
        self._images = images
        self._labels = np.zeros(num_images, np.int32)
        if labels is not None:
            self._labels = labels

    @property
    def bytes_of_one(self) -> int:
        """Bytes that reading one image takes; see `Source`."""
        # As float32, where it is resized.
        raw = int(np.prod(self._images.shape[1:])) * (
            4 if self._form.height else self.stored.size
        )
        return max(raw, super().bytes_of_one)

    def fetch(self, indices: tf.Tensor) -> Images:
        """Copies images out of the array; see `Source.fetch`."""
        images, labels = python_calls.numpy_function(
            lambda index: (self._images[index], self._labels[index]),
            [indices],
            (self.stored, tf.int32),
        )
        images.set_shape((None, *self._images.shape[1:]))
        labels.set_shape((None,))
        return images, labels

    def decode(self, fetched: Images) -> Images:
        """Converts the images; see `Source.decode`."""
        images, labels = fetched
        images = conversion.convert(images, self._form)
        return tf.ensure_shape(images, (None, *self.image_shape)), labels
