"""dtrain's saving in a training loop of one's own."""

from __future__ import annotations

import contextlib
import pathlib
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain import checkpoint_tool, errors
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


def net() -> keras.Sequential:
    return keras.Sequential(
        [keras.Input((2,)), layers.Dense(3), layers.Dropout(0.5, seed=1)]
    )


def rooted_model() -> tf.train.Checkpoint:
    model = net()
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    return tf.train.Checkpoint(model, optimizer=optimizer)


class Module(tf.Module):
    """Has a variable."""

    def __init__(self) -> None:
        super().__init__()
        self.v = tf.Variable([1.0, 2.0])


class Listing(keras.Model):
    """Holds a layer with a seed where TensorFlow does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [layers.Dense(2), layers.Dropout(0.5, seed=1)]
        self.spare = [layers.Dense(2)]

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        for part in self.parts:
            inputs = part(inputs)
        return inputs


def rooted_list() -> tf.train.Checkpoint:
    model = Listing()
    model(tf.zeros([1, 2]))
    return tf.train.Checkpoint(root=model)


ROOTED = {
    "model and optimizer": rooted_model,
    "model alone": lambda: tf.train.Checkpoint(net()),
    "by keyword": lambda: tf.train.Checkpoint(root=net()),
    "module": lambda: tf.train.Checkpoint(Module(), step=tf.Variable(0)),
    "layers in a list": rooted_list,
}


@pytest.mark.parametrize("make_rooted", ROOTED.values(), ids=ROOTED)
def test_a_root_is_saved_as_tensorflow_saves_it(
    make_rooted: Callable[[], tf.train.Checkpoint], tmp_path: pathlib.Path
) -> None:
    state = make_rooted()
    stock = {*foreign.saved(state.write(f"{tmp_path}/stock/ckpt"))}
    with CheckpointManager(state, tmp_path / "ours") as manager:
        change(state.root)
        wanted = numbers(state.root)
        manager.save(1, wait=True)
    ours = {*foreign.saved(f"{tmp_path}/ours/ckpt-1")}
    extra = {key.partition("/")[0] for key in ours - stock}
    assert stock <= ours
    assert extra <= {"save_counter", "untracked"}
    again = make_rooted()
    with CheckpointManager(again, tmp_path / "ours") as manager:
        assert manager.restore() == 1
    np.testing.assert_equal(numbers(again.root), wanted)


def change(owner: Any) -> None:
    for variable in owner.variables:
        ones = tf.ones(variable.shape, variable.dtype)
        variable.assign(ones * 7)


def numbers(owner: Any) -> list[np.ndarray]:
    return [np.array(variable) for variable in owner.variables]


def test_a_weak_reference_to_a_root(tmp_path: pathlib.Path) -> None:
    module = Module()
    state = tf.train.Checkpoint(root=weakref.ref(module))
    with CheckpointManager(state, tmp_path) as manager:
        manager.save(1)
        module.v.assign([0.0, 0.0])
        manager.restore()
    np.testing.assert_array_equal(module.v, [1.0, 2.0])


def attach(state: tf.train.Checkpoint) -> None:
    state.extra = tf.Variable(5.0)


def replace(state: tf.train.Checkpoint) -> None:
    state.v = tf.Variable(6.0)


def append(state: tf.train.Checkpoint) -> None:
    state.blocks.append(tf.Variable(7.0))


def attach_below(state: tf.train.Checkpoint) -> None:
    state.module.w = Module()


def grow(state: tf.train.Checkpoint) -> None:
    """A GAN that is given a larger block, and an optimizer of that."""
    state.grown = net()
    state.grown_optimizer = keras.optimizers.SGD(momentum=0.9)
    state.grown_optimizer.build(state.grown.trainable_variables)


def build_unseen(state: tf.train.Checkpoint) -> None:
    state.model.spare[0].build((None, 2))


def build(state: tf.train.Checkpoint) -> None:
    """What was not used is used after all."""
    state.compiled.optimizer.build(state.compiled.trainable_variables)


def growing() -> tf.train.Checkpoint:
    model = Listing()
    model(tf.zeros([1, 2]))
    compiled = net()
    compiled.compile()
    return tf.train.Checkpoint(
        v=tf.Variable(1.0),
        blocks=[tf.Variable(2.0)],
        module=Module(),
        model=model,
        compiled=compiled,
    )


@pytest.mark.parametrize(
    "change_state",
    [attach, replace, append, attach_below, grow, build_unseen, build],
)
def test_what_comes_after_the_first_save_is_saved(
    change_state: Callable[[tf.train.Checkpoint], None], tmp_path: pathlib.Path
) -> None:
    state = growing()
    with CheckpointManager(state, tmp_path / "ours") as manager:
        manager.save(1)
        change_state(state)
        # All that TensorFlow would write, under its keys.
        stock = foreign.saved(state.write(f"{tmp_path}/stock/ckpt"))
        manager.save(2, wait=True)
        ours = foreign.saved(f"{tmp_path}/ours/ckpt-2")
        assert stock.keys() <= ours.keys()
        # Ours is the step.
        stock.pop("save_counter/.ATTRIBUTES/VARIABLE_VALUE", None)
        for key, value in stock.items():
            np.testing.assert_array_equal(ours[key], value, key)
        # A Dropout's seed each, and the weights of layers in lists.
        unseen = [key for key in ours if key.startswith("untracked/")]
        assert len(unseen) == {grow: 5, build_unseen: 6}.get(change_state, 4)
        assert manager.restore() == 2
    again = growing()
    change_state(again)
    with CheckpointManager(again, tmp_path / "ours") as manager:
        assert manager.restore() == 2
        if change_state is replace:
            assert manager.restore(1) == 1
            return
        # What was before it grew is another state.
        with pytest.raises(UserError, match="does not fit") as why:
            manager.restore(1)
    assert "  missing " in str(why.value)


def test_what_is_attached_and_not_built_is_named(
    tmp_path: pathlib.Path,
) -> None:
    state = growing()
    with CheckpointManager(state, tmp_path) as manager:
        state.later = keras.optimizers.Adam()
        with pytest.raises(UserError, match="later is an optimizer that is"):
            manager.save(1)
        del state.later
        state.blocks[0] = tf.Variable(1.0)
        with pytest.raises(UserError, match="TensorFlow cannot save this"):
            manager.save(1)


@pytest.mark.parametrize("is_used", [False, True])
def test_an_optimizer_of_compile(is_used: bool, tmp_path: pathlib.Path) -> None:
    """The default one, that nobody builds, or only once it is used."""
    state = growing()
    if is_used:
        build(state)
        change(state.compiled.optimizer)
    with CheckpointManager(state, tmp_path) as manager:
        manager.save(1)
    again = growing()
    with CheckpointManager(again, tmp_path) as manager:
        assert manager.restore() == 1
    np.testing.assert_equal(
        numbers(again.compiled.optimizer), numbers(state.compiled.optimizer)
    )


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

        @tf.function(autograph=False)
        def inside(step: tf.Tensor) -> None:
            manager.save(step)

        with pytest.raises(UserError, match="a whole number"):
            inside(tf.constant(1))
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


def small(value: float = 0.0) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(v=tf.Variable(value), module=Module())


def by_their_manager(directory: str) -> int:
    state = small()
    manager = tf.train.CheckpointManager(state, directory, max_to_keep=2)
    for value in (5.0, 6.0, 7.0):
        state.v.assign(value)
        manager.save()
    return 3


def by_save(directory: str) -> int:
    state = small(7.0)
    state.save(f"{directory}/unusual")
    state.save(f"{directory}/unusual")
    return 2


def by_write(directory: str) -> int:
    small(7.0).write(f"{directory}/ckpt-30")
    return 30


def by_both(directory: str) -> int:
    """Theirs has worked where ours has, and has removed some of it."""
    with CheckpointManager(small(1.0), directory) as ours:
        for step in (1, 2, 3):
            ours.save(step)
    state = small()
    manager = tf.train.CheckpointManager(state, directory, max_to_keep=2)
    manager.restore_or_initialize()
    manager.save()
    state.v.assign(7.0)
    manager.save()
    return 5


def without_manifests(directory: str) -> int:
    """As somebody copies one of ours who does not know of them."""
    with CheckpointManager(small(7.0), directory) as ours:
        ours.save(2)
    pathlib.Path(f"{directory}/ckpt-2.json").unlink()
    return 2


@pytest.mark.parametrize(
    "write", [by_their_manager, by_save, by_write, by_both, without_manifests]
)
def test_what_tensorflow_has_saved_is_taken_over(
    write: Callable[[str], int], tmp_path: pathlib.Path
) -> None:
    step = write(str(tmp_path))
    there = {path.name for path in tmp_path.iterdir()}
    state = small()
    with CheckpointManager(state, tmp_path, [retention.Last(2)]) as manager:
        with pytest.warns(UserWarning, match=f"taken over as step {step}$"):
            assert (
                manager.restore_or_initialize(lambda: pytest.fail("new"))
                == step
            )
        assert state.v.numpy() == 7.0
        kept = {path.name for path in tmp_path.iterdir()}
        # But for the manifests of what their manager has removed.
        gone = [name for name in there - kept if not name.endswith(".json")]
        assert gone == []
        assert not (tmp_path / "quarantine").exists()
        for later in range(step + 1, step + 3):
            manager.save(later, wait=True)
        assert manager.steps() == [step + 1, step + 2]
    code = checkpoint_tool.run(["verify", str(tmp_path)])
    assert code == errors.FINISHED
    with CheckpointManager(small(), tmp_path) as manager:
        # Once, and not at every start.
        assert manager.restore() == step + 2


def test_what_cannot_be_taken_over_is_passed_over(
    tmp_path: pathlib.Path,
) -> None:
    by_their_manager(str(tmp_path))
    flip(tmp_path / "ckpt-3.index")
    state = small()
    with (
        CheckpointManager(state, tmp_path) as manager,
        pytest.warns(UserWarning, match=r"ckpt-3 .*; passed over"),
    ):
        assert manager.restore() == 2
    assert state.v.numpy() == 6.0


def test_seeds_that_tensorflow_did_not_save(tmp_path: pathlib.Path) -> None:
    """They stay as they were made, and a line says so."""
    model = Listing()
    model(tf.zeros([1, 2]))
    tf.train.Checkpoint(model=model, v=tf.Variable(3.0)).save(
        f"{tmp_path}/ckpt"
    )
    state = growing()
    state = tf.train.Checkpoint(model=state.model, v=state.v)
    with (
        CheckpointManager(state, tmp_path) as manager,
        pytest.warns(UserWarning, match="stays as it was made"),
    ):
        # In a list, where TensorFlow finds no layer either.
        assert manager.restore() == 1
    assert state.v.numpy() == 3.0


class Python(tf.train.experimental.PythonState):
    """Counts in Python."""

    def __init__(self) -> None:
        self.count = 0
        self.threads: set[int] = set()

    def serialize(self) -> str:
        self.threads.add(threading.get_ident())
        return str(self.count)

    def deserialize(self, string_value: bytes) -> None:
        self.count = int(string_value)


class Custom(tf.__internal__.tracking.Trackable):
    """Saves what it likes."""

    def __init__(self) -> None:
        self.v = tf.Variable(0.0)

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {"half": self.v / 2, "whole": self.v}

    def _restore_from_tensors(self, restored: dict[str, tf.Tensor]) -> Any:
        return self.v.assign(restored["half"] * 2)


class Thing:
    """What is saved, how it is used once, and what it shows then."""

    def __init__(
        self,
        make: Callable[[], Any],
        use: Callable[[Any], object],
        show: Callable[[Any], object],
    ) -> None:
        self.make = make
        self.use = use
        self.show = show


def table() -> Any:
    return tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, 0)


def dense_table() -> Any:
    return tf.lookup.experimental.DenseHashTable(
        tf.int64, tf.float32, 0.0, empty_key=-1, deleted_key=-2
    )


def iterator() -> Any:
    return iter(tf.data.Dataset.range(100).shuffle(10, seed=1).batch(2))


def insert(table: Any) -> None:
    size = table.size()
    key = tf.strings.as_string(size) if table.key_dtype == tf.string else size
    table.insert([key], tf.ones([1], table.value_dtype))


THINGS = {
    "table": Thing(table, insert, lambda t: int(t.size())),
    "dense table": Thing(dense_table, insert, lambda t: int(t.size())),
    "iterator": Thing(iterator, next, lambda i: next(i).numpy().tolist()),
    "python": Thing(
        Python, lambda p: setattr(p, "count", p.count + 1), lambda p: p.count
    ),
    "custom": Thing(
        Custom, lambda c: c.v.assign_add(2.0), lambda c: c.v.numpy()
    ),
    "generator": Thing(
        lambda: tf.random.Generator.from_seed(1),
        lambda g: g.normal([1]),
        lambda g: g.normal([1]).numpy().tolist(),
    ),
}


@pytest.mark.parametrize("thing", THINGS.values(), ids=THINGS)
def test_what_is_no_variable(thing: Thing, tmp_path: pathlib.Path) -> None:
    """It is as it was when it was saved, whatever has come after."""

    def state_of(part: Any) -> tf.train.Checkpoint:
        return tf.train.Checkpoint(part=part, v=tf.Variable(1.0))

    part = thing.make()
    with CheckpointManager(state_of(part), tmp_path) as manager:
        for step in (1, 2, 3):
            thing.use(part)
            manager.save(step)
        for _ in range(3):
            thing.use(part)
        again = thing.make()
        with CheckpointManager(state_of(again), tmp_path) as other:
            manager.steps()
            assert other.restore() == 3
        expected = thing.make()
        for _ in range(3):
            thing.use(expected)
        assert thing.show(again) == thing.show(expected)
        # TensorFlow has the same keys.
        stock = state_of(part).save(f"{tmp_path}/stock/ckpt")
        keys = foreign.keys(stock), foreign.keys(f"{tmp_path}/ckpt-3")
        assert keys[0] == keys[1]
    if isinstance(part, Python):
        assert part.threads == {threading.get_ident()}


def test_an_iterator_that_cannot_be_saved(tmp_path: pathlib.Path) -> None:
    """What TensorFlow says, in a line."""

    def numbers() -> Iterator[int]:
        yield from range(10)

    dataset = tf.data.Dataset.from_generator(
        numbers, output_signature=tf.TensorSpec((), tf.int64)
    )
    state = tf.train.Checkpoint(batches=iter(dataset))
    with pytest.raises(UserError, match="TensorFlow cannot save this") as why:
        CheckpointManager(state, tmp_path)
    assert "\n" not in str(why.value)
    assert "leave it out" in str(why.value)


WORDS = [["cat"], ["dog"], ["dog"], ["bird"], ["dog"], ["cat"]]


def adapted(make_layer: Callable[[], Any], data: Any) -> Callable[[bool], Any]:
    def make_adapted(is_adapted: bool) -> Any:
        layer = make_layer()
        if is_adapted:
            layer.adapt(data)
        return layer

    return make_adapted


LAYERS = {
    "normalization": (
        adapted(
            layers.Normalization,
            np.array([[1.0, 5.0], [3.0, 9.0]], "float32"),
        ),
        [[2.0, 3.0]],
    ),
    "strings": (adapted(layers.StringLookup, WORDS), WORDS),
    "integers": (
        adapted(layers.IntegerLookup, np.array([[7], [9], [9]])),
        [[9], [7], [1]],
    ),
    "counts": (
        adapted(
            lambda: layers.StringLookup(output_mode="count", max_tokens=9),
            WORDS,
        ),
        WORDS,
    ),
    "text": (adapted(layers.TextVectorization, ["a b a", "c a"]), ["b a"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_not_adapted_again(
    name: str, tmp_path: pathlib.Path
) -> None:
    make_layer, data = LAYERS[name]

    def model_of(is_adapted: bool) -> tuple[Any, keras.Model]:
        layer = make_layer(is_adapted)
        if name == "normalization" and not layer.built:
            layer.build((None, 2))
        return layer, keras.Sequential([layer])

    layer, model = model_of(is_adapted=True)
    state = tf.train.Checkpoint(model=model, v=tf.Variable(1.0))
    with contextlib.ExitStack() as stack:
        model.built = True
        manager = stack.enter_context(CheckpointManager(state, tmp_path))
        manager.save(1)
    again, model = model_of(is_adapted=False)
    model.built = True
    state = tf.train.Checkpoint(model=model, v=tf.Variable(1.0))
    with CheckpointManager(state, tmp_path) as manager:
        assert manager.restore() == 1
    given = tf.constant(data)
    np.testing.assert_array_equal(again(given), layer(given))
