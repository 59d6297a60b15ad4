"""What TensorFlow and Keras have saved by themselves is gone on from."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

import dtrain
from dtrain import checkpoint_tool, errors
from dtrain.checkpoint import retention
from dtrain.checkpoint.manager import CheckpointManager
from tests import live_state_test, small_fit
from tests.own_loop_test import flip


def small(value: float = 0.0) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(
        v=tf.Variable(value), module=live_state_test.Module()
    )


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


def by_save_twice(directory: str) -> int:
    """Two of one number, and one whose number has zeros."""
    small(1.0).write(f"{directory}/a-8")
    small(7.0).write(f"{directory}/ckpt-8")
    small(1.0).write(f"{directory}/model-8")
    small(1.0).write(f"{directory}/ckpt-007")
    return 8


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
    "write",
    [
        *(by_their_manager, by_save, by_save_twice, by_write, by_both),
        without_manifests,
    ],
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


def test_what_their_manager_has_removed_is_forgotten(
    tmp_path: pathlib.Path,
) -> None:
    """Also where a file without an ending, as of V1, has its name."""
    by_both(str(tmp_path))
    assert (tmp_path / "ckpt-2.json").exists()
    assert not (tmp_path / "ckpt-2.index").exists()
    (tmp_path / "ckpt-2").write_bytes(b"somebody's")
    with (
        CheckpointManager(small(), tmp_path, [retention.Last(9)]) as manager,
        pytest.warns(UserWarning, match="taken over as step 5"),
    ):
        assert manager.restore() == 5
    assert not (tmp_path / "ckpt-2.json").exists()
    assert (tmp_path / "ckpt-2").read_bytes() == b"somebody's"


def damaged(directory: pathlib.Path) -> None:
    by_their_manager(str(directory))
    flip(directory / "ckpt-3.index")


def of_tensorflow_1(directory: pathlib.Path) -> None:
    by_their_manager(str(directory))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable("v", initializer=1.0)
        session.run(variable.initializer)
        saver = tf.compat.v1.train.Saver()
        saver.save(session, f"{directory}/model.ckpt", global_step=9)


@pytest.mark.parametrize(
    ("write", "text", "step"),
    [
        (damaged, r"ckpt-3 .*; passed over", 2),
        (of_tensorflow_1, r"-9 was .* by a Saver of .*; passed over", 3),
    ],
)
def test_what_cannot_be_taken_over_is_passed_over(
    write: Callable[[pathlib.Path], None],
    text: str,
    step: int,
    tmp_path: pathlib.Path,
) -> None:
    write(tmp_path)
    state = small()
    with (
        CheckpointManager(state, tmp_path) as manager,
        pytest.warns(UserWarning, match=text),
    ):
        assert manager.restore() == step
    assert state.v.numpy() == 4.0 + step


@pytest.mark.parametrize(
    "pointer",
    [
        b"\xff\xfe",
        b"model_checkpoint_path {",
        b'model_checkpoint_path: "../outside/ckpt-9"',
        b'model_checkpoint_path: "ckpt-9\\0"',
        b"",
    ],
)
def test_a_pointer_file_that_is_none(
    pointer: bytes, tmp_path: pathlib.Path
) -> None:
    with CheckpointManager(small(7.0), tmp_path / "ours") as manager:
        manager.save(2)
    small().write(f"{tmp_path}/outside/ckpt-9")
    (tmp_path / "ours/checkpoint").write_bytes(pointer)
    state = small()
    with CheckpointManager(state, tmp_path / "ours") as manager:
        assert manager.restore_or_initialize() == 2
    assert state.v.numpy() == 7.0


def test_seeds_that_tensorflow_did_not_save(tmp_path: pathlib.Path) -> None:
    """They stay as they were made, and a line says so."""
    model = live_state_test.Listing()
    model(tf.zeros([1, 2]))
    tf.train.Checkpoint(model=model, v=tf.Variable(3.0)).save(
        f"{tmp_path}/ckpt"
    )
    state = live_state_test.growing()
    state = tf.train.Checkpoint(model=state.model, v=state.v)
    with (
        CheckpointManager(state, tmp_path) as manager,
        pytest.warns(UserWarning, match="stays as it was made"),
    ):
        # In a list, where TensorFlow finds no layer either.
        assert manager.restore() == 1
    assert state.v.numpy() == 3.0


def test_directory_of_somebody_else_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("mine")
    model = small_fit.make()
    tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model), str(tmp_path / "b"), 3
    ).save()
    for name, text in (
        ("a", r"notes.txt, which is no checkpoint of dtrain; name a dir"),
        ("b", r"ckpt-1, which TensorFlow has saved .*; restore it by tf.train"),
    ):
        there = sorted(path.name for path in (tmp_path / name).iterdir())
        for kind in small_fit.KINDS:
            with pytest.raises(errors.UserError, match=text):
                small_fit.fit(small_fit.make(), kind(tmp_path / name))
        # But for the lock.
        left = {path.name for path in (tmp_path / name).iterdir()}
        assert left - {".lock"} == {*there}


@pytest.mark.parametrize("damage", ["", "latest", "both"])
def test_a_backup_of_keras_own_is_taken_over(
    damage: str, tmp_path: pathlib.Path
) -> None:
    whole = small_fit.make()
    small_fit.fit(whole, epochs=4)
    model = small_fit.make()
    stock = keras.callbacks.BackupAndRestore(
        str(tmp_path), double_checkpoint=True
    )
    small_fit.fit(
        model, stock, cut_after=2 * small_fit.NUM_BATCHES + 1, epochs=4
    )
    for name in {"": [], "latest": [""], "both": ["", ".bkp"]}[damage]:
        path = tmp_path / f"latest.weights.h5{name}"
        path.write_bytes(path.read_bytes()[:200])
    model, backup = small_fit.make(), dtrain.BackupAndRestore(tmp_path)
    if damage == "both":
        with pytest.raises(errors.UserError, match="that cannot be used"):
            small_fit.fit(model, backup, epochs=4)
        return
    watch = small_fit.fit(
        model, backup, epochs=4, cut_after=small_fit.NUM_BATCHES + 1
    )
    assert watch.batches[0] == (1 if damage else 2, 0)
    # Its own is newer by now.
    backup.close()
    watch = small_fit.fit(model := small_fit.make(), backup, epochs=4)
    assert watch.batches[0][0] == 3 - bool(damage)
    for mine, its in zip(model.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert not tmp_path.exists()
