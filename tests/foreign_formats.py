"""What programs of other ages and kinds than `foreign`'s have saved.

Each function writes into a directory, and returns what it has written and the
values in it, by the names that the tool gives them.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

GOLDEN = pathlib.Path(__file__).parent / "golden"

# Numbers that Keras 2 gives to the layers of `tests/keras_2.py`.
KERAS_2_LAYERS = {"first": 0, "norm": 1, "last": 2}

Values = dict[str, np.ndarray]
Written = tuple[str, Values]

v1 = tf.compat.v1


def _saver(directory: str, version: int, num_parts: int = 1) -> Written:
    pathlib.Path(directory).mkdir(exist_ok=True)
    kernel = np.arange(12, dtype=np.float32).reshape(4, 3)
    with tf.Graph().as_default(), v1.Session() as session:
        partitioner = v1.fixed_size_partitioner(num_parts)
        with v1.variable_scope("generator/dense", partitioner=partitioner):
            v1.get_variable("kernel", initializer=tf.constant(kernel))
        with v1.variable_scope("generator/dense/kernel"):
            v1.get_variable("Adam", initializer=tf.constant(-kernel))
        step = v1.train.get_or_create_global_step()
        session.run(v1.global_variables_initializer())
        session.run(step.assign(1000))
        saver = v1.train.Saver(write_version=version)
        prefix = saver.save(session, f"{directory}/model.ckpt", 1000)
    return prefix, {
        "generator/dense/kernel": kernel,
        "generator/dense/kernel/Adam": -kernel,
        "global_step": np.array(1000, np.int64),
    }


def tensorflow_1(directory: str) -> Written:
    """Of a Saver, in two files and by names alone."""
    return _saver(directory, v1.train.SaverDef.V2)


def tensorflow_1_in_parts(directory: str) -> Written:
    """A variable was on several parameter servers."""
    return _saver(directory, v1.train.SaverDef.V2, num_parts=2)


def tensorflow_0(directory: str) -> Written:
    """All of it is in one file, as before TensorFlow 0.12."""
    return _saver(directory, v1.train.SaverDef.V1, num_parts=2)


def _network() -> keras.Model:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(2, name="last"),
        ],
        name="generator",
    )


def saved_model(directory: str) -> Written:
    """What is exported to be served."""
    network = _network()
    tf.saved_model.save(network, f"{directory}/served")
    # It has the numbers of the layers, the input being 0, and not their names.
    values = {
        f"{number}/{variable.name}": np.asarray(variable)
        for number, layer in enumerate(network.layers, 1)
        for variable in layer.variables
    }
    return f"{directory}/served", values


def iterator(directory: str) -> Written:
    """The data go on where they were, too."""
    network = _network()
    data = iter(tf.data.Dataset.range(100).shuffle(10, seed=1))
    next(data)
    state = tf.train.Checkpoint(generator=network, data=data)
    values = {
        f"generator/{layer.name}/{variable.name}": np.asarray(variable)
        for layer in network.layers
        for variable in layer.variables
    }
    return state.write(f"{directory}/ckpt-1"), values


def tables(directory: str) -> Written:
    """Layers that look words up, whose state is no variable."""
    words = keras.layers.StringLookup(name="words")
    words.adapt(["a", "b", "b"])
    table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    table.insert(tf.constant(["x", "y"]), tf.constant([1, 2], tf.int64))
    weight = tf.Variable([1.0, 2.0])
    state = tf.train.Checkpoint(words=words, table=table, weight=weight)
    return state.write(f"{directory}/ckpt-1"), {"weight": weight.numpy()}


def keras_2(directory: str) -> Written:
    """`save_weights` of a model in TensorFlow's format, with its optimizer."""
    return _golden("keras_2_weights", directory, "weights")


def keras_2_gan(directory: str) -> Written:
    """Two networks with optimizers of TensorFlow 2.0 to 2.10."""
    return _golden("keras_2_gan", directory, "ckpt-1")


def _golden(name: str, directory: str, prefix: str) -> Written:
    """Copies what `tests/keras_2.py` has written with tf_keras."""
    shutil.copytree(GOLDEN / name, directory, dirs_exist_ok=True)
    with np.load(GOLDEN / f"{name}.npz") as file:
        values = dict(file)
    for layer, number in KERAS_2_LAYERS.items():
        values = {
            name.replace(layer, f"layer_with_weights-{number}"): value
            for name, value in values.items()
        }
    return f"{directory}/{prefix}", values


FORMATS: dict[str, Callable[[str], Written]] = {
    function.__name__: function
    for function in (
        *(tensorflow_1, tensorflow_1_in_parts, tensorflow_0),
        *(saved_model, iterator, tables, keras_2, keras_2_gan),
    )
}
