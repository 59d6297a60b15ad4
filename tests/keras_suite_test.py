"""What Keras tests of `BackupAndRestore`, and what people report of it.

`docs/callbacks.md` has a table of what is other than there.
"""

from __future__ import annotations

import contextlib
import copy
import pathlib
import warnings
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import dtrain
from dtrain import errors
from dtrain.checkpoint import saving
from dtrain.storage import claim
from tests import small_fit

layers = keras.layers
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
    x: Any = None,
    **options: Any,
) -> tuple[keras.Model, keras.callbacks.History]:
    keras.utils.set_random_seed(1)
    model.compile(optimizer, "mse", metrics=["mse"], jit_compile=False)
    data = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
    with contextlib.suppress(small_fit.CutError):
        model.fit(
            data[:, :3] if x is None else x,
            data[:, 3:],
            batch_size=4,
            epochs=epochs,
            shuffle=False,
            callbacks=[*tiers, small_fit.Watch(cut_after)],
            verbose=0,
            **options,
        )
    return model, model.history


def count(model: keras.Model) -> int:
    [layer] = [each for each in model.layers if isinstance(each, Canary)]
    return int(layer.counter)


@pytest.mark.parametrize(
    ("make", "save_freq", "cut_after", "first_epoch"),
    [(canary, 1, 2, 0), (unbuilt, "epoch", 7, 2), (Subclassed, "epoch", 7, 2)],
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
    "accumulation": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(1e-2, 20),
        clipnorm=1.0,
        gradient_accumulation_steps=4,
        use_ema=True,
        ema_overwrite_frequency=3,
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


@pytest.mark.parametrize("kind", small_fit.KINDS)
def test_an_optimizer_without_slots(kind: Any, tmp_path: pathlib.Path) -> None:
    """Its first step changes what leads where, and makes no variable."""
    whole = small_fit.make("sgd")
    small_fit.fit(whole)
    for num in (4, 7, None):
        watch = small_fit.fit(
            model := small_fit.make("sgd"), kind(tmp_path, 1), cut_after=num
        )
        small_fit.settle()
    # The second was cut at batch 4 + 7, the third did what was left.
    assert (
        watch.batches == [(2, 1), (2, 2), (2, 3), (2, 4)][-len(watch.batches) :]
    )
    for mine, its in zip(
        [*model.weights, *model.optimizer.variables],
        [*whole.weights, *whole.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("kind", small_fit.KINDS)
def test_a_nan_in_the_first_epoch(kind: Any, tmp_path: pathlib.Path) -> None:
    """It is no state to go on from, and the `fit` after it starts anew."""
    x, y = small_fit.make_data()
    x[9] = np.nan
    told: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        small_fit.fit(
            small_fit.make(), kind(tmp_path), data=(x, y), cut_after=2 * 5 + 2
        )
    try:
        small_fit.settle()
    except OSError as error:
        # It was cut while the first save was still being written.
        told.append(str(error))
    told += [str(warning.message) for warning in warned]
    assert "that are not finite" in "".join(told)
    assert small_fit.saved_steps(tmp_path) == []
    model = small_fit.make()
    assert small_fit.fit(model, kind(tmp_path)).batches[0] == (0, 0)
    assert np.isfinite(model.get_weights()[0]).all()


WORDS = np.array([["a"], ["b"], ["a"], ["c"], ["d"]] * 2)
LEARNED: dict[str, tuple[Any, np.ndarray]] = {
    "padded": (
        lambda: layers.TextVectorization(
            6, output_mode="tf_idf", pad_to_max_tokens=True
        ),
        WORDS,
    ),
    "weights": (lambda: layers.TextVectorization(output_mode="tf_idf"), WORDS),
    "counts": (lambda: layers.StringLookup(output_mode="count"), WORDS),
    "bins": (
        lambda: layers.Discretization(num_bins=3, output_mode="one_hot"),
        np.arange(10, dtype="float32").reshape(10, 1),
    ),
}


class Reading(keras.Model):
    """Has no `Input`, whose shape would have to be known before."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.dense = layer, layers.Dense(1)

    def call(self, inputs: Any) -> Any:
        return self.dense(self.layer(inputs))


@pytest.mark.parametrize("kind", LEARNED)
def test_a_layer_that_was_adapted_before_the_weights_were_made(
    kind: str, tmp_path: pathlib.Path
) -> None:
    """Nothing has variables until what was learned tells their shapes."""
    make_layer, data = LEARNED[kind]

    def make_model(is_adapted: bool) -> keras.Model:
        keras.utils.set_random_seed(1)
        layer = make_layer()
        if is_adapted:
            layer.adapt(data)
        if kind != "padded":
            return Reading(layer)
        text = keras.Input((1,), dtype="string")
        return keras.Model(text, layers.Dense(1)(layer(text)))

    x = tf.constant(data)
    whole, _ = run(make_model(is_adapted=True), x=x, epochs=2)
    backup = dtrain.BackupAndRestore(tmp_path, 1)
    run(make_model(is_adapted=True), backup, x=x, epochs=2, cut_after=4)
    small_fit.settle()
    again = dtrain.BackupAndRestore(tmp_path, 1)
    model, history = run(make_model(is_adapted=False), again, x=x, epochs=2)
    assert history.epoch == [1]
    np.testing.assert_array_equal(model(x), whole(x))


def test_a_layer_that_is_not_adapted_again(tmp_path: pathlib.Path) -> None:
    def make_model(is_adapted: bool) -> tuple[keras.Model, Any]:
        layer = keras.layers.Normalization()
        layer.build((None, 3))
        if is_adapted:
            layer.adapt(small_fit.make_data()[0] * 3 + 5)
        return small_fit.make("sgd", layer), layer

    whole, _ = make_model(is_adapted=True)
    small_fit.fit(whole)
    model, first = make_model(is_adapted=True)
    small_fit.fit(model, dtrain.BackupAndRestore(tmp_path, 1), cut_after=7)
    model, second = make_model(is_adapted=False)
    watch = small_fit.fit(model, dtrain.BackupAndRestore(tmp_path, 1))
    assert watch.batches[0][0] == 1
    np.testing.assert_array_equal(second.mean, first.mean)
    for mine, its in zip(model.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(mine, its)


def test_close_lets_another_process_have_the_directory(
    tmp_path: pathlib.Path,
) -> None:
    """As after a cell of a notebook that was interrupted."""
    backup = dtrain.BackupAndRestore(tmp_path, 1)
    small_fit.fit(small_fit.make(), backup, cut_after=7)
    with (
        pytest.raises(errors.UserError, match="this process saves"),
        claim.claim(str(tmp_path)),
    ):
        pass
    backup.close()
    backup.close()
    with claim.claim(str(tmp_path)):
        assert small_fit.saved_steps(tmp_path)[-1] == 7
    with dtrain.BackupAndRestore(tmp_path, 1) as backup:
        watch = small_fit.fit(small_fit.make(), backup, cut_after=3)
        assert watch.batches[0] == (1, 2)
    with claim.claim(str(tmp_path)):
        pass


@pytest.mark.parametrize("is_same_process", [True, False])
def test_the_directory_of_a_fit_that_has_ended(
    is_same_process: bool, tmp_path: pathlib.Path
) -> None:
    """As of the fold before: its model is not taken for this one's."""
    small_fit.fit(small_fit.make(), dtrain.CheckpointManagerCallback(tmp_path))
    if not is_same_process:
        saving._FINISHED.clear()
    text = "end of a fit of 3 epochs: .*; name another directory for another"
    callback = dtrain.CheckpointManagerCallback(tmp_path)
    if is_same_process:
        with pytest.raises(errors.UserError, match=text):
            small_fit.fit(small_fit.make(), callback)
        with pytest.warns(UserWarning, match=text):
            watch = small_fit.fit(small_fit.make(), callback, epochs=4)
        assert [epoch for epoch, _ in watch.batches] == [
            3
        ] * small_fit.NUM_BATCHES
    else:
        with pytest.warns(UserWarning, match=text):
            watch = small_fit.fit(model := small_fit.make(), callback)
        assert watch.batches == []
        # The same model is the same fit: nobody is to be warned of it.
        watch = small_fit.fit(model, callback, epochs=4)
        assert len(watch.batches) == small_fit.NUM_BATCHES


@pytest.mark.parametrize("kind", small_fit.KINDS)
def test_a_copy_of_a_callback(kind: Any, tmp_path: pathlib.Path) -> None:
    """As KerasTuner makes one for each trial, of one that was used."""
    callback = kind(tmp_path, 1)
    small_fit.fit(small_fit.make(), callback, cut_after=7)
    small_fit.settle()
    there = small_fit.saved_steps(tmp_path)
    twin = copy.deepcopy([callback, dtrain.StopOnNotice()])[0]
    assert twin.directory.path == str(tmp_path)
    assert small_fit.fit(small_fit.make(), twin).batches[0] == divmod(
        there[-1], 5
    )


class Shuffled(keras.utils.PyDataset):
    """Has another order in each epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.chance = np.random.default_rng(3)
        self.order = np.arange(small_fit.NUM_BATCHES)

    def __len__(self) -> int:
        return small_fit.NUM_BATCHES

    def __getitem__(self, index: int) -> Any:
        number = self.order[index]
        x, y = small_fit.make_data()
        return x[4 * number :][:4], y[4 * number :][:4]

    def on_epoch_end(self) -> None:
        self.chance.shuffle(self.order)


@pytest.mark.parametrize(("workers", "shuffle"), [(1, True), (3, False)])
def test_a_dataset_of_python(
    workers: int, shuffle: bool, tmp_path: pathlib.Path
) -> None:
    def run(
        *tiers: Any, cut_after: int | None = None
    ) -> tuple[Any, small_fit.Watch]:
        model, watch = small_fit.make(), small_fit.Watch(cut_after)
        with contextlib.suppress(small_fit.CutError):
            model.fit(
                Shuffled(workers=workers),
                epochs=4,
                shuffle=shuffle,
                callbacks=[*tiers, watch],
                verbose=0,
            )
        return model.get_weights(), watch

    whole, _ = run()
    for cut_after in (7, 6):
        run(dtrain.BackupAndRestore(tmp_path, 1), cut_after=cut_after)
        small_fit.settle()
    weights, watch = run(dtrain.BackupAndRestore(tmp_path, 1))
    assert watch.batches[0][0] == 2
    np.testing.assert_equal(weights, whole)
