"""The step: the same on any number of replicas, and no trap of Keras in it.

Runs in one process on logical CPUs, which conftest.py makes.
"""

from __future__ import annotations

import dataclasses
import gc
import pathlib
import random
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import dtrain
from dtrain import main as dtrain_main
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.errors import UserError
from dtrain.gan import draws, loading, memory, optimizers
from dtrain.gan import phases as phases_lib
from dtrain.gan import state as gan_lib
from dtrain.gan.replicas import Comparison
from dtrain.gan.step import Step
from tests import runs
from tests.benchmarks import memory as benchmark
from tests.replicas import collectives, mirrored

SMALL = Config(
    batch_size=8,
    base_channels=4,
    latent_size=8,
    jit_compile="off",
    num_steps=100,
)
IMAGE_SHAPE = (8, 8, 1)
NUM_NORMS = 2  # of dcgan's generator at this size


@pytest.fixture(autouse=True)
def fresh_keras() -> Iterator[None]:
    """Gives every test the same seeds and the default precision."""
    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def digits() -> sources.Source:
    return sources.open_source(Config())


def train(
    config: Config,
    strategy: tf.distribute.Strategy,
    source: sources.Source,
    num_steps: int,
) -> tuple[gan_lib.GAN, dict[str, np.ndarray]]:
    """Trains from the start; returns the GAN and its metrics."""
    gan = gan_lib.GAN(config, strategy, source.image_shape, source.num_classes)
    iterator = pipeline.make_iterator(
        sources.Data(source), config, strategy, 0, config.discriminator_steps
    )
    metrics, _ = Step(gan).run(iterator, tf.constant(num_steps))
    return gan, {name: column.numpy() for name, column in metrics.items()}


def assert_close(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], **limits: float
) -> None:
    assert list(got) == list(expected)
    for name, column in got.items():
        np.testing.assert_allclose(column, expected[name], **limits)


def differing(gan: gan_lib.GAN) -> list[str]:
    return Comparison(gan.strategy, gan.variables).differing()


def weights(gan: gan_lib.GAN) -> list[np.ndarray]:
    return [variable.numpy() for variable in gan.variables]


def test_weights_follow_from_the_settings_alone() -> None:
    """TFDS draws a name when it prepares a data set, at a first start only."""
    first = gan_lib.GAN(SMALL, mirrored(1), IMAGE_SHAPE, 0)
    random.random()
    keras.utils.set_random_seed(99)
    second = gan_lib.GAN(SMALL, mirrored(1), IMAGE_SHAPE, 0)
    for expected, got in zip(weights(first), weights(second), strict=True):
        np.testing.assert_array_equal(got, expected)
    other = gan_lib.GAN(
        dataclasses.replace(SMALL, seed=1), mirrored(1), IMAGE_SHAPE, 0
    )
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(weights(first), weights(other), strict=True)
    )


# One batch, any number of replicas.


