"""What Keras tests of `BackupAndRestore`, and what people report of it.

`docs/callbacks.md` has a table of what is other than there.
"""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import keras
import numpy as np
import pytest

import dtrain
from tests import callbacks_test

layers = keras.layers
CutError, Watch = callbacks_test.CutError, callbacks_test.Watch
NUM_BATCHES = 3


class Canary(layers.Layer):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = self.add_weight(
            shape=(), initializer="zeros", trainable=False
        )

    def call(self, inputs: Any) -> Any:
        self.counter.assign_add(1.0)
        return inputs


def canary() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), Canary(), layers.Dense(1)])


def unbuilt() -> keras.Model:
    return keras.Sequential([Canary(), layers.Dense(1)])


class Subclassed(keras.Model):
    """Has a `fit` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.canary, self.dense = Canary(), layers.Dense(1)

    def call(self, inputs: Any) -> Any:
        return self.dense(self.canary(inputs))

    def fit(self, *arguments: Any, **options: Any) -> Any:
        return super().fit(*arguments, **options)


def run(
    model: keras.Model,
    *tiers: keras.callbacks.Callback,
    optimizer: Any = "sgd",
    cut_after: int | None = None,
    epochs: int = 5,
    x: np.ndarray | None = None,
    **options: Any,
) -> tuple[keras.Model, keras.callbacks.History]:
    keras.utils.set_random_seed(1)
    model.compile(optimizer, "mse", metrics=["mse"], jit_compile=False)
    data = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
    with contextlib.suppress(CutError):
        model.fit(
            data[:, :3] if x is None else x,
            data[:, 3:],
            batch_size=4,
            epochs=epochs,
            shuffle=False,
            callbacks=[*tiers, Watch(cut_after)],
            verbose=0,
            **options,
        )
    return model, model.history


def count(model: keras.Model) -> int:
    [layer] = [each for each in model.layers if isinstance(each, Canary)]
    return int(layer.counter)


@pytest.mark.parametrize("make", [canary, unbuilt, Subclassed])
@pytest.mark.parametrize(
    ("save_freq", "cut_after", "first_epoch"), [("epoch", 7, 2), (1, 2, 0)]
)
def test_the_best_case(
    make: Any,
    save_freq: Any,
    cut_after: int,
    first_epoch: int,
    tmp_path: pathlib.Path,
) -> None:
    """No batch is lost, and none is trained twice."""
    callback = dtrain.BackupAndRestore(tmp_path / "subdir", save_freq)
    model, _ = run(make(), callback, cut_after=cut_after)
    assert (tmp_path / "subdir").exists()
    # With the objects of the first, as in Keras' test.
    model, history = run(model, callback)
    assert history.epoch == list(range(first_epoch, 5))
    assert len(history.history["loss"]) == len(history.epoch)
    assert count(model) == 5 * NUM_BATCHES
    # The backup is deleted: it was finished.
    assert not (tmp_path / "subdir").exists()


def test_the_newest_is_corrupted(tmp_path: pathlib.Path) -> None:
    callback = dtrain.BackupAndRestore(tmp_path, double_checkpoint=True)
    run(canary(), callback, cut_after=7)
    callback.close()
    [*_, newest] = sorted(tmp_path.glob("ckpt-*.data-*"))
    newest.write_bytes(b"0")
    with pytest.warns(UserWarning, match="does not verify"):
        model, history = run(canary(), callback)
    assert history.epoch == [1, 2, 3, 4]
    assert count(model) == 5 * NUM_BATCHES


OPTIMIZERS = {
    "averages": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(1e-2, 20),
        use_ema=True,
        ema_overwrite_frequency=3,
    ),
    "accumulation": lambda: keras.optimizers.AdamW(
        1e-2, clipnorm=1.0, gradient_accumulation_steps=4
    ),
    "scheduler": lambda: keras.optimizers.SGD(1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_an_optimizer_counts(
    optimizer: str, tmp_path: pathlib.Path
) -> None:
    def others() -> list[keras.callbacks.Callback]:
        schedule = keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: rate / (1 + epoch)
        )
        return [schedule] if optimizer == "scheduler" else []

    make = OPTIMIZERS[optimizer]
    whole, _ = run(canary(), *others(), optimizer=make())
    with dtrain.BackupAndRestore(tmp_path, 1) as callback:
        run(canary(), *others(), callback, optimizer=make(), cut_after=8)
    model, _ = run(canary(), *others(), callback, optimizer=make())
    for mine, its in zip(
        [*model.weights, *model.optimizer.variables],
        [*whole.weights, *whole.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("raise_error", [False, True])
def test_an_end_by_a_nan(raise_error: bool, tmp_path: pathlib.Path) -> None:
    """What was good stays, unless `fit` says that it is finished."""
    x = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")
    with dtrain.BackupAndRestore(tmp_path / "backup") as backup:
        run(canary(), backup, x=x, cut_after=4)
    x[5] = np.nan
    end = keras.callbacks.TerminateOnNaN(raise_error=raise_error)
    with (
        pytest.raises(RuntimeError, match="NaN")
        if raise_error
        else contextlib.nullcontext(),
        backup,
    ):
        run(canary(), end, backup, x=x)
    assert (tmp_path / "backup").exists() == raise_error
    x[5] = 0.0
    _, history = run(canary(), backup, x=x)
    assert history.epoch[0] == (1 if raise_error else 0)
    assert np.isfinite(history.history["loss"]).all()


def test_a_list_of_callbacks_that_is_made_before(
    tmp_path: pathlib.Path,
) -> None:
    model = canary()
    model.compile("sgd", "mse", jit_compile=False)
    tiers = keras.callbacks.CallbackList(
        [dtrain.BackupAndRestore(tmp_path)],
        add_history=True,
        model=model,
        epochs=2,
        steps=1,
    )
    x = np.zeros((4, 3), "float32")
    history = model.fit(x, x[:, :1], epochs=2, verbose=0, callbacks=tiers)
    assert history.epoch == [0, 1]
