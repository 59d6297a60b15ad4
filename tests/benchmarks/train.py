"""Compares dtrain with a training loop that somebody would write by hand.

    python -m tests.benchmarks.train [--rounds=5] [--steps=100] [dtrain flags]

Both train the same DCGAN on 28x28 images with batch 64, the same loss, the
same optimizers and the same moving average of the generator. They take turns
in one process, several times, and the table shows images/s of each turn.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.gan import state as gan_lib
from dtrain.gan.step import Step
from dtrain.models import dcgan

Turn = Callable[[int], None]


def by_hand(config: Config, images: np.ndarray) -> Turn:
    """Makes the loop of a TensorFlow tutorial: one function for each step.

    Args:
        config: the settings that both sides train with.
        images: uint8 [n, 28, 28, 1].

    Returns:
        A function that trains for some steps.
    """
    shape = images.shape[1:]
    generator, discriminator = dcgan.make(config, shape, 0)
    average, _ = dcgan.make(config, shape, 0)
    average.set_weights(generator.get_weights())
    adam = {"beta_1": config.beta_1, "beta_2": config.beta_2}
    generator_optimizer = keras.optimizers.Adam(1e-3, **adam)
    discriminator_optimizer = keras.optimizers.Adam(1e-3, **adam)
    decay = 0.5 ** (config.batch_size / config.ema_half_life_images)
    shape = [config.batch_size, config.latent_size]

    @tf.function
    def step(real_images: tf.Tensor) -> None:
        fake_images = generator(tf.random.normal(shape), training=True)
        with tf.GradientTape() as tape:
            real_logits = discriminator(real_images, training=True)
            fake_logits = discriminator(fake_images, training=True)
            loss = tf.reduce_mean(
                tf.nn.softplus(-real_logits) + tf.nn.softplus(fake_logits)
            )
        variables = discriminator.trainable_variables
        discriminator_optimizer.apply(tape.gradient(loss, variables), variables)
        with tf.GradientTape() as tape:
            fake_images = generator(tf.random.normal(shape), training=True)
            fake_logits = discriminator(fake_images, training=True)
            loss = tf.reduce_mean(tf.nn.softplus(-fake_logits))
        variables = generator.trainable_variables
        generator_optimizer.apply(tape.gradient(loss, variables), variables)
        for mean, weight in zip(
            average.weights, generator.weights, strict=True
        ):
            mean.assign(decay * mean + (1.0 - decay) * weight)

    dataset = (
        tf.data.Dataset.from_tensor_slices(images)
        .shuffle(len(images), seed=0)
        .repeat()
        .batch(config.batch_size, drop_remainder=True)
        .map(lambda batch: tf.cast(batch, tf.float32) / 127.5 - 1.0)
        .prefetch(tf.data.AUTOTUNE)
    )
    iterator = iter(dataset)

    def turn(num_steps: int) -> None:
        for _ in range(num_steps):
            step(next(iterator))
        average.weights[0].numpy()

    return turn


def by_dtrain(
    config: Config, strategy: tf.distribute.Strategy, data: sources.Data
) -> Turn:
    """Makes dtrain's loop; returns a function that trains for some steps."""
    source = data.source
    gan = gan_lib.GAN(
        config, strategy, source.image_shape, source.num_classes, data.specs
    )
    step = Step(gan)
    iterator = pipeline.make_iterator(data, config, strategy, 0, step.num_draws)

    def turn(num_steps: int) -> None:
        left = num_steps
        while left:
            now = min(left, config.steps_per_loop)
            step.run(iterator, tf.constant(now))[1].numpy()
            left -= now

    return turn


def measure(turn: Turn, num_steps: int, config: Config) -> float:
    """Lets a side train once; returns its images/s."""
    start = time.perf_counter()
    turn(num_steps)
    elapsed = time.perf_counter() - start
    return num_steps * config.batch_size / elapsed


def compare(turns: dict[str, Turn], num_steps: int, config: Config) -> float:
    """Lets each side train once; prints a row and returns the ratio."""
    ours, theirs = (measure(turn, num_steps, config) for turn in turns.values())
    print(f"{ours:>8.1f}  {theirs:>8.1f}  {ours / theirs:>6.3f}", flush=True)
    return ours / theirs


def own_flags(
    arguments: Sequence[str], defaults: Mapping[str, int]
) -> tuple[dict[str, int], list[str]]:
    """Splits a command line into a benchmark's own numbers, and the rest."""
    own, rest = dict(defaults), []
    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        if name in own:
            own[name] = int(value)
        else:
            rest.append(argument)
    return own, rest


def main() -> None:
    """Measures and prints the table."""
    own, rest = own_flags(sys.argv[1:], {"rounds": 5, "steps": 100})
    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (4096, 28, 28, 1), np.uint8)
    with tempfile.TemporaryDirectory() as directory:
        np.savez(f"{directory}/images.npz", images=images)
        dataset = f"--dataset=npz:{directory}/images.npz"
        config = config_lib.parse(
            [sys.argv[0], "--strategy=mirrored", "--r1_gamma=0", dataset, *rest]
        )
        strategy = strategy_lib.make(config, environment.ALONE)
        data = sources.open_data(config)
    turns = {
        "dtrain": by_dtrain(config, strategy, data),
        "by hand": by_hand(config, images),
    }
    for turn in turns.values():
        turn(config.steps_per_loop + 1)
    print("images/s\n  dtrain   by hand   ratio")
    ratios = [
        compare(turns, own["steps"], config) for _ in range(own["rounds"])
    ]
    print(f"median of the ratios {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