@pytest.fixture(scope="module")
def losses_on_one_replica(digits: sources.Source) -> dict[str, np.ndarray]:
    _, metrics = train(SMALL, mirrored(1), digits, 20)
    return metrics


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_losses_do_not_depend_on_the_replicas(
    num_replicas: int,
    digits: sources.Source,
    losses_on_one_replica: dict[str, np.ndarray],
) -> None:
    gan, metrics = train(SMALL, mirrored(num_replicas), digits, 20)
    for network in ("generator", "discriminator"):
        name = f"{network}_loss"
        np.testing.assert_allclose(
            metrics[name], losses_on_one_replica[name], rtol=1e-3
        )
    assert differing(gan) == []


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_micro_batches_add_up(
    num_replicas: int,
    digits: sources.Source,
    losses_on_one_replica: dict[str, np.ndarray],
) -> None:
    config = dataclasses.replace(SMALL, micro_batches=4)
    _, metrics = train(config, mirrored(num_replicas), digits, 20)
    assert_close(metrics, losses_on_one_replica, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_each_replica_sees_its_part_of_the_same_batch(
    num_replicas: int, digits: sources.Source
) -> None:
    """Trap 2: Keras' own random numbers are equal on every replica."""
    strategy = mirrored(num_replicas)
    gan = gan_lib.GAN(SMALL, strategy, digits.image_shape, digits.num_classes)
    iterator = pipeline.make_iterator(
        sources.Data(digits), SMALL, strategy, 3, SMALL.discriminator_steps
    )

    @tf.function
    def examples(batch: pipeline.Batch) -> draws.Arrays:
        return strategy.run(
            lambda part: (
                draws.given_at(
                    *(SMALL, gan.data_step, 0, part, num_replicas, gan.step, {})
                ).arrays
            ),
            args=(batch,),
        )

    made = examples(next(iterator))
    latents = np.concatenate(strategy.experimental_local_results(made.latents))
    everything = draws.latents_at(SMALL, tf.constant(0, tf.int64), 0, 8)
    np.testing.assert_array_equal(latents, everything)
    assert len(np.unique(latents)) == latents.size
    images = np.concatenate(
        strategy.experimental_local_results(made.real_images)
    )
    indices = pipeline.sample_indices(
        tf.range(24, 32, dtype=tf.int64), SMALL.seed, digits.num_images
    )
    expected, _ = digits.read(indices)
    np.testing.assert_allclose(
        images, expected.numpy().astype(np.float32) / 127.5 - 1, atol=1e-6
    )


# What a step does.


def test_phases_take_the_draws_in_turn() -> None:
    config = dataclasses.replace(SMALL, discriminator_steps=3)
    program = gan_lib.GAN(config, mirrored(1), IMAGE_SHAPE, 0).program
    assert program.draws == (0, 1, 2, 2)
    backwards = dataclasses.replace(program, phases=program.phases[::-1])
    assert backwards.draws == (0, 0, 1, 2)


def test_latents_differ_between_steps_phases_and_seeds() -> None:
    def draw(seed: int, step: int, phase: int) -> bytes:
        config = dataclasses.replace(SMALL, seed=seed)
        step_tensor = tf.constant(step, tf.int64)
        return draws.latents_at(config, step_tensor, phase, 4).numpy().tobytes()

    places = [
        (seed, step, phase)
        for seed in (0, 1, 2**31 - 1)
        for step in (0, 1, 2, 2**40)
        for phase in (0, 1)
    ]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 2, 0) == draw(1, 2, 0)


def test_average_has_its_half_life(digits: sources.Source) -> None:
    config = dataclasses.replace(SMALL, ema_half_life_images=16.0)
    strategy = mirrored(1)
    gan = gan_lib.GAN(config, strategy, digits.image_shape, 0)
    iterator = pipeline.make_iterator(
        sources.Data(digits), config, strategy, 0, config.discriminator_steps
    )
    steps = Step(gan)
    expected = [weight.numpy() for weight in gan.networks.generator.weights]
    for step in range(60):
        steps.run(iterator, tf.constant(1))
        # It grows with the images seen, up to the flag's.
        decay = 0.5 ** (8 / min(16.0, 0.05 * 8 * (step + 1)))
        expected = [
            decay * mean + (1 - decay) * weight.numpy()
            for mean, weight in zip(
                expected, gan.networks.generator.weights, strict=True
            )
        ]
    for mean, weight in zip(
        expected, gan.averages["generator"].weights, strict=True
    ):
        np.testing.assert_allclose(weight.numpy(), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "hinge", "discriminator_steps": 2},
        {"loss": "wgan_gp", "conditional": True},
        {"loss": "least_squares", "r1_gamma": 1.0},
        {"loss": "relativistic", "r1_gamma": 1.0, "r2_gamma": 1.0},
        {"precision": "mixed_bfloat16"},
        {"batch_norm": True, "micro_batches": 4},
    ],
    ids=str,
)
def test_trains_on_two_replicas(changes: dict, digits: sources.Source) -> None:
    """Traps 6 and 8 among them: several updates in a step, full batches."""
    config = dataclasses.replace(SMALL, **changes)
    gan, metrics = train(config, mirrored(2), digits, 3)
    for column in metrics.values():
        assert np.isfinite(column).all()
    assert differing(gan) == []
    per_step = config.discriminator_steps
    assert (
        int(gan.optimizers["discriminator"].iterations.numpy()) == 3 * per_step
    )
    assert int(gan.optimizers["generator"].iterations.numpy()) == 3


