"""A GAN as on keras.io, trained by `fit` with dtrain's callback.

    python -m tests.fit_gan DIRECTORY [--mirrored] [--save_freq=epoch] ...

Writes `DIRECTORY/progress` after each batch and `DIRECTORY/result.json` at the
end: a SHA-256 over every variable there is, and the logs of the epochs that
this process has ended. `--stock` takes Keras' own callback instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import dtrain

NUM_IMAGES, SIZE, LATENTS, BATCH = 96, 8, 4, 8


class GAN(keras.Model):
    """Both networks, and one step of both."""

    def __init__(
        self, discriminator: keras.Model, generator: keras.Model
    ) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.d_loss_tracker = keras.metrics.Mean(name="d_loss")
        self.g_loss_tracker = keras.metrics.Mean(name="g_loss")
        # Under a strategy, `fit` builds what is not built by a call.
        self.built = True

    def compile(
        self,
        d_optimizer: keras.Optimizer,
        g_optimizer: keras.Optimizer,
        loss_fn: Any,
        **options: Any,
    ) -> None:
        super().compile(**options)
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.loss_fn = loss_fn

    def build_optimizers(self) -> None:
        """Under a strategy, Keras cannot build them in the first step."""
        self.d_optimizer.build(self.discriminator.trainable_variables)
        self.g_optimizer.build(self.generator.trainable_variables)

    @property
    def metrics(self) -> list[keras.Metric]:
        return [self.d_loss_tracker, self.g_loss_tracker]

    def train_step(self, real: tf.Tensor) -> dict[str, tf.Tensor]:
        num = tf.shape(real)[0]
        latents = keras.random.normal((num, LATENTS), seed=self.seed_generator)
        images = tf.concat([self.generator(latents), real], axis=0)
        labels = tf.concat([tf.ones((num, 1)), tf.zeros((num, 1))], axis=0)
        noise = keras.random.uniform((2 * num, 1), seed=self.seed_generator)
        with tf.GradientTape() as tape:
            logits = self.discriminator(images, training=True)
            d_loss = self.loss_fn(labels + 0.05 * noise, logits)
        weights = self.discriminator.trainable_weights
        gradients = tape.gradient(d_loss, weights)
        self.d_optimizer.apply_gradients(zip(gradients, weights, strict=True))

        latents = keras.random.normal((num, LATENTS), seed=self.seed_generator)
        with tf.GradientTape() as tape:
            logits = self.discriminator(self.generator(latents), training=True)
            g_loss = self.loss_fn(tf.zeros((num, 1)), logits)
        weights = self.generator.trainable_weights
        gradients = tape.gradient(g_loss, weights)
        self.g_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        self.d_loss_tracker.update_state(d_loss)
        self.g_loss_tracker.update_state(g_loss)
        return {
            "d_loss": self.d_loss_tracker.result(),
            "g_loss": self.g_loss_tracker.result(),
        }


def make_gan(width: int = 16, **options: Any) -> GAN:
    """Makes and compiles one, in the scope of the caller."""
    layers = keras.layers
    discriminator = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 1)),
            layers.Flatten(),
            layers.Dense(width),
            layers.LeakyReLU(0.2),
            layers.Dropout(0.2, seed=7),
            layers.Dense(1),
        ],
        name="discriminator",
    )
    generator = keras.Sequential(
        [
            keras.Input((LATENTS,)),
            layers.Dense(width, activation="relu"),
            layers.Dense(SIZE * SIZE, activation="tanh"),
            layers.Reshape((SIZE, SIZE, 1)),
        ],
        name="generator",
    )
    gan = GAN(discriminator, generator)
    gan.compile(
        d_optimizer=keras.optimizers.Adam(3e-3, beta_1=0.5),
        g_optimizer=keras.optimizers.AdamW(3e-3),
        loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
        # XLA would take longer to compile it than the CPU to run it.
        jit_compile=False,
        **options,
    )
    return gan


def make_images() -> np.ndarray:
    """Images that are drawn anew each time, and the same."""
    values = np.random.default_rng(0).normal(size=(NUM_IMAGES, SIZE, SIZE, 1))
    return values.astype(np.float32)


def make_dataset() -> tf.data.Dataset:
    dataset = tf.data.Dataset.from_tensor_slices(make_images())
    dataset = dataset.shuffle(NUM_IMAGES, seed=3)
    dataset = dataset.batch(BATCH, drop_remainder=True).prefetch(2)
    # A thread that tunes is waited for, now and then for half a minute, when
    # the garbage of an earlier `fit` is collected.
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def make_strategy(mirrored: bool) -> tf.distribute.Strategy:
    """Two replicas on the CPU, or the strategy that is none."""
    if not mirrored:
        return tf.distribute.get_strategy()
    if len(tf.config.list_logical_devices("CPU")) < 2:
        raise RuntimeError("the CPU is not split")
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def digest(gan: keras.Model) -> str:
    """One SHA-256 over all that training changes, of every replica."""
    total = hashlib.sha256()
    variables = [*gan.variables]
    for optimizer in (gan.d_optimizer, gan.g_optimizer):
        variables += optimizer.variables
    for metric in gan.metrics:
        variables += metric.variables
    for variable in variables:
        for each in getattr(variable.value, "values", (variable.value,)):
            total.update(each.numpy().tobytes())
    return total.hexdigest()


class Slowly(keras.callbacks.Callback):
    """Says where it is, and gives a killer the time to come."""

    def __init__(self, path: pathlib.Path, secs: float) -> None:
        super().__init__()
        self._path = path
        self._secs = secs
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        self._path.write_text(f"epoch {self._epoch}, batch {batch + 1}")
        time.sleep(self._secs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--mirrored", action="store_true")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--save_freq", default="epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_secs", type=float, default=0.02)
    flags = parser.parse_args()
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    keras.utils.set_random_seed(1)
    with make_strategy(flags.mirrored).scope():
        gan = make_gan()
        if flags.mirrored or flags.stock:
            gan.build_optimizers()
    freq = flags.save_freq
    backup = (keras.callbacks if flags.stock else dtrain).BackupAndRestore(
        str(flags.directory / "backup"),
        save_freq=freq if freq == "epoch" else int(freq),
    )
    notices = dtrain.StopOnNotice()
    slowly = Slowly(flags.directory / "progress", flags.batch_secs)
    history = gan.fit(
        make_dataset(),
        epochs=flags.epochs,
        # Last, so that the killer comes while they work.
        callbacks=[slowly, backup, *([] if flags.stock else [notices])],
        verbose=0,
    )
    result = {"sha256": digest(gan), "logs": history.history}
    (flags.directory / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
