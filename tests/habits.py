"""Objectives and layers as people write them, some of which no run can have.

Each function is the `make` of a model; `REFUSED` says what is told of it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import dtrain

layers = keras.layers
Objective = Callable[..., Any]


class _Beside:
    """What a program has beside its networks."""

    def __init__(self) -> None:
        self.generator = tf.random.Generator.from_seed(1)
        self.count = tf.Variable(0.0, name="count_of_calls")
        self.metric = keras.metrics.Mean(name="seen")
        self.seeds = keras.random.SeedGenerator(1)
        self.features = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Flatten(),
                layers.Dense(3, kernel_initializer="ones"),
            ]
        )


_beside = functools.cache(_Beside)


def _networks(*more: keras.Layer) -> tuple[keras.Model, keras.Model]:
    generator = keras.Sequential(
        [keras.Input((4,)), layers.Dense(64), *more, layers.Reshape((8, 8, 1))]
    )
    discriminator = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(1)]
    )
    return generator, discriminator


def _losses(networks: dtrain.Networks, example: Any) -> tf.Tensor:
    fakes = networks.generator(example.latents, training=True)
    return networks.discriminator(fakes, training=True)[:, 0]


def _of_generator(objective: Objective) -> Callable[..., dtrain.Networks]:
    """Makes a `make` whose generator has this objective."""

    @functools.wraps(objective)
    def make(*_: object) -> dtrain.Networks:
        networks = _networks()
        _beside()

        def judge(networks: dtrain.Networks, example: Any) -> Any:
            fakes = tf.stop_gradient(networks.generator(example.latents))
            return networks.discriminator(fakes)[:, 0], {}

        phases = (
            dtrain.Phase("discriminator", judge),
            dtrain.Phase("generator", objective),
        )
        return dtrain.Networks(*networks, phases=phases)

    return make


REFUSED: dict[str, str] = {}
RIGHT: list[str] = []


def _refused(text: str) -> Callable[[Objective], Any]:
    def register(objective: Objective) -> Any:
        REFUSED[objective.__name__] = text
        return _of_generator(objective)

    return register


@_refused(r"phase 2, of the generator: its loss has the shape \[\] and must")
def mean(networks: Any, example: Any) -> Any:
    return tf.reduce_mean(_losses(networks, example)), {}


@_refused(r"its loss has the shape \[8, 8, 8\] and must have \[8\]")
def of_pixels(networks: Any, example: Any) -> Any:
    fakes = networks.generator(example.latents)
    return fakes[..., 0] * _losses(networks, example)[:, None, None], {}


@_refused(r"its loss has the shape \[8, 8\] and must have \[8\]")
def broadcast(networks: Any, example: Any) -> Any:
    losses = _losses(networks, example)
    return losses + losses[:, tf.newaxis], {}


@_refused(r"phase 2, of the generator: its objective returned a SymbolicTensor")
def loss_alone(networks: Any, example: Any) -> Any:
    return _losses(networks, example)


@_refused(r"phase 2, of the generator: its loss depends on no variable of the")
def stopped(networks: Any, example: Any) -> Any:
    return tf.stop_gradient(_losses(networks, example)), {}


@_refused(r"its metric score has the shape \[\] and must have \[8\]")
def mean_metric(networks: Any, example: Any) -> Any:
    losses = _losses(networks, example)
    return losses, {"score": tf.reduce_mean(losses)}


@_refused(r"RandomStandardNormal in line \d+ of .*habits.py draws what no")
def noise(networks: Any, example: Any) -> Any:
    losses = _losses(networks, example)
    return losses * tf.random.normal([8], seed=1), {}


@_refused(r"RandomUniform in line \d+ of .*habits.py draws what no")
def noise_in_a_function(networks: Any, example: Any) -> Any:
    @tf.function
    def noisy(losses: tf.Tensor) -> tf.Tensor:
        return losses * tf.random.uniform([8], seed=1)

    return noisy(_losses(networks, example)), {}


@_refused(r"RngReadAndSkip in line \d+ of .*habits.py draws what no")
def own_generator(networks: Any, example: Any) -> Any:
    return _losses(networks, example) * _beside().generator.normal([8]), {}


@_refused(r"draws by np.random, once, when it is traced")
def numpys_noise(networks: Any, example: Any) -> Any:
    weights = np.random.normal(size=8).astype(np.float32)
    return _losses(networks, example) * weights, {}


@_refused(r"draws by random, once, when it is traced")
def pythons_noise(networks: Any, example: Any) -> Any:
    return _losses(networks, example) * random.random(), {}


@_refused(r"PyFunc in line \d+ of .*habits.py runs Python in a step")
def python_in_the_graph(networks: Any, example: Any) -> Any:
    losses = _losses(networks, example)
    scale = tf.numpy_function(lambda: np.float32(1), [], tf.float32)
    return losses * tf.ensure_shape(scale, []), {}


@_refused(r"count_of_calls:0: a variable that is assigned in line \d+ of .*py")
def counting(networks: Any, example: Any) -> Any:
    _beside().count.assign_add(1.0)
    return _losses(networks, example), {}


@_refused(
    r"seen/total:0: a variable that is assigned in line \d+ of .*habits.py"
)
def keras_metric(networks: Any, example: Any) -> Any:
    losses = _losses(networks, example)
    _beside().metric.update_state(losses)
    return losses, {}


@_refused(r"seed_generator_state:0: a variable that is assigned in line \d+")
def seeds_beside_the_networks(networks: Any, example: Any) -> Any:
    losses = _losses(networks, example)
    return losses * keras.random.normal((8,), seed=_beside().seeds), {}


@_refused(r"count_of_calls:0: a variable that is assigned in line \d+ of .*py")
def counting_in_a_condition(networks: Any, example: Any) -> Any:
    losses = _losses(networks, example)
    count = _beside().count
    tf.cond(losses[0] > 0.0, lambda: count.assign_add(1.0), lambda: count + 0.0)
    return losses, {}


@_refused(r"count_of_calls:0: a variable that is assigned in line \d+ of .*py")
def counting_in_a_loop_of_a_function(networks: Any, example: Any) -> Any:
    @tf.function
    def counted(losses: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(3):
            _beside().count.assign_add(1.0)
        return losses

    return counted(_losses(networks, example)), {}


@_refused(r"ShuffleDataset\w* in line \d+ of .*habits.py draws what no")
def shuffled_in_the_step(networks: Any, example: Any) -> Any:
    total = tf.constant(0, tf.int64)
    for chosen in tf.data.Dataset.range(8).shuffle(8, seed=1).take(1):
        total += chosen
    return _losses(networks, example) * tf.cast(total, tf.float32), {}


class Noisy(layers.Layer):
    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs + tf.random.normal(tf.shape(inputs), seed=1)


def noisy_layer(*_: object) -> tuple[keras.Model, keras.Model]:
    return _networks(Noisy())


REFUSED["noisy_layer"] = r"RandomStandardNormal in line \d+ of .*habits.py"


@functools.cache
def _cached() -> tuple[keras.Model, keras.Model]:
    return _networks()


def one_generator(*_: object) -> tuple[keras.Model, keras.Model]:
    return _cached()


REFUSED["one_generator"] = r"returns the same generator twice; make a new one"
_CALLS: list[int] = []


def other_sizes(*_: object) -> tuple[keras.Model, keras.Model]:
    _CALLS.append(0)
    return _networks(layers.Dense(64 * len(_CALLS)), layers.Dense(64))


REFUSED["other_sizes"] = r"makes another generator at its second call"


def one_optimizer(*_: object) -> dtrain.Networks:
    adam = keras.optimizers.Adam()
    return dtrain.Networks(
        *_networks(), generator_optimizer=adam, discriminator_optimizer=adam
    )


REFUSED["one_optimizer"] = r"gives both networks one optimizer"


class OwnMean(layers.Layer):
    """Keeps the mean of what it has seen, on each replica its own."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.mean = self.add_weight(
            shape=(shape[-1],), trainable=False, name="mean"
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        self.mean.assign(tf.reduce_mean(inputs, axis=0))
        return inputs


