"""dtrain's saving in a training loop of one's own."""

from __future__ import annotations

import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain.bundle import fit
from dtrain.checkpoint import retention
from dtrain.checkpoint.manager import CheckpointManager
from dtrain.errors import UserError
from tests import foreign, replicas

layers = keras.layers
Strategy = tf.distribute.Strategy


@pytest.fixture(params=["default", "mirrored"])
def strategy(request: pytest.FixtureRequest) -> Iterator[Strategy]:
    made = (
        replicas.mirrored(2)
        if request.param == "mirrored"
        else tf.distribute.get_strategy()
    )
    with made.scope():
        yield made


class Block(layers.Layer):
    """Holds layers where TensorFlow does not look for them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [layers.Dense(3, name="mix"), layers.Dropout(0.5)]

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        for step in self.steps:
            inputs = step(inputs)
        return inputs


class Own(tf.Module):
    """A class of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = tf.Variable([1.0, 2.0])
        self.parts = {"a": [tf.Variable(3), tf.Variable(4.0)]}


def make() -> tf.train.Checkpoint:
    """Three models, two optimizers, and all else that a program may have."""
    keras.utils.set_random_seed(1)
    inner = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3, name="deep")], name="inner"
    )
    nested = keras.Sequential(
        [keras.Input((3,)), inner, layers.Dense(1, name="head")]
    )
    subclassed = foreign.Subclassed()
    subclassed.build((None, 3))
    blocks = keras.Sequential([keras.Input((3,)), Block()])
    one = keras.optimizers.Adam(1e-2)
    one.build(nested.trainable_variables)
    two = keras.optimizers.RMSprop(1e-2)
    two.build(subclassed.trainable_variables + blocks.trainable_variables)
    return tf.train.Checkpoint(
        nested=nested,
        subclassed=subclassed,
        blocks=blocks,
        optimizers=[one, two],
        own=Own(),
        raw=[tf.Variable(0.5), {"deep": tf.Variable([1, 2])}],
        step=tf.Variable(0, dtype=tf.int64),
    )


def train(state: tf.train.Checkpoint, step: int) -> None:
    """Changes every variable, as a function of the step."""
    for number, variable in enumerate(variables(state)):
        change = (step * 7 + number) % 5 + 1
        variable.assign_add(
            tf.cast(tf.fill(variable.shape, change), variable.dtype)
        )
    state.step.assign(step)


def variables(state: tf.train.Checkpoint) -> list[tf.Variable]:
    found = []
    for each in tf.train.TrackableView(state).descendants():
        variable = each.value if isinstance(each, keras.Variable) else each
        if isinstance(variable, tf.Variable) and "save_counter" not in str(
            getattr(variable, "name", "")
        ):
            found.append(variable)
    return found


def values(state: tf.train.Checkpoint) -> dict[str, np.ndarray]:
    live = fit.of_objects(state)
    return {
        name: live[name].read().copy()
        for name in live
        if name != "save_counter"
    }


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


@pytest.mark.usefixtures("strategy")
def test_a_loop_that_is_cut_and_goes_on(tmp_path: pathlib.Path) -> None:
    def loop(num_steps: int) -> dict[str, np.ndarray]:
        state = make()
        with CheckpointManager(state, str(tmp_path)) as manager:
            for step in range(manager.restore_or_initialize(), num_steps):
                train(state, step + 1)
                if (step + 1) % 2 == 0:
                    manager.save(step + 1)
        return values(state)

    loop(5)
    # Step 5 was not saved, and is done once more.
    cut = loop(8)
    for path in tmp_path.iterdir():
        path.unlink()
    assert_same(cut, loop(8))
    # The seed of a dropout, which is in a list.
    assert "untracked/blocks_2" in cut


@pytest.mark.usefixtures("strategy")
def test_what_was_saved_is_not_what_was_trained_meanwhile(
    tmp_path: pathlib.Path,
) -> None:
    state = make()
    manager = CheckpointManager(state, str(tmp_path))
    train(state, 1)
    saved = values(state)
    manager.save(1)
    train(state, 2)
    assert manager.restore() == 1
    assert_same(values(state), saved)
    manager.close()


