"""What TensorFlow tests of its `Checkpoint` and its manager, asked of ours.

`docs/checkpoints.md` has a table of what is other than there. A root, what
comes after the first save, and what is no variable are in `live_state_test`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from dtrain.checkpoint import retention
from dtrain.checkpoint.manager import CheckpointManager
from dtrain.errors import StorageError, UserError

Checkpoint = tf.train.Checkpoint


def scalar(value: float = 0.0) -> tf.Variable:
    return tf.Variable(value)


def save(state: Checkpoint, directory: pathlib.Path, *steps: int) -> None:
    with CheckpointManager(state, directory, [retention.Last(9)]) as manager:
        for step in steps or (1,):
            manager.save(step)


def restore(state: Checkpoint, directory: pathlib.Path) -> None:
    with CheckpointManager(state, directory) as manager:
        manager.restore()


def module(**parts: Any) -> tf.Module:
    made = tf.Module()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def test_what_is_deleted_and_what_the_pointer_file_says(
    tmp_path: pathlib.Path,
) -> None:
    state = Checkpoint(v=scalar())
    with CheckpointManager(state, tmp_path, [retention.EverySteps(1)]) as all_:
        for step in range(1, 5):
            all_.save(step)
        assert all_.steps() == [1, 2, 3, 4]
    with CheckpointManager(state, tmp_path, [retention.Last(3)]) as manager:
        # Nothing is deleted before something is added.
        assert manager.steps() == [1, 2, 3, 4]
        manager.save(5)
        assert manager.steps() == [3, 4, 5]
    pointed = tf.train.get_checkpoint_state(str(tmp_path))
    names = [pathlib.Path(p).name for p in pointed.all_model_checkpoint_paths]
    assert names == ["ckpt-3", "ckpt-4", "ckpt-5"]
    assert tf.train.latest_checkpoint(str(tmp_path)) == f"{tmp_path}/ckpt-5"


@pytest.mark.parametrize(
    ("at", "hours", "last", "steps"),
    [
        ([0, 1, 2, 3, 4, 5], 2.0, 1, [1, 3, 5, 6]),
        ([0, 0.5, 1, 1.5, 2], 1.0, 2, [1, 3, 4, 5]),
        # A clock that is set back deletes nothing by itself.
        ([0, 1, 2, -9, -8.9, -8.5, -8], 1.0, 1, [1, 2, 3, 4, 7]),
    ],
)
def test_every_hours(
    at: list[float],
    hours: float,
    last: int,
    steps: list[int],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policies = [retention.Last(last), retention.EveryHours(hours)]
    state = Checkpoint(v=scalar())
    with CheckpointManager(state, tmp_path, policies) as manager:
        for step, hour in enumerate(at, 1):
            with monkeypatch.context() as patch:
                patch.setattr("time.time", lambda hour=hour: 1e9 + hour * 3600)
                manager.save(step, wait=True)
        assert manager.steps() == steps


def test_a_step_that_is_saved_twice(tmp_path: pathlib.Path) -> None:
    state = Checkpoint(v=scalar(1.0))
    with CheckpointManager(state, tmp_path) as manager:
        manager.save(5)
        state.v.assign(2.0)
        manager.save(5)
        state.v.assign(0.0)
        assert manager.restore() == 5
        assert manager.steps() == [5]
    assert state.v.numpy() == 2.0


def test_weights_of_elsewhere_to_begin_with(tmp_path: pathlib.Path) -> None:
    state = Checkpoint(v=scalar(3.0))
    pretrained = state.write(f"{tmp_path}/pretrained/ckpt")
    state.v.assign(0.0)
    with CheckpointManager(state, tmp_path / "ours") as manager:
        step = manager.restore_or_initialize(lambda: state.read(pretrained))
        assert (step, state.v.numpy()) == (0, 3.0)
        manager.save(1)
        state.v.assign(4.0)
        step = manager.restore_or_initialize(lambda: pytest.fail("again"))
        assert (step, state.v.numpy()) == (1, 3.0)


def test_one_of_many_shapes_changes_no_variable(tmp_path: pathlib.Path) -> None:
    save(Checkpoint(a=scalar(1.0), v=tf.Variable([1.0, 1.0])), tmp_path)
    state = Checkpoint(a=scalar(), v=tf.Variable([0.0]))
    with pytest.raises(UserError, match="does not fit") as why:
        restore(state, tmp_path)
    assert "[2] in the checkpoint, [1] in the program" in str(why.value)
    assert state.a.numpy() == 0.0


@pytest.mark.parametrize("parts", [("a",), ("a", "b", "c")])
def test_less_and_more_is_refused(
    parts: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    save(Checkpoint(a=scalar(1.0), b=scalar(2.0)), tmp_path)
    state = Checkpoint(**{name: scalar() for name in parts})
    with pytest.raises(UserError, match=r"1 (missing|left over)"):
        restore(state, tmp_path)
    assert state.a.numpy() == 0.0


def loop() -> Checkpoint:
    one, two = Checkpoint(v=tf.Variable([3.0, 1.0])), Checkpoint()
    one.second, two.first = two, one
    two.v, two.same = tf.Variable([1.0, 2.0]), one.v
    return one


def empty() -> Checkpoint:
    state = Checkpoint(a=[], v=scalar(1.0), d={})
    state.deep = [[], {"x": []}]
    return state


def escaped() -> Checkpoint:
    part = tf.Module()
    for number, name in enumerate(("a/b.c", "d/.S", "e//f", "..")):
        part._track_trackable(scalar(number), name=name)
    return Checkpoint(part=part)


def containers() -> Checkpoint:
    return Checkpoint(
        named={"a": scalar(1.0), "b": [scalar(2.0), {"c": scalar(3.0)}]},
        several=(scalar(4.0), scalar(5.0)),
    )


def shared() -> Checkpoint:
    part = module(v=scalar(1.0))
    return Checkpoint(one=module(part=part), two=module(part=part))


def nothing() -> Checkpoint:
    return Checkpoint()


def dtypes() -> Checkpoint:
    names = "float16 bfloat16 float64 uint64 int8 bool complex64 float8_e4m3fn"
    parts = {
        name: tf.Variable(tf.cast([1.0, 2.0], name)) for name in names.split()
    }
    return Checkpoint(
        **parts,
        text=tf.Variable(["text", ""]),
        empty=tf.Variable(tf.zeros([0, 3])),
        unknown=tf.Variable(tf.zeros([2]), shape=tf.TensorShape(None)),
    )


@pytest.mark.parametrize(
    "make", [loop, empty, escaped, containers, shared, nothing, dtypes]
)
def test_objects_of_any_kind(
    make: Callable[[], Checkpoint], tmp_path: pathlib.Path
) -> None:
    state = make()
    stock = state.save(f"{tmp_path}/stock/ckpt")
    save(state, tmp_path / "ours")
    ours = f"{tmp_path}/ours/ckpt-1"
    assert tf.train.list_variables(ours) == tf.train.list_variables(stock)
    again = make()
    variables = [
        each
        for each in tf.train.TrackableView(again).descendants()
        if isinstance(each, tf.Variable)
    ]
    values = [each.numpy() for each in variables]
    for each in variables:
        if each.dtype != tf.string:
            each.assign(np.zeros_like(each.numpy()))
    restore(again, tmp_path / "ours")
    for each, value in zip(variables, values, strict=True):
        np.testing.assert_array_equal(each, value)
    # And so does TensorFlow.
    make().restore(ours).assert_consumed()


def test_other_empty_containers_do_not_matter(tmp_path: pathlib.Path) -> None:
    save(Checkpoint(a=[], v=scalar(1.0)), tmp_path)
    state = Checkpoint(b=[], v=scalar())
    state.deep = [[]]
    restore(state, tmp_path)
    assert state.v.numpy() == 1.0


def test_one_object_that_is_two_in_the_program(tmp_path: pathlib.Path) -> None:
    """Which of the two has the values is not to be guessed."""
    save(shared(), tmp_path)
    state = Checkpoint(
        one=module(part=module(v=scalar())), two=module(part=module(v=scalar()))
    )
    with pytest.raises(UserError, match="does not fit"):
        restore(state, tmp_path)
    assert state.one.part.v.numpy() == state.two.part.v.numpy() == 0.0


def test_two_objects_that_are_one_in_the_program(
    tmp_path: pathlib.Path,
) -> None:
    save(
        Checkpoint(one=module(a=scalar(1.0)), two=module(b=scalar(2.0))),
        tmp_path,
    )
    part = module(a=scalar(), b=scalar())
    with pytest.raises(UserError, match="does not fit"):
        restore(Checkpoint(one=part, two=part), tmp_path)
    assert part.a.numpy() == part.b.numpy() == 0.0


def scatter(variable: tf.Variable) -> None:
    rows = [[row] for row in range(5)]
    variable.scatter_nd_update(rows, tf.fill([5, 100], -1.0))
    variable[3:5].assign(tf.fill([2, 100], -2.0))
    variable.scatter_add(tf.IndexedSlices(tf.ones([2, 100]), [7, 8]))


def assign(variable: tf.Variable) -> None:
    variable.assign_add(tf.ones_like(variable))


@pytest.mark.parametrize("write", [scatter, assign])
def test_what_is_written_right_after_a_save(
    write: Callable[[tf.Variable], None], tmp_path: pathlib.Path
) -> None:
    state = Checkpoint(v=tf.Variable(tf.zeros([1000, 100])))
    keep = [retention.Last(9)]
    with CheckpointManager(state, tmp_path, keep) as manager:
        for step in range(1, 6):
            state.v.assign(tf.fill([1000, 100], float(step)))
            manager.save(step)
            write(state.v)
    for step in range(1, 6):
        path, key = f"{tmp_path}/ckpt-{step}", "v/.ATTRIBUTES/VARIABLE_VALUE"
        assert np.all(tf.train.load_variable(path, key) == step)


def test_what_is_not_finite(tmp_path: pathlib.Path) -> None:
    state = Checkpoint(best=scalar(), mask=tf.Variable([-np.inf]))
    with CheckpointManager(state, tmp_path) as manager:
        manager.save(1)
        state.best.assign(np.inf)
        with pytest.raises(StorageError, match="best holds numbers that are"):
            manager.save(2, wait=True)
        state.best.assign(1.0)
        manager.save(3)
        assert manager.steps() == [1, 3]
