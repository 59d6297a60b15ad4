"""Compares gradients of TensorFlow with differences of values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

# Of TensorFlow's float32, over steps of a hundredth.
_RELATIVE, _ABSOLUTE = 5e-3, 1e-4


def check_gradient(loss: Callable[[], tf.Tensor], at: tf.Variable) -> None:
    """Compares a gradient with finite differences, in three directions.

    Args:
        loss: a scalar.
        at: the variable that it is differentiated by; it stays as it is.
    """
    with tf.GradientTape() as tape:
        value = loss()
    gradient, here = tape.gradient(value, at), at.numpy()
    for seed in range(3):
        direction = np.random.default_rng(seed).standard_normal(at.shape)
        step = (1e-2 * direction / np.linalg.norm(direction)).astype(np.float32)
        at.assign(here + step)
        ahead = loss()
        at.assign(here - step)
        expected = ahead - loss()
        at.assign(here)
        got = 2.0 * tf.reduce_sum(gradient * step)
        np.testing.assert_allclose(
            got, expected, rtol=_RELATIVE, atol=_ABSOLUTE
        )
