"""The samples of an evaluation: functions of the seed and of their index alone.

So they are the same, whoever draws them with which others.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from dtrain.data import pipeline
from dtrain.data.sources import Data
from dtrain.errors import UserError
from dtrain.gan.example import Draw, Place, draw_at
from dtrain.gan.pictures import Pictures
from dtrain.gan.state import GAN
from dtrain.record import images

AVERAGE, RAW = WEIGHTS = "average", "raw"
# Of the seed of latents, apart from those of training and of pictures.
_LATENTS = 6


class Samples:
    """Draws samples of a GAN, in the state that it is in."""

    def __init__(self, gan: GAN, data: Data, seed: int, weights: str) -> None:
        """Draws nothing yet.

        Args:
            gan: whose networks draw.
            data: which a program may make pictures of.
            seed: of the latents.
            weights: of `WEIGHTS`: those of the moving averages, or raw ones.
        """
        self._gan, self._data = gan, data
        self._seed, self._weights = seed, weights
        self._pictures = Pictures(
            gan,
            lambda number: pipeline.first_batch(data, gan.config, number),
            seed=seed,
            by_averages=weights == AVERAGE,
            is_measured=True,
        )
        self.prepare = self._pictures.prepare

    def make(self, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws samples by their index; in a graph after `prepare`.

        Args:
            indices: int64 [b], consecutive.

        Returns:
            float [b, H, W, C] in [-1, 1] or a little beyond, and the labels
            that were asked for, int32 [b]; zeros without.

        Raises:
            UserError: what is drawn is not of the shape of the data's images.
        """
        config, size = self._gan.config, indices.shape[0]
        seed = tf.constant([self._seed, _LATENTS], tf.int64)
        latents = draw_at(
            Place(seed, indices[0]),
            0,
            Draw("normal", (config.latent_size,)),
            size,
        )
        labels = tf.zeros([size], tf.int32)
        if config.conditional:
            classes = self._data.source.num_classes
            labels = tf.cast(indices % classes, tf.int32)
        asked = labels if config.conditional else None
        drawn = self._pictures(latents, asked, indices[0])
        wanted = self._data.source.image_shape
        if tuple(drawn.shape[1:]) != wanted:
            raise UserError(
                f"model ({config.model}) draws images "
                f"{drawn.shape[1:].as_list()}, and figures compare them with "
                f"those of the data, {list(wanted)}; give its Program a "
                "generate, which makes such"
            )
        return drawn, labels

    def state(self) -> str:
        """Returns a digest of the networks, with what draws, in this state."""
        gan, digest = self._gan, hashlib.sha256()
        averages = gan.averages if self._weights == AVERAGE else {}
        for network in {**gan.program.networks, **averages}.values():
            for weight in network.weights:
                digest.update(np.ascontiguousarray(weight.numpy()).tobytes())
        return digest.hexdigest()[:32]

    def beside(self, nearest: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Draws the first samples, each beside images of the data.

        Args:
            nearest: int64 [n, k], which images are near to each.

        Returns:
            uint8 [height, width, C], a grid of n rows.
        """
        source = self._data.source
        drawn, _ = self.make(tf.range(len(nearest), dtype=tf.int64))
        with tf.device("CPU:0"):
            stored, _ = pipeline.read(source, tf.constant(nearest.ravel()))
            near = source.seen(stored, None).numpy()
        near = near.reshape(*nearest.shape, *source.image_shape)
        own = np.clip(tf.cast(drawn, tf.float32).numpy(), -1, 1)[:, None]
        rows = np.concatenate([own, near], axis=1)
        return images.make_grid(
            rows.reshape(-1, *source.image_shape), 1 + nearest.shape[1]
        )