def test_initialize_is_for_a_start_alone(tmp_path: pathlib.Path) -> None:
    state = make()
    calls: list[int] = []
    for _ in range(2):
        with CheckpointManager(state, str(tmp_path)) as manager:
            step = manager.restore_or_initialize(lambda: calls.append(1))
            manager.save(step + 1)
            manager.steps()
    assert calls == [1]
    with CheckpointManager(state, str(tmp_path)) as manager:
        begin: Any = manager.restore_or_initialize
        for other in (3, None, "ckpt"):
            with pytest.raises(UserError, match=r"initialize \(.*\) must be"):
                begin(other)


def saved_steps(
    directory: pathlib.Path, steps: list[int]
) -> tuple[tf.train.Checkpoint, CheckpointManager]:
    state = make()
    manager = CheckpointManager(state, str(directory))
    for step in steps:
        train(state, step)
        manager.save(step, wait=True)
    return state, manager


def test_going_back_gives_another_future(tmp_path: pathlib.Path) -> None:
    state, manager = saved_steps(tmp_path, [10, 15, 20])
    assert manager.restore(10) == 10
    assert int(state.step) == 10
    # Nothing is lost by looking.
    assert manager.steps() == [10, 15, 20]
    assert manager.restore() == 20
    assert manager.restore(10) == 10
    train(state, 12)
    manager.save(12)
    assert manager.steps() == [10, 12]
    assert manager.directory.quarantined() == ["ckpt-15", "ckpt-20"]
    reason = tmp_path / "quarantine/ckpt-20/reason.txt"
    assert reason.read_text() == "went back to step 10\n"
    manager.close()
    again = make()
    with CheckpointManager(again, str(tmp_path)) as other:
        assert other.restore() == 12
    assert_same(values(again), values(state))


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_is_damaged(tmp_path: pathlib.Path) -> None:
    state, manager = saved_steps(tmp_path, [1, 2])
    flip(tmp_path / "ckpt-2.data-00000-of-00001")
    with pytest.raises(UserError, match="ckpt-2 does not verify: "):
        manager.restore(2)
    with pytest.warns(UserWarning, match="ckpt-2 does not verify"):
        assert manager.restore() == 1
    assert int(state.step) == 1
    flip(tmp_path / "ckpt-1.data-00000-of-00001")
    before = values(state)
    with pytest.raises(
        UserError, match="no checkpoint that can be used"
    ) as why:
        manager.restore()
    assert "ckpt-1 does not verify" in str(why.value)
    assert_same(values(state), before)
    # Something was there: to start over would be to lose it.
    with pytest.raises(UserError, match="that can be used"):
        manager.restore_or_initialize()
    manager.close()


def test_there_is_no_such_step(tmp_path: pathlib.Path) -> None:
    _, manager = saved_steps(tmp_path, [1, 2])
    with pytest.raises(
        UserError, match="holds no checkpoint of step 7; there: 1, 2"
    ):
        manager.restore(7)
    manager.close()


@pytest.mark.usefixtures("strategy")
def test_one_that_does_not_fit_changes_nothing(tmp_path: pathlib.Path) -> None:
    saved_steps(tmp_path, [3])[1].close()
    other = make()
    other.extra = tf.Variable([1.0])
    with CheckpointManager(other, str(tmp_path)) as manager:
        before = values(other)
        with pytest.raises(UserError, match="does not fit") as caught:
            manager.restore()
    assert "the program: 1 missing" in str(caught.value)
    assert "  missing    extra: float32[1]" in caught.value.details
    assert_same(values(other), before)


def unbuilt_optimizer() -> object:
    return keras.optimizers.Adam()


