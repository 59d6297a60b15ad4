"""What makes features of images: four kinds, by what `--extractor` says.

    pixels               the pixels themselves, made smaller if they are many
    classifier           a small network, trained on the labels of the data
    inception:FILE       the network of the original FID, as a frozen graph
    package.module:make  a Keras model of one's own

A figure means something beside those of the same extractor alone, so each has a
digest that goes wherever a figure goes.
"""

from __future__ import annotations

import abc
import hashlib
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain.errors import UserError
from dtrain.gan import describing, loading

AUTO, PIXELS, CLASSIFIER = "auto", "pixels", "classifier"
INCEPTION = "inception:"
KINDS = (PIXELS, CLASSIFIER, f"{INCEPTION}FILE", "package.module:make")

# Numbers of an image that `pixels` makes at most: their covariance is a matrix.
_MOST_PIXELS = 1024


class Extractor(abc.ABC):
    """Makes features of images, in a graph, on any replica.

    Attributes:
        name: as in a protocol.
        digest: of all that the features follow from, hexadecimal.
        resize: what is done with the size of an image, as in a protocol.
        image_shape: height, width and channels of an image.
        num_features: of an image.
        num_classes: that it tells apart; 0 if it does not.
        knows_labels: whether its classes are the labels of the data.
        at_once: images that it is given at once, of small ones. A notice is
            heard in between, so a large network has few.
    """

    name: str
    digest: str
    resize: str = "none"
    image_shape: tuple[int, int, int]
    num_features: int
    num_classes: int = 0
    knows_labels: bool = False
    at_once: int = 8

    @abc.abstractmethod
    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Makes features.

        Args:
            images: float32 [n, H, W, C] in [-1, 1].

        Returns:
            float32 [n, num_features], and probabilities of the classes,
            float32 [n, num_classes].
        """


def check(text: str) -> None:
    """Checks what can be of the name of an extractor, without making it.

    Args:
        text: what `--extractor` says.

    Raises:
        UserError: there is no such kind.
    """
    if text in (AUTO, PIXELS, CLASSIFIER):
        return
    if text.startswith(INCEPTION) or text.count(":") == 1:
        return
    raise UserError(f"extractor ({text}) must be {', '.join(KINDS)}")


def none(images: tf.Tensor) -> tf.Tensor:
    """Returns the probabilities of no class."""
    return tf.zeros([tf.shape(images)[0], 0])


class Pixels(Extractor):
    """The pixels; where they are more than 1,024 numbers, of a smaller image.

    Means of areas, so that it is as if the image were seen from farther away.
    """

    at_once = 32

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        """Makes it for images of a shape.

        Args:
            image_shape: height, width and channels.
        """
        height, width, channels = image_shape
        scale = math.sqrt(_MOST_PIXELS / (height * width * channels))
        self._size = (height, width)
        if scale < 1:
            self._size = tuple(max(1, int(side * scale)) for side in self._size)
            self.resize = "{}x{} area".format(*self._size)
        self.name = PIXELS
        self.image_shape = image_shape
        self.num_features = math.prod(self._size) * channels
        self.digest = hashlib.sha256(
            f"{PIXELS} {self._size} {channels}".encode()
        ).hexdigest()

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Flattens images; see `Extractor.__call__`."""
        if self.resize != "none":
            images = tf.image.resize(images, self._size, "area")
        return tf.reshape(images, [-1, self.num_features]), none(images)


class OwnModel(Extractor):
    """A Keras model that a user's function makes."""

    def __init__(
        self,
        spec: str,
        image_shape: tuple[int, int, int],
        scope: Callable[[], Any],
    ) -> None:
        """Imports and calls the function, and tries the model.

        Args:
            spec: package.module:make, a function of the shape of an image.
            image_shape: height, width and channels.
            scope: of the strategy whose replicas call it.

        Raises:
            UserError: there is none, or what it makes is no extractor.
        """
        subject = f"extractor ({spec})"
        make = loading.find("extractor", spec, "image_shape")
        with scope(), describing.in_one_line(subject, make):
            model = make(image_shape)
        if not isinstance(model, keras.Model):
            raise UserError(
                f"{subject} returned {type(model).__name__}; it must return a "
                "keras.Model of images float32 [n, H, W, C] in [-1, 1]"
            )
        with describing.in_one_line(subject, make):
            tried = model(tf.zeros([2, *image_shape]), training=False)
        shape = getattr(tried, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != 2:
            raise UserError(
                f"{subject} turns 2 images into "
                f"{'nothing that has a shape' if shape is None else shape}; "
                "its features must be [2, d]"
            )
        self._model = model
        self.name, self.image_shape = spec, image_shape
        self.num_features = int(shape[1])
        self.digest = digest_of(model)

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Calls the model; see `Extractor.__call__`."""
        features = self._model(images, training=False)
        return tf.cast(features, tf.float32), none(images)


def digest_of(model: keras.Model) -> str:
    """Returns a digest of the weights of a model, in their order."""
    digest = hashlib.sha256()
    for weight in model.weights:
        array = np.ascontiguousarray(weight.numpy())
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
