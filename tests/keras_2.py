"""Writes into `golden/` what programs of Keras 2 have saved.

    pip install --target=DIR --no-deps tf_keras==2.21.0
    PYTHONPATH=DIR python -m tests.keras_2

Nothing else needs that library, and it is no requirement of the tests.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

keras: Any = importlib.import_module("tf_keras")

HERE = pathlib.Path(__file__).parent / "golden"
layers = keras.layers


def network(name: str, size: int) -> Any:
    return keras.Sequential(
        [
            layers.Input((size,)),
            layers.Dense(4, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, name="last"),
        ],
        name=name,
    )


def _save(name: str, **networks: Any) -> None:
    """Writes the weights by the names that the tool gives them, but layers."""
    values = {
        f"{prefix}/{weight.name.removesuffix(':0')}".lstrip("/"): np.asarray(
            weight
        )
        for prefix, model in networks.items()
        for weight in model.weights
    }
    np.savez(HERE / f"{name}.npz", **values)


def weights() -> None:
    """Writes `save_weights` in TensorFlow's format."""
    keras.utils.set_random_seed(1)
    model = network("generator", 3)
    model.compile("adam", "mse")
    model.fit(np.ones((4, 3)), np.zeros((4, 2)), verbose=0)
    path = HERE / "keras_2_weights/weights"
    model.save_weights(path)
    _save("keras_2_weights", **{"": model})


def gan() -> None:
    """Writes a Checkpoint of two networks and two legacy optimizers."""
    keras.utils.set_random_seed(2)
    models = {"generator": network("generator", 3)}
    models["discriminator"] = network("discriminator", 2)
    state = dict(models)
    for name, model in models.items():
        optimizer = keras.optimizers.legacy.Adam(1e-2)
        with tf.GradientTape() as tape:
            inputs = tf.random.normal((4, model.input_shape[1]))
            loss = tf.reduce_mean((model(inputs, training=True) - 1) ** 2)
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        state[f"{name}_optimizer"] = optimizer
    tf.train.Checkpoint(**state).save(HERE / "keras_2_gan/ckpt")
    _save("keras_2_gan", **models)


if __name__ == "__main__":
    weights()
    gan()
