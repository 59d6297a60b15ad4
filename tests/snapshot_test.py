"""A snapshot is what a stock save would have written at that moment."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain.bundle import keras_state, writer
from dtrain.checkpoint import background as background_lib
from dtrain.checkpoint import snapshot
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.errors import UserError
from tests import replicas


class Model:
    """A Keras 3 model, its optimizer, a seed, and variables of TensorFlow's."""

    def __init__(self, num_replicas: int) -> None:
        self.strategy = replicas.mirrored(num_replicas)
        with self.strategy.scope():
            self.network = keras.Sequential(
                [
                    keras.Input((8,)),
                    keras.layers.Dense(16),
                    keras.layers.BatchNormalization(),
                    keras.layers.Dropout(0.5),
                    keras.layers.Dense(1),
                ]
            )
            self.optimizer = keras.optimizers.Adam(0.1)
            self.optimizer.build(self.network.trainable_variables)
            self.step = tf.Variable(
                0,
                dtype=tf.int64,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
        self.names = tf.Variable([b"zero", b"one"])
        parts: dict[str, Any] = {
            "network": self.network,
            "optimizer": self.optimizer,
        }
        untracked = keras_state.untracked(parts)
        assert len(untracked) == 1, "that of the Dropout"
        self.checkpoint = tf.train.Checkpoint(
            **parts,
            step=self.step,
            names=self.names,
            nested=tf.train.Checkpoint(half=tf.Variable([1.5], tf.float16)),
            untracked=tf.train.Checkpoint(**untracked),
        )

    @tf.function
    def train(self) -> None:
        images = tf.random.stateless_normal([8, 8], [1, 2])

        def of_replica() -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.network(images, training=True) ** 2)
            variables = self.network.trainable_variables
            self.optimizer.apply_gradients(
                zip(tape.gradient(loss, variables), variables, strict=True)
            )

        self.strategy.run(of_replica)
        self.step.assign_add(1)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 replica", "2 replicas"])
def model(request: pytest.FixtureRequest) -> Model:
    made = Model(request.param)
    made.train()
    return made


def tensors(prefix: str) -> dict[str, bytes]:
    reader = tf.train.load_checkpoint(prefix)
    return {
        key: np.asarray(reader.get_tensor(key)).tobytes()
        if key != "names/.ATTRIBUTES/VARIABLE_VALUE"
        else b" ".join(reader.get_tensor(key))
        for key in reader.get_variable_to_shape_map()
    }


def test_the_bytes_of_a_stock_save(
    model: Model, tmp_path: pathlib.Path
) -> None:
    taker = snapshot.SnapshotTaker(model.checkpoint)
    model.checkpoint.save_counter.assign(7)
    taker.take(7).write(f"{tmp_path}/ours")
    model.checkpoint.write(f"{tmp_path}/stock")
    assert tensors(f"{tmp_path}/ours") == tensors(f"{tmp_path}/stock")
    data = ".data-00000-of-00001"
    assert (tmp_path / f"ours{data}").read_bytes() == (
        tmp_path / f"stock{data}"
    ).read_bytes()
    status = model.checkpoint.restore(f"{tmp_path}/ours")
    status.assert_consumed().assert_existing_objects_matched()


def test_written_while_training_goes_on_100_times(
    model: Model, tmp_path: pathlib.Path
) -> None:
    """100 of 100 are what they were when they were taken."""
    taker = snapshot.SnapshotTaker(model.checkpoint)
    directory = CheckpointDirectory(str(tmp_path / "asynchronous"))
    background = background_lib.Writer()
    for number in range(100):
        taken = taker.take(number)
        background.submit(
            lambda number=number, taken=taken: directory.commit(number, taken),
            keep=True,
        )
        taker.take(number).write(f"{tmp_path}/sync-{number}")
        for _ in range(3):
            model.train()
    background.close()
    for number in range(100):
        for suffix in ("index", "data-00000-of-00001"):
            asynchronous = f"{directory.prefix(number)}.{suffix}"
            synchronous = f"{tmp_path}/sync-{number}.{suffix}"
            assert (
                pathlib.Path(asynchronous).read_bytes()
                == pathlib.Path(synchronous).read_bytes()
            )
    assert directory.verify(99)
    steps = [
        tf.train.load_checkpoint(directory.prefix(number)).get_tensor(
            "step/.ATTRIBUTES/VARIABLE_VALUE"
        )
        for number in range(100)
    ]
    assert np.diff(steps).tolist() == [3] * 99