def own_mean(*_: object) -> tuple[keras.Model, keras.Model]:
    return _networks(OwnMean())


def dropout(*_: object) -> tuple[keras.Model, keras.Model]:
    return _networks(layers.Dropout(0.5), layers.GaussianNoise(0.1))


def spectral_norm(*_: object) -> tuple[keras.Model, keras.Model]:
    return _networks(layers.SpectralNormalization(layers.Dense(64)))


def tied_weights(*_: object) -> tuple[keras.Model, keras.Model]:
    """The discriminator looks through a layer of the generator."""
    generator, _ = _networks(layers.Dense(64, name="tied"))
    images = keras.Input((8, 8, 1))
    tied = generator.get_layer("tied")(layers.Flatten()(images))
    return generator, keras.Model(images, layers.Dense(1)(tied))


def optimizer_with_average(*_: object) -> dtrain.Networks:
    """Keras' own moving average, which overwrites the weights at times."""
    adam = keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=2)
    return dtrain.Networks(*_networks(), generator_optimizer=adam)


REFUSED["optimizer_with_average"] = r"the optimizer of generator has use_ema"


def accumulating_optimizer(*_: object) -> dtrain.Networks:
    adam = keras.optimizers.Adam(gradient_accumulation_steps=2)
    return dtrain.Networks(*_networks(), discriminator_optimizer=adam)


REFUSED["accumulating_optimizer"] = (
    r"the optimizer of discriminator has gradient_accumulation_steps; .*micro_b"
)


def _right(objective: Objective) -> Any:
    RIGHT.append(objective.__name__)
    return _of_generator(objective)


WITH_STATE = ["dropout", "spectral_norm", "tied_weights"]
RIGHT += WITH_STATE


@_right
def frozen_features(networks: Any, example: Any) -> Any:
    fakes = networks.generator(example.latents)
    features = _beside().features
    apart = features(fakes) - features(example.real_images)
    return tf.reduce_mean(tf.square(apart), axis=1), {}


@_right
def ramp(networks: Any, example: Any) -> Any:
    weight = tf.minimum(tf.cast(example.step, tf.float32) / 100.0, 1.0)
    return _losses(networks, example) * weight, {"weight": weight * tf.ones(8)}


@_right
def example_noise(networks: Any, example: Any) -> Any:
    seeds = tf.cast(example.uniforms[:2] * 2.0**30, tf.int32)
    noise = tf.random.stateless_normal([8], seeds)
    return _losses(networks, example) * noise, {}


@_right
def data_in_the_step(networks: Any, example: Any) -> Any:
    total = tf.constant(0, tf.int64)
    for number in tf.data.Dataset.range(3):
        total += number
    return _losses(networks, example) * tf.cast(total, tf.float32), {}


@_right
def pythons_condition(networks: Any, example: Any) -> Any:
    losses = _losses(networks, example)
    if example.step > 2:
        losses *= 2.0
    return losses, {}
