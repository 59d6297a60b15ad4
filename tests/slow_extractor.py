"""An extractor that takes its time, so that something can happen meanwhile."""

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


def make(image_shape: tuple[int, int, int]) -> keras.Model:
    return keras.Sequential(
        [keras.Input(image_shape), Slow(), keras.layers.Flatten()]
    )