def test_a_large_one_is_written_in_parts(
    model: Model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor is, here, and all are what one file would have."""
    taken = snapshot.SnapshotTaker(model.checkpoint).take(7)
    whole = taken.write(f"{tmp_path}/whole")
    monkeypatch.setattr(writer, "_PART_BYTES", 1)
    monkeypatch.setattr(writer, "_MAX_PARTS", 10**6)
    directory = CheckpointDirectory(str(tmp_path / "parts"))
    manifest = directory.commit(7, taken)
    # Those of strings are of no known size.
    assert len(manifest.sizes) > len(taken.keys) / 2
    assert manifest.tensors == whole
    prefix = directory.prefix(7)
    assert tensors(prefix) == tensors(f"{tmp_path}/whole")
    assert directory.verify(7) == manifest
    status = model.checkpoint.restore(prefix)
    status.assert_consumed().assert_existing_objects_matched()
    assert not [name for name in os.listdir(directory.path) if "part" in name]


def test_the_numbers_of_saves_stay_nowhere() -> None:
    """TensorFlow keeps each Python number that it makes a tensor of: 0.7 kB."""
    counter = tf.constant(0, tf.int64)

    def take(steps: range) -> None:
        for step in steps:
            taken = snapshot.Snapshot(
                (snapshot._SAVE_COUNTER,), [counter], b"graph", step
            )
            [(_, saved), _] = taken._on_host()
            assert saved.numpy() == step

    def resident_bytes() -> int:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def growth_bytes(first: int) -> int:
        before = resident_bytes()
        take(range(first, first + 20_000))
        return resident_bytes() - before

    take(range(1_000_000, 1_002_000))
    # What else this process holds may grow meanwhile; a leak is in each.
    assert min(growth_bytes(n * 1_000_000) for n in (2, 3, 4)) < 5e6


def test_an_on_read_variable_is_refused_by_name() -> None:
    strategy = replicas.mirrored(2)
    with strategy.scope():
        count = tf.Variable(
            0.0,
            name="seen_images",
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )
    with pytest.raises(UserError, match=r"seen_images.*ON_READ"):
        snapshot.SnapshotTaker(tf.train.Checkpoint(count=count))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_large_is_finite(dtype: str, tmp_path: pathlib.Path) -> None:
    """Though a sum of it, in its own dtype, is not."""
    state = tf.train.Checkpoint(
        weights=tf.Variable(tf.fill([9], tf.as_dtype(dtype).max / 4))
    )
    taker = snapshot.SnapshotTaker(state)
    taker.take(1).write(f"{tmp_path}/1")
    for value in (np.inf, -np.inf, np.nan):
        state.weights[:1].assign(tf.cast([value], dtype))
        with pytest.raises(OSError, match="weights holds numbers that are not"):
            taker.take(2).write(f"{tmp_path}/2")


@pytest.mark.parametrize("late", ["weights", "made later"])
def test_a_nan_is_no_beginning(late: str, tmp_path: pathlib.Path) -> None:
    """An infinity is, as that of a mask; also in what is made later."""
    state = tf.train.Checkpoint(
        weights=tf.Variable([1.0]), mask=tf.Variable([-np.inf])
    )
    taker = snapshot.LiveTaker(state)
    taker.take(1).write(f"{tmp_path}/1")
    state.later = tf.train.Checkpoint(mask=tf.Variable([np.inf]))
    taker.take(2).write(f"{tmp_path}/2")
    if late == "weights":
        state.weights.assign([np.nan])
        # Its key is another one, now.
        state.a = state.weights
    else:
        state.later.weights = tf.Variable([np.nan])
    with pytest.raises(OSError, match="that are not finite at step 3"):
        taker.take(3).write(f"{tmp_path}/3")
