"""A `fit` that takes no time, and what cuts it."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import keras
import numpy as np

import dtrain
from dtrain.checkpoint import saving

NUM_BATCHES = 5
KINDS = (dtrain.BackupAndRestore, dtrain.CheckpointManagerCallback)


class CutError(Exception):
    """Ends a `fit` without a word to its callbacks."""


class Watch(keras.callbacks.Callback):
    """Notes what was run, and may end it."""

    def __init__(self, cut_after: int | None = None) -> None:
        super().__init__()
        self.cut_after = cut_after
        self.batches: list[tuple[int, int]] = []
        self.epochs: dict[int, dict[str, float]] = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        self.batches.append((self.epoch, batch))
        if len(self.batches) == self.cut_after:
            raise CutError

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs[epoch] = dict(logs)


def settle() -> None:
    """Waits for what a cut `fit` is still writing."""
    while saving._OPEN:
        saving._OPEN.popitem()[1].close()


def saved_steps(directory: pathlib.Path) -> list[int]:
    return sorted(int(each.stem[5:]) for each in directory.glob("ckpt-*.json"))


def make_data() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    return x, x.sum(1, keepdims=True)


def make(optimizer: Any = "sgd", *before: keras.layers.Layer) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((3,)), *before, keras.layers.Dense(1)]
    )
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def fit(
    model: keras.Model,
    *tiers: keras.callbacks.Callback,
    cut_after: int | None = None,
    epochs: int = 3,
    data: Any = None,
) -> Watch:
    x, y = make_data() if data is None else data
    watch = Watch(cut_after)
    with contextlib.suppress(CutError):
        model.fit(
            x,
            y,
            batch_size=4,
            shuffle=False,
            epochs=epochs,
            callbacks=[*tiers, watch],
            verbose=0,
        )
    return watch
