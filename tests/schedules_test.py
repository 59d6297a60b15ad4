"""What changes with the step, or the images: closed forms, and in a step."""

from __future__ import annotations

import dataclasses
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.gan import optimizers, schedules
from dtrain.gan.replicas import Comparison
from dtrain.gan.state import GAN
from dtrain.gan.step import Step
from tests.replicas import mirrored

SMALL = Config(
    batch_size=8,
    base_channels=2,
    latent_size=8,
    jit_compile="off",
    num_steps=100,
)
BURN_IN = dataclasses.replace(
    SMALL,
    burn_in_images=20.0 * SMALL.batch_size,
    end_learning_rate_factor=0.25,
    end_gamma_factor=0.1,
    beta_2=0.9,
    end_beta_2=0.99,
    ema_half_life_images=1000.0,
)


@pytest.fixture(scope="module")
def digits() -> sources.Source:
    return sources.open_source(Config())


def train(
    config: Config,
    strategy: tf.distribute.Strategy,
    source: sources.Source,
    first_step: int,
    num_steps: int,
    prefix: str = "",
) -> GAN:
    gan = GAN(config, strategy, source.image_shape, source.num_classes)
    if prefix:
        gan.checkpoint.restore(prefix).assert_consumed()
    iterator = pipeline.make_iterator(
        sources.Data(source), config, strategy, first_step, 1
    )
    Step(gan).run(iterator, tf.constant(num_steps))
    return gan


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (3, 1.0), (4, 1.0), (12, 0.5), (20, 0.0), (99, 0.0)],
)
def test_cosine_schedule_after_a_warm_up(step: int, expected: float) -> None:
    config = dataclasses.replace(
        SMALL, num_steps=20, warmup_steps=4, learning_rate_schedule="cosine"
    )
    factor = schedules.learning_rate_factor(config, tf.constant(step, tf.int64))
    assert factor.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("step", "way"), [(0, 0.0), (10, 0.5), (25, 1.0)])
def test_a_burn_in_goes_along_half_a_cosine(step: int, way: float) -> None:
    done = tf.constant(step, tf.int64)
    moved = {
        schedules.learning_rate_factor: 1.0 - 0.75 * way,
        schedules.gamma_factor: 1.0 - 0.9 * way,
        schedules.beta_2: 0.9 + 0.09 * way,
    }
    for schedule, expected in moved.items():
        assert float(schedule(BURN_IN, done)) == pytest.approx(expected)
    # Of the images that a step has seen.
    half_life = schedules.half_life_images(BURN_IN, done - 1)
    assert float(half_life) == pytest.approx(max(1000.0 * way, 1e-3))
    assert float(schedules.rising(BURN_IN, done, 0.5)) == 0.5 * way


def test_adam_follows_a_moving_beta_2() -> None:
    """Kingma and Ba, algorithm 1, with the beta of each step, as torch has."""
    beta_2 = tf.Variable(0.9)
    moving = optimizers.make(0.1, SMALL, "moving", beta_2)
    weights = keras.Variable(np.float32([1.0, -2.0]))
    moving.build([weights])
    expected, mean, square = np.float64([1.0, -2.0]), 0.0, 0.0
    for step in range(1, 6):
        now = 0.9 + 0.01 * step
        beta_2.assign(now)
        gradient = np.float64([0.3 * step, -1.0 / step])
        moving.apply([tf.constant(gradient, tf.float32)], [weights])
        mean = SMALL.beta_1 * mean + (1 - SMALL.beta_1) * gradient
        square = now * square + (1 - now) * gradient**2
        mean_hat = mean / (1 - SMALL.beta_1**step)
        square_hat = square / (1 - now**step)
        expected = expected - 0.1 * mean_hat / (np.sqrt(square_hat) + 1e-7)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-4)
    names = [variable.path for variable in moving.variables]
    stock = keras.optimizers.Adam(name="moving")
    stock.build([weights])
    assert names == [variable.path for variable in stock.variables]


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_adam_has_the_bits_of_that_of_keras(num_replicas: int) -> None:
    """What it computes once is what Keras computes for each variable."""
    strategy = mirrored(num_replicas)
    noise = np.random.default_rng(0)
    trained = []
    with strategy.scope():
        for make in (optimizers.Adam, keras.optimizers.Adam):
            optimizer = make(0.01, beta_1=0.9, beta_2=0.999)
            optimizers.expect_reduced_gradients(optimizer)
            weights = [
                keras.Variable(np.linspace(-1, 1, 5), dtype=dtype)
                for dtype in ("float32", "float64", "float32")
            ]
            optimizer.build(weights)
            trained.append((optimizer, weights))
    gradients = noise.normal(size=(4, 3, 5))

    @tf.function
    def step(gradient: tf.Tensor) -> None:
        def apply(gradient: tf.Tensor) -> None:
            for optimizer, weights in trained:
                optimizer.apply(tf.unstack(gradient), weights)

        strategy.run(apply, args=(gradient,))

    for gradient in gradients:
        step(tf.constant(gradient, tf.float32))
    (ours, _), (theirs, _) = trained
    for one, other in zip(ours.variables, theirs.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    for one, other in zip(trained[0][1], trained[1][1], strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.usefixtures("sums_as_written")
def test_a_burn_in_is_the_same_on_two_replicas_and_resumed(
    digits: sources.Source, tmp_path: pathlib.Path
) -> None:
    """What moves is in no checkpoint: it is a function of the step."""
    tf.config.experimental.enable_op_determinism()
    config = dataclasses.replace(
        BURN_IN, reduction="ordered", micro_batches=2, r1_gamma=1.0
    )
    whole = train(config, tf.distribute.get_strategy(), digits, 0, 3)
    cut = train(config, mirrored(2), digits, 0, 2)
    prefix = cut.checkpoint.save(str(tmp_path / "ckpt"))
    names = [name for name, _ in tf.train.list_variables(prefix)]
    assert not [name for name in names if "beta" in name]
    resumed = train(config, mirrored(2), digits, 2, 1, prefix)
    assert Comparison(resumed.strategy, resumed.variables).differing() == []
    for one, two in zip(whole.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    assert resumed.beta_2 is not None
    expected = schedules.beta_2(config, tf.constant(2, tf.int64))
    assert float(resumed.beta_2.read_value()) == float(expected)


def test_schedule_reaches_the_optimizers(digits: sources.Source) -> None:
    config = dataclasses.replace(
        SMALL, warmup_steps=10, generator_learning_rate=1e-3
    )
    gan = train(config, mirrored(2), digits, 0, 4)
    rate = gan.optimizers["generator"].learning_rate
    assert float(rate.numpy()) == pytest.approx(1e-3 * 0.4)
