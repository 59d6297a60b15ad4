"""Three programs whose checkpoints are a promise, as every release runs them.

    python -m tests.released PROGRAM DIRECTORY

`run` is dtrain's own trainer, `fit` is Keras' with both callbacks, `loop` is a
loop of one's own around a `CheckpointManager`. Each goes on from what it finds
in DIRECTORY, and says where it is in `DIRECTORY/progress`, so that it can be
killed in the middle. `tests/golden/release_*` hold what older releases left
behind when they were.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import dtrain

PROGRAMS = ("run", "fit", "loop")
NUM_STEPS = {"run": 120, "fit": 36, "loop": 60}

# All kinds of state that a run can have, in a few hundred weights.
FLAGS = (
    "--strategy=mirrored",
    "--conditional",
    "--batch_norm",
    "--discriminator_steps=2",
    "--learning_rate_schedule=cosine",
    "--warmup_steps=3",
    "--batch_size=8",
    "--base_channels=2",
    "--latent_size=4",
    "--sample_every_steps=0",
    "--steps_per_loop=5",
    f"--num_steps={NUM_STEPS['run']}",
    "--checkpoint_every_steps=40",
    "--backup_every_secs=0.001",
)


def arithmetic() -> str:
    """One SHA-256 of what this machine's kernels make of fixed numbers.

    Where it differs from that of the machine which wrote a golden, another
    kind of CPU rounds otherwise, and bits cannot be compared.
    """
    random = np.random.default_rng(0)
    images = tf.constant(random.normal(size=(8, 8, 8, 4)), tf.float32)
    kernel = tf.Variable(random.normal(size=(4, 4, 4, 6)), dtype=tf.float32)
    weight = tf.Variable(random.normal(size=(96, 7)), dtype=tf.float32)

    @tf.function(autograph=False)
    def compute() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            maps = tf.nn.conv2d(images, kernel, 2, "SAME")
            wide = tf.nn.conv2d_transpose(maps, kernel, (8, 8, 8, 4), 2, "SAME")
            flat = tf.nn.leaky_relu(tf.reshape(maps, [8, 96])) @ weight
            loss = tf.reduce_mean(tf.math.softplus(flat))
            loss += tf.reduce_mean(tf.tanh(wide))
        return [loss, *tape.gradient(loss, [kernel, weight])]

    total = hashlib.sha256()
    for value in compute():
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def run(directory: pathlib.Path) -> str:
    """Trains with the trainer; returns the newest checkpoint."""
    from dtrain import main as trainer

    code = trainer.run(["dtrain.main", f"--run_dir={directory}/run", *FLAGS])
    assert code == 0, code
    return f"{directory}/run/checkpoints/ckpt-{NUM_STEPS['run']}"


def _model() -> keras.Model:
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.2, seed=7),
            layers.Dense(1),
        ],
        name="model",
    )
    model.compile(
        keras.optimizers.AdamW(1e-2), "mse", metrics=["mae"], jit_compile=False
    )
    return model


def _arrays() -> tuple[np.ndarray, np.ndarray]:
    inputs = np.random.default_rng(0).normal(size=(96, 6)).astype(np.float32)
    return inputs, inputs.sum(axis=1, keepdims=True)


class _Progress(keras.callbacks.Callback):
    """Says how many batches are done, and gives a killer the time to come."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self._report = report
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        self._report(self._epoch * 12 + batch + 1)


def fit(directory: pathlib.Path, report: Callable[[int], None]) -> str:
    """Trains with Keras' `fit`; returns the newest checkpoint."""
    data = tf.data.Dataset.from_tensor_slices(_arrays())
    _model().fit(
        data.shuffle(96, seed=3).batch(8),
        epochs=3,
        callbacks=[
            _Progress(report),
            dtrain.BackupAndRestore(directory / "backup", save_freq=5),
            dtrain.CheckpointManagerCallback(directory / "checkpoints"),
        ],
        verbose=0,
    )
    return f"{directory}/checkpoints/ckpt-{NUM_STEPS['fit']}"


def loop(directory: pathlib.Path, report: Callable[[int], None]) -> str:
    """Trains in a loop of its own; returns the newest checkpoint."""
    model, (inputs, targets) = _model(), _arrays()
    model.optimizer.build(model.trainable_variables)
    state = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = f"{directory}/checkpoints"
    with dtrain.CheckpointManager(state, path) as manager:
        for step in range(manager.restore_or_initialize(), NUM_STEPS["loop"]):
            start = step * 8 % 96
            part = slice(start, start + 8)
            model.train_on_batch(inputs[part], targets[part])
            report(step + 1)
            if (step + 1) % 10 == 0:
                manager.save(step + 1, wait=True)
    return f"{path}/ckpt-{NUM_STEPS['loop']}"


def main() -> None:
    """Runs a program to its end, or to where it is killed."""
    program, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)

    def report(step: int) -> None:
        (directory / "progress").write_text(str(step))
        if "DTRAIN_SLOWLY" in os.environ:
            time.sleep(0.05)

    if program == "run":
        print(run(directory))
    else:
        print({"fit": fit, "loop": loop}[program](directory, report))


if __name__ == "__main__":
    main()
