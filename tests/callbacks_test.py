"""Saving and resuming a `fit`, to the bit."""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

import dtrain
from dtrain import errors
from dtrain.checkpoint import listing, retention, saving
from dtrain.storage import claim, files
from tests import fit_gan, runs, small_fit

NUM_BATCHES = fit_gan.NUM_IMAGES // fit_gan.BATCH


def numpy_images() -> dict[str, Any]:
    return {"x": fit_gan.make_images(), "batch_size": fit_gan.BATCH}


def one_iterator() -> dict[str, Any]:
    """An "epoch" that is not one of the data's: 5 batches of 12."""
    return {"x": fit_gan.make_dataset().repeat(), "steps_per_epoch": 5}


def of_unknown_size() -> dict[str, Any]:
    return {"x": fit_gan.make_dataset().filter(lambda _: True)}


DATA = {
    "tf_data": lambda: {"x": fit_gan.make_dataset()},
    "numpy": numpy_images,
    "one_iterator": one_iterator,
    "of_unknown_size": of_unknown_size,
}


def fit(
    *tiers: keras.callbacks.Callback,
    data: str = "tf_data",
    mirrored: bool = False,
    cut_after: int | None = None,
    epochs: int = 3,
    **options: Any,
) -> tuple[fit_gan.GAN, small_fit.Watch]:
    """Trains a new GAN, as a new process would."""
    keras.utils.set_random_seed(1)
    with fit_gan.make_strategy(mirrored).scope():
        gan = fit_gan.make_gan(**options)
        if mirrored:
            gan.build_optimizers()
    watch = small_fit.Watch(cut_after)
    with contextlib.suppress(small_fit.CutError):
        gan.fit(
            **DATA[data](),
            epochs=epochs,
            callbacks=[*tiers, watch],
            verbose=0,
        )
    return gan, watch


def flip_a_bit(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("data", "mirrored"),
    [
        ("tf_data", False),
        ("numpy", False),
        ("one_iterator", False),
        ("of_unknown_size", False),
        # Under a strategy, what the replicas do where data of unknown size
        # ends is not the same each time, with or without a callback.
        ("tf_data", True),
        ("one_iterator", True),
    ],
)
def test_cut_fit_ends_with_the_same_bits(
    data: str, mirrored: bool, tmp_path: pathlib.Path
) -> None:
    whole, watched = fit(data=data, mirrored=mirrored)
    num = 5 if data == "one_iterator" else NUM_BATCHES
    # In the first epoch, at the end of one, and in the middle of the last.
    few = mirrored or data == "numpy"
    for cut_after in (2 * num + 4,) if few else (3, num, 2 * num + 4):
        backup = tmp_path / str(cut_after)
        fit(
            dtrain.BackupAndRestore(backup, save_freq=2),
            data=data,
            mirrored=mirrored,
            cut_after=cut_after,
        )
        gan, rest = fit(
            dtrain.BackupAndRestore(backup, save_freq=2),
            data=data,
            mirrored=mirrored,
        )
        assert rest.batches == watched.batches[-len(rest.batches) :]
        assert cut_after - 2 <= 3 * num - len(rest.batches) <= cut_after
        assert rest.epochs == {e: watched.epochs[e] for e in rest.epochs}
        assert fit_gan.digest(gan) == fit_gan.digest(whole)
        assert not backup.exists()


def test_saves_after_epochs(tmp_path: pathlib.Path) -> None:
    whole, _ = fit()
    fit(dtrain.BackupAndRestore(tmp_path), cut_after=2 * NUM_BATCHES + 5)
    gan, rest = fit(dtrain.BackupAndRestore(tmp_path))
    assert rest.batches == [(2, batch) for batch in range(NUM_BATCHES)]
    assert fit_gan.digest(gan) == fit_gan.digest(whole)


