"""Extractors: one that takes its time, and one that makes no numbers."""

from __future__ import annotations

import time
from typing import Any

import keras
import tensorflow as tf

SECS = 0.1


class Slow(keras.layers.Layer):
    """Hands images on after a while."""

    def call(self, images: Any) -> Any:
        def wait(values: Any) -> Any:
            time.sleep(SECS)
            return values

        waited = tf.numpy_function(wait, [images], tf.float32)
        return tf.ensure_shape(waited, images.shape)


class Odd(keras.layers.Layer):
    """Makes features that are no numbers."""

    def call(self, images: Any) -> Any:
        return tf.math.log(images - 2.0)


def odd(image_shape: tuple[int, int, int]) -> keras.Model:
    return keras.Sequential(
        [keras.Input(image_shape), Odd(), keras.layers.Flatten()]
    )


def make(image_shape: tuple[int, int, int]) -> keras.Model:
    return keras.Sequential(
        [keras.Input(image_shape), Slow(), keras.layers.Flatten()]
    )