def unbuilt_model() -> object:
    return keras.Sequential([layers.Dense(2)])


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (
            unbuilt_optimizer,
            "it has no state yet; call part.build(model.trainable_variables)",
        ),
        (unbuilt_model, "it has no variables yet; call it once"),
        (lambda: [unbuilt_optimizer()], "call part.0.build"),
    ],
)
def test_what_is_not_there_yet_is_named(
    part: Callable[[], object], text: str, tmp_path: pathlib.Path
) -> None:
    state = tf.train.Checkpoint(part=part())
    with pytest.raises(UserError, match=re.escape(text)):
        CheckpointManager(state, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_stock_tensorflow_loads_it(tmp_path: pathlib.Path) -> None:
    state, manager = saved_steps(tmp_path, [4])
    manager.close()
    again = make()
    again.untracked = tf.train.Checkpoint(
        **{
            name: tf.Variable(tf.zeros_like(variable))
            for name, variable in tf.train.TrackableView(state.untracked)
            .children(state.untracked)
            .items()
        }
    )
    newest = tf.train.latest_checkpoint(str(tmp_path))
    again.restore(newest).assert_consumed()
    assert_same(values(again), values(state))


def test_a_start_that_restores_nothing(tmp_path: pathlib.Path) -> None:
    """Its lower steps would be removed as the oldest: it hears of it."""
    saved_steps(tmp_path, [10, 20])[1].close()
    state = make()
    with CheckpointManager(state, tmp_path) as manager:
        with pytest.raises(UserError, match=r"step \(5\) must be at least 20"):
            manager.save(5)
        assert manager.steps() == [10, 20]
        assert manager.restore(10) == 10
        with pytest.raises(UserError, match=r"step \(5\) must be at least 10"):
            manager.save(5)
        manager.save(12)
        manager.save(12)
        with pytest.raises(UserError, match="name another directory"):
            manager.save(11)
        assert manager.steps() == [10, 12]


STEPS: dict[str, Callable[[], Any]] = {
    "numpy": lambda: np.int64(3),
    "variable": lambda: tf.Variable(3, dtype=tf.int64),
    "tensor": lambda: tf.constant(3, tf.int64),
    "uint8": lambda: np.uint8(3),
    "array": lambda: np.array(3),
    "keras": lambda: keras.Variable(3, dtype="int64", trainable=False),
}
NO_STEPS = (-1, True, 3.0, "3", None, [3], 2**63, np.int32(-1), np.nan)


@pytest.mark.parametrize("kind", STEPS)
def test_steps_of_any_kind(kind: str, tmp_path: pathlib.Path) -> None:
    step = STEPS[kind]()
    with CheckpointManager(
        tf.train.Checkpoint(v=tf.Variable(1.0)), tmp_path
    ) as manager:
        manager.save(step, wait=True)
        assert manager.steps() == [3]
        assert manager.restore(step) == 3


def test_what_is_no_step_is_told_at_once(tmp_path: pathlib.Path) -> None:
    state = tf.train.Checkpoint(v=tf.Variable(1.0))
    with CheckpointManager(state, tmp_path / "new") as manager:
        for step in NO_STEPS:
            for call in (manager.save, manager.restore):
                if step is None and call == manager.restore:
                    continue
                with pytest.raises(UserError, match="a whole number") as why:
                    call(step)
                assert "\n" not in str(why.value)

        for call in (manager.save, manager.restore):
            traced = tf.function(lambda call=call: call(1), autograph=False)
            with pytest.raises(UserError, match=r"\(\) within a tf.function"):
                traced()
        assert manager.steps() == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        *({"directory": path} for path in (None, "", 3, b"x")),
        *(
            {"policies": each}
            for each in (retention.Last(3), [3], "Last", None)
        ),
        {"verify": "never"},
        {"checkpoint": "model"},
    ],
    ids=str,
)
def test_what_is_no_argument(options: dict[str, Any]) -> None:
    sound = {"checkpoint": tf.train.Checkpoint(v=tf.Variable(1.0))}
    with pytest.raises(UserError, match=r".* \(.*\) must be .*; try ") as why:
        CheckpointManager(**{**sound, "directory": "new", **options})
    assert "\n" not in str(why.value)


def test_restoring_waits_for_a_save(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on another thread, and not on the disk yet."""
    state = tf.train.Checkpoint(v=tf.Variable(1.0))
    with CheckpointManager(state, tmp_path) as manager:
        commit = manager.directory.commit

        def slowly(*arguments: Any) -> Any:
            time.sleep(0.2)
            return commit(*arguments)

        monkeypatch.setattr(manager.directory, "commit", slowly)
        manager.save(4)
        state.v.assign(0.0)
        assert manager.restore_or_initialize(lambda: pytest.fail("new")) == 4
        assert state.v.numpy() == 1.0