# The other traps.


def broken_on_the_last_replica(
    networks: Any, example: dtrain.Example
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """A loss whose gradient is infinite for one image only."""
    logits = networks.discriminator(example.real_images, training=True)
    context = tf.distribute.get_replica_context()
    is_last = (
        context.replica_id_in_sync_group == context.num_replicas_in_sync - 1
    )
    factor = tf.where(is_last, np.float32(np.inf), np.float32(1.0))
    losses = tf.cast(tf.reshape(logits, [-1]), tf.float32) * factor
    return losses, {"discriminator_loss": losses}


def test_all_replicas_skip_a_step_that_overflows_on_one(
    digits: sources.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 1: Keras' LossScaleOptimizer looks at replica 0 alone."""
    keras.config.set_dtype_policy("mixed_float16")
    phases = (
        dtrain.Phase("discriminator", broken_on_the_last_replica),
        phases_lib.adversarial_phases(SMALL)[-1],
    )
    monkeypatch.setattr(phases_lib, "adversarial_phases", lambda _: phases)
    config = dataclasses.replace(SMALL, precision="mixed_float16")
    strategy = mirrored(2)
    gan = gan_lib.GAN(config, strategy, digits.image_shape, 0)
    iterator = pipeline.make_iterator(
        sources.Data(digits), config, strategy, 0, config.discriminator_steps
    )
    before = [weight.numpy() for weight in gan.networks.discriminator.weights]
    generator = gan.networks.generator.weights[0].numpy()
    Step(gan).run(iterator, tf.constant(2))
    for old, weight in zip(
        before, gan.networks.discriminator.weights, strict=True
    ):
        for replica in weight.value.values:
            np.testing.assert_array_equal(replica.numpy(), old)
    assert int(gan.optimizers["discriminator"].iterations.numpy()) == 0
    assert not np.array_equal(
        gan.networks.generator.weights[0].numpy(), generator
    )
    scales = gan.loss_scales
    assert scales["discriminator"].read().numpy() == 2.0**13
    assert scales["generator"].read().numpy() == 2.0**15


def test_loss_scale_grows_after_enough_good_steps() -> None:
    scale = optimizers.LossScale("generator")
    for _ in range(scale.GROW_EVERY_STEPS):
        assert scale.read().numpy() == scale.FIRST
        scale.update(tf.constant(True))
    assert scale.read().numpy() == 2 * scale.FIRST


def test_float16_follows_float32(digits: sources.Source) -> None:
    _, exact = train(SMALL, mirrored(1), digits, 5)
    keras.config.set_dtype_policy("mixed_float16")
    config = dataclasses.replace(SMALL, precision="mixed_float16")
    _, metrics = train(config, mirrored(1), digits, 5)
    assert_close(metrics, exact, rtol=0.02, atol=0.005)


def make_with_norm(
    config: Config, image_shape: tuple, num_classes: int
) -> tuple:
    """A user's model with a BatchNormalization of Keras."""
    del config, num_classes
    layers = keras.layers
    generator = keras.Sequential(
        [
            keras.Input([8]),
            layers.Dense(64),
            layers.BatchNormalization(name="plain_norm"),
            layers.Reshape(image_shape),
        ]
    )
    discriminator = keras.Sequential(
        [keras.Input(image_shape), layers.Flatten(), layers.Dense(1)]
    )
    return generator, discriminator


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2),
        ({"discriminator_steps": 2}, 3),
        ({"micro_batches": 8}, 2),
        # A layer of the generator has two passes in a step, and the second
        # one has a gradient.
        ({"batch_norm": True}, 2 + NUM_NORMS * 3),
    ],
    ids=str,
)
def test_collectives_in_a_step(
    changes: dict, expected: int, digits: sources.Source
) -> None:
    """Trap 4: Keras makes one for each variable, and three for a BatchNorm."""
    config = dataclasses.replace(SMALL, **changes)
    strategy = mirrored(2)
    gan = gan_lib.GAN(config, strategy, digits.image_shape, 0)
    iterator = pipeline.make_iterator(
        sources.Data(digits), config, strategy, 0, config.discriminator_steps
    )
    traced = Step(gan)._run.get_concrete_function(iterator, tf.constant(1))
    assert collectives(traced.graph, 2) == {"CollectiveReduceV2": expected}


