"""A small network that is trained here, on the labels of the data.

It is a function of the data and of a fixed seed: on one kind of device it has
the same bits each time. It is kept in a cache, by what it was trained on, so
that all runs on the same data are measured by the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain.data import pipeline
from dtrain.data.sources import Source
from dtrain.errors import UserError
from dtrain.quality import extractors
from dtrain.quality.extractors import Extractor

# What is trained; another number for another network or another training.
VERSION = 1
_SEED = 7
# Pixels a side at most; larger images are made smaller.
_MOST_SIDE = 32
_NUM_FEATURES = 64
_BATCH_SIZE = 128
_LEARNING_RATE = 2e-3
# Five times through the data, and neither fewer nor more steps than these.
_EPOCHS, _FEWEST_STEPS, _MOST_STEPS = 5, 300, 2000
# Of the steps between two lines of progress.
_STEPS_PER_LOOP = 50

Report = Callable[[str], None]


class Classifier(Extractor):
    """The network without its last layer, whose classes are the labels.

    Attributes:
        network: of images, resized, to features and logits.
    """

    knows_labels, at_once = True, 32

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        scope: Callable[[], Any],
    ) -> None:
        """Builds the network, with weights that are still to be taken.

        Args:
            image_shape: height, width and channels of the images.
            num_classes: of the labels.
            scope: of the strategy whose replicas call it.

        Raises:
            UserError: the data has no labels.
        """
        if not num_classes:
            raise UserError(
                "extractor (classifier) is trained on labels, and the data "
                "has none; use pixels, inception:FILE or a model of your own"
            )
        self.name, self.digest = extractors.CLASSIFIER, ""
        self.image_shape, self.num_classes = image_shape, num_classes
        self.num_features = _NUM_FEATURES
        self._size = _size(image_shape)
        if self._size != image_shape[:2]:
            self.resize = "{}x{} area".format(*self._size)
        with scope():
            self.network = _build((*self._size, image_shape[2]), num_classes)

    def train(self, source: Source, report: Report) -> float:
        """Trains it; all that it draws follows from a fixed seed.

        Args:
            source: the data.
            report: called with a line of progress now and then.

        Returns:
            The share of the last training images that it gets right.
        """
        order = np.random.default_rng(_SEED)
        steps = math.ceil(_EPOCHS * source.num_images / _BATCH_SIZE)
        steps = min(max(steps, _FEWEST_STEPS), _MOST_STEPS)
        schedule = keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, steps)
        optimizer = keras.optimizers.Adam(schedule)
        optimizer.build(self.network.trainable_variables)

        @tf.function(autograph=False)
        def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                _, logits = self.network(self._resized(images), training=True)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                    labels, logits
                )
                loss = tf.reduce_mean(losses)
            variables = self.network.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
            is_right = tf.equal(tf.argmax(logits, 1, tf.int32), labels)
            return tf.reduce_mean(tf.cast(is_right, tf.float32))

        right = []
        for number in range(steps):
            # By chance with repeats: as good, and no epoch to keep.
            chosen = order.integers(0, source.num_images, _BATCH_SIZE)
            stored, labels = pipeline.read(source, tf.constant(chosen))
            right.append(step(source.seen(stored, None), labels))
            if number % _STEPS_PER_LOOP == _STEPS_PER_LOOP - 1:
                report(f"training the classifier: {number + 1:,} of {steps:,}")
        return float(np.mean([float(each) for each in right[-20:]]))

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Its weights by their number."""
        arrays = self.network.get_weights()
        return {str(number): array for number, array in enumerate(arrays)}

    def take(self, weights: Mapping[str, np.ndarray]) -> None:
        """Takes weights, and the digest that they have.

        Args:
            weights: of a network like this one.

        Raises:
            ValueError: they are of another one.
            KeyError: one is missing.
        """
        mine = self.network.get_weights()
        taken = [np.asarray(weights[str(n)]) for n in range(len(mine))]
        for one, other in zip(mine, taken, strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                raise ValueError("the weights are of another network")
        self.network.set_weights(taken)
        self.digest = extractors.digest_of(self.network)

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Calls the network; see `Extractor.__call__`."""
        features, logits = self.network(self._resized(images), training=False)
        return features, tf.nn.softmax(logits)

    def _resized(self, images: tf.Tensor) -> tf.Tensor:
        if self.resize == "none":
            return images
        return tf.image.resize(images, self._size, "area")


def _size(image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns height and width of what the network sees."""
    height, width, _ = image_shape
    scale = min(1.0, _MOST_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _build(image_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Builds the network, each of whose weights follows from a fixed seed."""
    seeds = iter(range(_SEED, _SEED + 100))

    def initializer() -> keras.initializers.Initializer:
        return keras.initializers.GlorotUniform(seed=next(seeds))

    def convolution(channels: int, strides: int) -> keras.layers.Layer:
        return keras.layers.Conv2D(
            channels,
            3,
            strides,
            padding="same",
            activation="relu",
            kernel_initializer=initializer(),
            dtype="float32",
        )

    images = keras.Input(image_shape, dtype="float32")
    values = convolution(32, 1)(images)
    values = convolution(64, 2)(values)
    values = convolution(64, 2)(values)
    values = keras.layers.Flatten(dtype="float32")(values)
    features = keras.layers.Dense(
        _NUM_FEATURES,
        activation="relu",
        kernel_initializer=initializer(),
        dtype="float32",
    )(values)
    logits = keras.layers.Dense(
        num_classes, kernel_initializer=initializer(), dtype="float32"
    )(features)
    return keras.Model(images, [features, logits])