def test_several_steps_in_one_execution(tmp_path: pathlib.Path) -> None:
    """5 do not divide 12: the last of an epoch are only two."""
    whole, _ = fit(steps_per_execution=5)
    backup = tmp_path / "backup"
    fit(
        dtrain.BackupAndRestore(backup, save_freq=1),
        steps_per_execution=5,
        cut_after=5,
    )
    small_fit.settle()
    assert small_fit.saved_steps(backup)[-1] == NUM_BATCHES + 10
    with pytest.raises(errors.UserError, match="multiple of steps_per_exec"):
        fit(dtrain.BackupAndRestore(backup), steps_per_execution=4)
    gan, rest = fit(
        dtrain.BackupAndRestore(backup, save_freq=1), steps_per_execution=5
    )
    assert rest.batches == [(1, 14), (2, 4), (2, 9), (2, 14)]
    assert fit_gan.digest(gan) == fit_gan.digest(whole)


class Hoarder(keras.Model):
    """Holds its state where nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [keras.layers.Dense(4), {"dense": keras.layers.Dense(2)}]
        self.noise = keras.layers.GaussianNoise(0.1)
        self.counts = [tf.Variable(0.0), {"inner": tf.Variable(0.0)}]

    def compile(self, **options: Any) -> None:
        super().compile(jit_compile=False, **options)
        self.optimizers = {
            "first": keras.optimizers.Adam(),
            "others": [keras.optimizers.SGD(momentum=0.9, nesterov=True)],
        }

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        noisy = self.noise(inputs, training=training)
        return self.parts[1]["dense"](self.parts[0](noisy))

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        inputs = data[0] + keras.random.normal(tf.shape(data[0]))
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean(tf.square(self(inputs, training=True)))
        for optimizer, part in (
            (self.optimizers["first"], self.parts[0]),
            (self.optimizers["others"][0], self.parts[1]["dense"]),
        ):
            weights = part.trainable_weights
            optimizer.apply(tape.gradient(loss, weights), weights)
        self.counts[0].assign_add(loss)
        self.counts[1]["inner"].assign_add(1.0)
        return {"loss": self.counts[0] + self.counts[1]["inner"]}


def plain() -> keras.Model:
    """Not built before its first batch, with metrics and half floats."""
    model = keras.Sequential(
        [
            keras.layers.Dense(4, dtype="mixed_float16"),
            keras.layers.Dropout(0.5),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(use_ema=True), dynamic_growth_steps=3
    )
    model.compile(optimizer, "mse", metrics=["mae"], jit_compile=False)
    return model


def hoarder() -> keras.Model:
    model = Hoarder()
    model.compile()
    return model


@pytest.mark.parametrize("make", [plain, hoarder])
def test_all_that_a_model_holds(make: Any, tmp_path: pathlib.Path) -> None:
    """Optimizers in lists, seeds of nobody, metrics, and an evaluation."""
    numbers = np.random.default_rng(1).normal(size=(48, 3)).astype("float32")

    def run(cut_after: int | None) -> tuple[Any, small_fit.Watch]:
        # And with it Keras' own generator of seeds, as in a new process.
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        model = make()
        watch = small_fit.Watch(cut_after)
        data = tf.data.Dataset.from_tensor_slices((numbers, numbers[:, :1]))
        validation = data.batch(16) if make is plain else None
        with contextlib.suppress(small_fit.CutError):
            model.fit(
                data.shuffle(48, seed=1).batch(8),
                epochs=3,
                validation_data=validation,
                callbacks=[dtrain.BackupAndRestore(tmp_path, 1), watch],
                verbose=0,
            )
        return model, watch

    whole, watched = run(None)
    run(9)
    model, rest = run(None)
    assert rest.batches[0] == (1, 3)
    assert rest.epochs == {e: watched.epochs[e] for e in (1, 2)}
    for mine, its in zip(model.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(mine, its)


def test_damaged_backup_falls_back(tmp_path: pathlib.Path) -> None:
    whole, _ = fit(epochs=1)
    # What waits for the disk is replaced by what is newer, so two are written
    # for certain where each is waited for.
    for _ in range(2):
        fit(dtrain.BackupAndRestore(tmp_path, 4), cut_after=5, epochs=1)
        small_fit.settle()
    assert small_fit.saved_steps(tmp_path) == [4, 8]
    flip_a_bit(tmp_path / "ckpt-8.data-00000-of-00001")
    with pytest.warns(UserWarning, match=r"ckpt-8 does not verify.*moved to"):
        gan, rest = fit(
            dtrain.BackupAndRestore(tmp_path, 2, delete_checkpoint=False),
            epochs=1,
        )
    assert rest.batches[0] == (0, 4)
    assert fit_gan.digest(gan) == fit_gan.digest(whole)
    assert (tmp_path / "quarantine/ckpt-8/reason.txt").exists()


def test_never_starts_over_by_itself(tmp_path: pathlib.Path) -> None:
    fit(dtrain.BackupAndRestore(tmp_path, 2), cut_after=5, epochs=1)
    small_fit.settle()
    for path in tmp_path.glob("ckpt-*.index"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.UserError, match="none of them can be used"):
        fit(dtrain.BackupAndRestore(tmp_path, 2), epochs=1)


def test_what_does_not_fit_is_refused(tmp_path: pathlib.Path) -> None:
    """With the edit that would repair it, and nothing is touched."""
    fit(dtrain.BackupAndRestore(tmp_path, 1), cut_after=3)
    small_fit.settle()
    there = small_fit.saved_steps(tmp_path)
    with pytest.raises(errors.UserError) as raised:
        fit(dtrain.BackupAndRestore(tmp_path, 1), width=8)
    first, *details = str(raised.value).splitlines()
    assert "does not fit this model: " in first
    assert any("[64, 16]" in line for line in details), details
    assert len(details) <= 24
    with (
        pytest.raises(errors.UserError, match="at batch 3 of 12, and an epoch"),
        mock.patch.object(fit_gan, "BATCH", 16),
    ):
        fit(dtrain.BackupAndRestore(tmp_path, 1))
    assert small_fit.saved_steps(tmp_path) == there
    _, rest = fit(dtrain.BackupAndRestore(tmp_path, 1))
    assert rest.batches[0] == (0, 3)


def test_directory_in_use_is_refused(tmp_path: pathlib.Path) -> None:
    with (
        claim.claim(str(tmp_path)),
        pytest.raises(errors.UserError, match="this process saves"),
    ):
        fit(dtrain.BackupAndRestore(tmp_path))
    # What is refused holds on to nothing.
    assert not saving._OPEN
    fit(dtrain.BackupAndRestore(tmp_path), epochs=1)


def test_finished_fit_that_keeps_its_backup_goes_on(
    tmp_path: pathlib.Path,
) -> None:
    whole, _ = fit(epochs=2)
    gan, _ = fit(
        dtrain.BackupAndRestore(tmp_path, delete_checkpoint=False), epochs=1
    )
    # Stock TensorFlow reads it.
    other = fit_gan.make_gan()
    newest = tf.train.latest_checkpoint(str(tmp_path))
    status = tf.train.Checkpoint(model=other).restore(newest)
    other.build_optimizers()
    status.assert_existing_objects_matched()
    for mine, its in zip(
        [*other.discriminator.weights, *other.d_optimizer.variables],
        [*gan.discriminator.weights, *gan.d_optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(mine, its)
    backup = dtrain.BackupAndRestore(tmp_path)
    gan, rest = fit(backup, epochs=2)
    assert rest.batches[0] == (1, 0)
    assert fit_gan.digest(gan) == fit_gan.digest(whole)
    # The next `fit` of the model is another one.
    watch = small_fit.Watch()
    gan.fit(fit_gan.make_dataset(), callbacks=[backup, watch], verbose=0)
    assert watch.batches[0] == (0, 0)


def test_history_is_kept(tmp_path: pathlib.Path) -> None:
    whole, watched = fit(epochs=6)
    losses = {e: logs["d_loss"] for e, logs in watched.epochs.items()}
    best = min(losses, key=lambda epoch: losses[epoch])

    def history() -> dtrain.CheckpointManagerCallback:
        return dtrain.CheckpointManagerCallback(
            tmp_path,
            policies=[
                retention.Last(2),
                retention.Best(1, "d_loss"),
                retention.Pinned([2 * NUM_BATCHES]),
            ],
        )

    fit(history(), cut_after=3 * NUM_BATCHES + 5, epochs=6)
    gan, rest = fit(history(), epochs=6)
    assert rest.batches[0] == (3, 0)
    assert fit_gan.digest(gan) == fit_gan.digest(whole)
    epochs = {2, 5, 6, best + 1}
    assert small_fit.saved_steps(tmp_path) == sorted(
        NUM_BATCHES * e for e in epochs
    )


def test_both_tiers_go_on_from_the_newest(tmp_path: pathlib.Path) -> None:
    def tiers() -> list[keras.callbacks.Callback]:
        return [
            dtrain.CheckpointManagerCallback(tmp_path / "history", 5),
            dtrain.BackupAndRestore(tmp_path / "backup", 2),
        ]

    whole, _ = fit(epochs=1)
    fit(*tiers(), cut_after=9, epochs=1)
    _, rest = fit(*tiers(), cut_after=3, epochs=1)
    assert rest.batches[0] == (0, 8)
    gan, rest = fit(*tiers(), epochs=1)
    assert rest.batches[0] == (0, 10)
    assert fit_gan.digest(gan) == fit_gan.digest(whole)
    # Every fifth, and the last whatever its number.
    assert small_fit.saved_steps(tmp_path / "history") == [5, 10, 12]
    with pytest.raises(errors.UserError, match="directory of 2 callbacks"):
        fit(
            dtrain.BackupAndRestore(tmp_path / "same"),
            dtrain.BackupAndRestore(tmp_path / "same"),
        )


def test_metric_that_is_not_there_is_refused(tmp_path: pathlib.Path) -> None:
    policies = [retention.Best(1, "val_loss")]
    with pytest.raises(errors.UserError, match="there: d_loss, g_loss"):
        fit(dtrain.CheckpointManagerCallback(tmp_path, policies=policies))


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    def fail(path: str, data: bytes) -> None:
        del path, data
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(files, "write", fail):
        yield


def test_save_that_fails(tmp_path: pathlib.Path) -> None:
    fit(dtrain.BackupAndRestore(tmp_path, 2), cut_after=5, epochs=1)
    small_fit.settle()
    there = small_fit.saved_steps(tmp_path)
    with full_disk():
        with pytest.raises(errors.StorageError, match="No space left"):
            # Deleted at the end, it could not matter then.
            fit(
                dtrain.BackupAndRestore(
                    tmp_path,
                    save_freq=1,
                    delete_checkpoint=False,
                    on_save_error="stop",
                ),
                epochs=1,
            )
        assert small_fit.saved_steps(tmp_path) == there
        with pytest.warns(UserWarning, match="No space left.*training goes on"):
            _, rest = fit(dtrain.BackupAndRestore(tmp_path, 1), epochs=4)
        assert rest.batches[-1] == (3, NUM_BATCHES - 1)
        # What is to stay, and does not, is an error in any case.
        with pytest.raises(errors.StorageError, match="No space left"):
            fit(dtrain.CheckpointManagerCallback(tmp_path), epochs=1)


def test_arguments_are_those_of_keras(tmp_path: pathlib.Path) -> None:
    ours, stock = (
        list(inspect.signature(each).parameters.values())
        for each in (
            dtrain.BackupAndRestore,
            keras.callbacks.BackupAndRestore,
        )
    )
    for mine, its in zip(ours, stock, strict=False):
        assert (mine.name, mine.default) == (its.name, its.default)
    assert all(each.kind == each.KEYWORD_ONLY for each in ours[len(stock) :])
    for options in (
        {"save_freq": 0},
        {"save_freq": False},
        {"save_freq": "batch"},
        {"verify": "never"},
        {"on_save_error": "hope"},
        {"backup_dir": ""},
        {"backup_dir": None},
        {"backup_dir": 3},
    ):
        with pytest.raises(errors.UserError, match=r"must be .*; try ") as it:
            dtrain.BackupAndRestore(**{"backup_dir": tmp_path, **options})
        assert "\n" not in str(it.value)


def test_only_in_fit(tmp_path: pathlib.Path) -> None:
    callback = dtrain.BackupAndRestore(tmp_path)
    gan = fit_gan.make_gan()
    tiers = keras.callbacks.CallbackList([callback], model=gan)
    with pytest.raises(errors.UserError, match="in the fit of a Keras model"):
        tiers.on_train_begin()


def test_import_brings_no_tensorflow() -> None:
    code = (
        "import sys, dtrain; assert 'tensorflow' not in sys.modules; "
        "from dtrain import BackupAndRestore; "
        "assert BackupAndRestore.__module__ == 'dtrain.checkpoint.callbacks'"
    )
    subprocess.run(
        [sys.executable, "-c", code], env=runs.environment(), check=True
    )
    with pytest.raises(AttributeError, match="no attribute 'Backup'"):
        _ = dtrain.Backup


def result(directory: pathlib.Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())


def test_a_fit_that_is_told_to_end(tmp_path: pathlib.Path) -> None:
    """It saves the batch that it is at, whatever it was to save."""
    number, flags = signal.SIGHUP, ["--save_freq=1000", "--epochs=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for place in (whole, cut):
        place.mkdir()
    code, output = runs.run("tests.fit_gan", str(whole), *flags)
    assert code == 0, output
    process = runs.start("tests.fit_gan", str(cut), *flags, "--batch_secs=0.1")
    while not (cut / "progress").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    said = f"fit was stopped by {number.name} and saved after batch"
    assert said in output
    code, output = runs.run("tests.fit_gan", str(cut), *flags)
    assert code == 0, output
    assert "fit goes on from" in output
    assert result(cut)["sha256"] == result(whole)["sha256"]


def test_nothing_saves_before_a_notice_is_heard() -> None:
    with pytest.raises(errors.UserError, match="put it last"):
        fit_gan.make_gan().fit(
            fit_gan.make_dataset(), callbacks=[dtrain.StopOnNotice()], verbose=0
        )


def test_killed_fit_ends_with_the_same_bits(
    tmp_path: pathlib.Path, chance: random.Random
) -> None:
    """Two replicas, real processes, SIGKILL at random instants.

    The long form kills 20 times: DTRAIN_NUM_KILLS=20.
    """
    num_kills = int(os.environ.get("DTRAIN_NUM_KILLS", "2"))
    flags = ["--mirrored", "--save_freq=1", f"--epochs={4 * num_kills + 4}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    backup = str(cut / "backup")
    code, output = runs.run("tests.fit_gan", str(whole), *flags)
    assert code == 0, output

    for kill in range(num_kills):
        progress = cut / "progress"
        progress.unlink(missing_ok=True)
        process = runs.start("tests.fit_gan", str(cut), *flags)
        # On a busy machine a kill may come before anything is saved; the last
        # one does not, so that there is something to go on from.
        is_last = kill == num_kills - 1
        while process.poll() is None and not (
            progress.exists() and (listing.newest(backup) or not is_last)
        ):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.0))
        assert process.poll() is None, runs.finish(process)
        process.send_signal(signal.SIGKILL)
        code, output = runs.finish(process)
        assert code == -signal.SIGKILL, output
        print(f"kill {kill + 1}: {listing.newest(backup)} {output[-200:]}")
    code, output = runs.run("tests.fit_gan", str(cut), *flags)
    assert code == 0, output
    assert "fit goes on from" in output
    assert result(cut)["sha256"] == result(whole)["sha256"]
    losses = result(cut)["logs"]["d_loss"]
    assert losses == result(whole)["logs"]["d_loss"][-len(losses) :]