def test_unsynchronized_batch_norm_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trap 3: its averages differ between replicas, and one is saved."""
    monkeypatch.setattr(loading, "load", lambda _: make_with_norm)
    with pytest.raises(UserError, match=r"plain_norm .* synchronized=True"):
        gan_lib.GAN(SMALL, mirrored(2), IMAGE_SHAPE, 0)
    gan_lib.GAN(SMALL, mirrored(1), IMAGE_SHAPE, 0)


def test_xla_compiles_the_gradients_on_two_replicas(
    digits: sources.Source,
) -> None:
    """Trap 5: around strategy.run, or with the update inside, it fails."""
    _, expected = train(SMALL, mirrored(2), digits, 3)
    config = dataclasses.replace(SMALL, jit_compile="on", r1_gamma=1.0)
    gan, _ = train(config, mirrored(2), digits, 1)
    assert differing(gan) == []
    config = dataclasses.replace(SMALL, jit_compile="on")
    _, metrics = train(config, mirrored(2), digits, 3)
    assert_close(metrics, expected, rtol=1e-3, atol=1e-5)


def test_xla_and_state_on_several_replicas_is_refused() -> None:
    config = dataclasses.replace(SMALL, jit_compile="on", batch_norm=True)
    gan = gan_lib.GAN(config, mirrored(2), IMAGE_SHAPE, 0)
    with pytest.raises(UserError, match="jit_compile"):
        Step(gan)


def test_optimizers_are_built_before_the_first_step() -> None:
    """Trap 7: a slot that is made in a trace, or out of scope, is lost."""
    gan = gan_lib.GAN(SMALL, mirrored(2), IMAGE_SHAPE, 0)
    for name, optimizer in gan.optimizers.items():
        weights = gan.program.networks[name].trainable_variables
        assert len(optimizer.variables) == 2 + 2 * len(weights)
        for variable in optimizer.variables:
            assert len(variable.value.values) == 2


def test_variables_that_differ_are_named(digits: sources.Source) -> None:
    gan, _ = train(SMALL, mirrored(2), digits, 1)
    kernel = gan.networks.discriminator.weights[0]
    second = kernel.value.values[1]
    second.assign(tf.tensor_scatter_nd_add(second, [[0, 0, 0, 0]], [1e-6]))
    assert differing(gan) == [kernel.path]


# What a checkpoint holds.


class Stateful(keras.Model):
    """Hides layers in a list and a dict, and draws random numbers."""

    def __init__(self, *outputs: keras.layers.Layer, name: str) -> None:
        super().__init__(name=name)
        layers = keras.layers
        self.blocks = [layers.Dense(6), layers.Dropout(0.5)]
        self.named = {
            "noise": layers.GaussianNoise(0.1),
            "dense": layers.SpectralNormalization(layers.Dense(6)),
        }
        self.norm = layers.BatchNormalization(synchronized=True)
        self.outputs_of = outputs

    def call(
        self, inputs: tf.Tensor, training: bool | None = None
    ) -> tf.Tensor:
        x = keras.ops.reshape(inputs, [keras.ops.shape(inputs)[0], -1])
        for layer in (*self.blocks, *self.named.values(), self.norm):
            if isinstance(layer, keras.layers.Dense):
                x = layer(x)
            else:
                x = layer(x, training=training)
        for layer in self.outputs_of:
            x = layer(x)
        return x


def make_stateful(
    config: Config, image_shape: tuple, num_classes: int
) -> tuple:
    del config, num_classes
    layers = keras.layers
    shape = layers.Reshape(image_shape)
    generator = Stateful(layers.Dense(64), shape, name="generator")
    return generator, Stateful(layers.Dense(1), name="discriminator")


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_everything_a_model_can_hold_comes_back(
    num_replicas: int,
    digits: sources.Source,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "load", lambda _: make_stateful)
    strategy = mirrored(num_replicas)
    config = dataclasses.replace(SMALL, latent_size=8)
    whole, _ = train(config, strategy, digits, 6)

    cut, _ = train(config, strategy, digits, 2)
    prefix = cut.checkpoint.save(str(tmp_path / "ckpt"))
    resumed = gan_lib.GAN(config, strategy, digits.image_shape, 0)
    resumed.checkpoint.restore(prefix).assert_consumed()
    iterator = pipeline.make_iterator(
        sources.Data(digits), config, strategy, 2, config.discriminator_steps
    )
    Step(resumed).run(iterator, tf.constant(4))
    assert differing(resumed) == []
    for expected, got in zip(weights(whole), weights(resumed), strict=True):
        np.testing.assert_array_equal(got, expected)
    names = {name for name, _ in tf.train.list_variables(prefix)}
    assert any(name.startswith("untracked/") for name in names)


def test_loss_scales_come_back(
    digits: sources.Source,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizers.LossScale, "GROW_EVERY_STEPS", 3)
    keras.config.set_dtype_policy("mixed_float16")
    config = dataclasses.replace(SMALL, precision="mixed_float16")
    strategy = mirrored(2)
    whole, _ = train(config, strategy, digits, 7)

    cut, _ = train(config, strategy, digits, 2)
    prefix = cut.checkpoint.save(str(tmp_path / "ckpt"))
    resumed = gan_lib.GAN(config, strategy, digits.image_shape, 0)
    resumed.checkpoint.restore(prefix).assert_consumed()
    iterator = pipeline.make_iterator(
        sources.Data(digits), config, strategy, 2, config.discriminator_steps
    )
    Step(resumed).run(iterator, tf.constant(5))
    for expected, got in zip(weights(whole), weights(resumed), strict=True):
        np.testing.assert_array_equal(got, expected)
    for name, scale in whole.loss_scales.items():
        assert scale.read().numpy() == 4 * scale.FIRST
        assert resumed.loss_scales[name].read().numpy() == 4 * scale.FIRST


def test_top_level_names_in_a_checkpoint() -> None:
    gan = gan_lib.GAN(SMALL, mirrored(1), IMAGE_SHAPE, 0)
    [*children] = tf.train.TrackableView(gan.checkpoint).children(
        gan.checkpoint
    )
    assert set(children) - {"save_counter"} == {
        "step",
        "generator",
        "discriminator",
        "generator_optimizer",
        "discriminator_optimizer",
        "ema_generator",
        "divergence",
    }


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_stop_ends_the_loop_after_the_step_that_runs(
    num_replicas: int, digits: sources.Source
) -> None:
    """From another thread, while the main one waits for TensorFlow."""
    strategy = mirrored(num_replicas)
    gan = gan_lib.GAN(SMALL, strategy, digits.image_shape, 0)
    iterator = pipeline.make_iterator(
        sources.Data(digits), SMALL, strategy, 0, SMALL.discriminator_steps
    )
    steps = Step(gan)
    steps.run(iterator, tf.constant(1))
    seen: list[int] = []

    def stop() -> None:
        steps.stop()
        seen.append(int(gan.step.numpy()))

    timer = threading.Timer(0.3, stop)
    timer.start()
    metrics, verdict = steps.run(iterator, tf.constant(10**6))
    timer.join()
    step = int(gan.step.numpy())
    assert len(metrics["generator_loss"]) == step - 1
    assert int(verdict.numpy()) == 0
    # The one that was running, and one that had begun to look.
    assert seen[0] <= step <= seen[0] + 2


# The memory of a step.


def test_the_memory_of_a_step_is_known_before_it_runs() -> None:
    """Within a factor of two; see `tests/benchmarks/memory.py` for more."""
    settings = {"side": 32, "batch_size": 96, "micro_batches": 3}
    estimated, measured = benchmark.measure(settings)
    assert measured / 2 < estimated < measured * 2


def estimate_of(
    source: sources.Source, **settings: Any
) -> tuple[gan_lib.GAN, memory.Estimate]:
    config = dataclasses.replace(SMALL, **settings)
    gan = gan_lib.GAN(config, mirrored(2), IMAGE_SHAPE, 10)
    return gan, memory.Estimate(gan, sources.Data(source), 1)


def test_what_is_proposed_fits_and_is_the_largest(
    digits: sources.Source,
) -> None:
    """Of two replicas, which share the memory of this machine."""
    _, estimate = estimate_of(digits, batch_size=96_000_000)
    with pytest.raises(UserError) as caught:
        estimate.check()
    line = str(caught.value)
    number = r"([\d,]+)"
    match = re.fullmatch(
        r"a step with batch_size \(96000000\) takes about [\d,.]+ GiB of "
        r"memory, and this machine has [\d.]+ GiB; try (--batch_size=(\d+) )?"
        rf"--micro_batches=(\d+), {number} images at a time",
        line,
    )
    assert match, line
    batch_size = int(match[2] or 96_000_000)
    micro_batches = int(match[3])
    images = int(match[4].replace(",", ""))
    assert batch_size == micro_batches * images
    estimate_of(digits, batch_size=batch_size, micro_batches=micro_batches)[
        1
    ].check()


def test_a_step_that_fails_for_want_of_memory_is_one_line(
    digits: sources.Source,
) -> None:
    """As a GPU's is, of which nobody knows how much others take."""
    _, estimate = estimate_of(digits, batch_size=48, micro_batches=4)
    for text in (
        "OOM when allocating tensor with shape[64,128] and type float on GPU:0",
        "Out of memory while trying to allocate 12884901888 bytes.",
    ):
        error = tf.errors.ResourceExhaustedError(None, None, f"{text}\n\tmore")
        mistake = memory.out_of_memory(error, estimate)
        assert mistake is not None
        assert mistake.text == (
            f"a step takes more memory than there is ({text} more); try "
            "--micro_batches=6, 8 images at a time"
        )
    for error in (
        tf.errors.ResourceExhaustedError(
            None, None, "too many open files\nHint: to see allocated tensors"
        ),
        tf.errors.InternalError(None, None, "out of luck"),
    ):
        assert memory.out_of_memory(error, estimate) is None


def test_the_input_is_not_taken_down_before_the_program_has_left(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may take half a minute, in which the watchdog would end it."""
    make_iterator, seen, alive = pipeline.make_iterator, [], []

    def make_and_watch(*rest: Any) -> Any:
        iterator = make_iterator(*rest)
        seen.append(weakref.ref(iterator))
        return iterator

    def leave(code: int) -> int:
        gc.collect()
        alive.extend(iterator() is not None for iterator in seen)
        return code

    monkeypatch.setattr(pipeline, "make_iterator", make_and_watch)
    flags = [*runs.SMALL, f"--run_dir={tmp_path}/run", "--num_steps=2"]
    assert dtrain_main.run(["main", *flags], leave) == 0
    assert alive == [True]
    gc.collect()
    assert seen[0]() is None
