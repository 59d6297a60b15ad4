"""What is saved, and what is kept."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from dtrain import checkpoint_tool, errors
from dtrain.checkpoint import listing, pins, retention
from dtrain.checkpoint import manager as checkpoint_lib
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.errors import UserError
from dtrain.storage import sealed
from tests import odd_values, runs


def make_state(value: float = 0.0) -> tf.train.Checkpoint:
    """Makes a state of two variables; the step is saved, but is not used."""
    return tf.train.Checkpoint(
        step=tf.Variable(0, dtype=tf.int64),
        weights=tf.Variable([value, value + 1.0]),
    )


def save_steps(
    directory: pathlib.Path,
    steps: list[int],
    *policies: retention.Policy,
    metrics: Callable[[int], dict[str, float]] = lambda _: {},
) -> checkpoint_lib.CheckpointManager:
    """Saves a state whose weights are its step."""
    state = make_state()
    manager = checkpoint_lib.CheckpointManager(
        state, str(directory), policies or (retention.Last(3),)
    )
    for step in steps:
        state.step.assign(step)
        state.weights.assign([step, step + 1.0])
        manager.save(step, checkpoint_lib.Facts(metrics(step)), wait=True)
    return manager


def steps_in(directory: pathlib.Path) -> list[int]:
    return CheckpointDirectory(str(directory)).steps()


def test_what_is_kept_on_disk(tmp_path: pathlib.Path) -> None:
    save_steps(
        tmp_path,
        [2, 4, 5, 8, 10, 11],
        retention.EverySteps(4),
        retention.Last(2),
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoint", ".lock"),
        *(
            f"ckpt-{step}.{suffix}"
            for step in (4, 8, 10, 11)
            for suffix in ("index", "data-00000-of-00001", "json")
        ),
    }


def test_what_is_kept_is_told_by_the_directory_after_a_restart(
    tmp_path: pathlib.Path,
) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 6.0}

    def metrics(step: int) -> dict[str, float]:
        return {"generator_loss": losses[step]}

    policies = (retention.Best(2, "generator_loss", "min"), retention.Last(1))
    save_steps(tmp_path, [1, 2, 3], *policies, metrics=metrics)
    assert steps_in(tmp_path) == [2, 3]
    save_steps(tmp_path, [4, 5], *policies, metrics=metrics)
    assert steps_in(tmp_path) == [2, 4, 5]


def test_pinned_by_name(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path, [1, 2])
    pins.add(str(tmp_path), 1, "paper")
    save_steps(tmp_path, [3, 4, 5], retention.Last(1))
    assert steps_in(tmp_path) == [1, 5]
    assert pins.read(str(tmp_path)) == {"paper": 1}
    with pytest.raises(UserError, match="no checkpoint of step 2; there: 1, 5"):
        pins.add(str(tmp_path), 2, "talk")
    with pytest.raises(UserError, match="pinned as talk; pinned: paper"):
        pins.remove(str(tmp_path), "talk")
    pins.remove(str(tmp_path), "paper")
    save_steps(tmp_path, [6], retention.Last(1))
    assert steps_in(tmp_path) == [6]


def test_two_people_pin_at_the_same_time(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path, [1])
    source = (
        "import sys\n"
        "from dtrain.checkpoint import pins\n"
        "sys.stdin.readline()\n"
        "for number in range(50):\n"
        "    pins.add(sys.argv[1], 1, f'{sys.argv[2]}{number}')\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(tmp_path), name],
            stdin=subprocess.PIPE,
            env=runs.environment(),
        )
        for name in "ab"
    ]
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0, 0]
    assert len(pins.read(str(tmp_path))) == 100


def test_damaged_pins_keep_all(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path, [1])
    pins.add(str(tmp_path), 1, "paper")
    path = tmp_path / "pins.json"
    path.write_bytes(path.read_bytes()[:-5])
    save_steps(tmp_path, [2, 3], retention.Last(1))
    assert steps_in(tmp_path) == [1, 2, 3]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Holds a checkpoint, pins, and where a run saved to."""
    directory = tmp_path_factory.mktemp("kept")
    save_steps(directory, [1])
    return directory


@hypothesis.given(st.data())
def test_no_value_beside_the_checkpoints_surprises_their_readers(
    kept: pathlib.Path, data: st.DataObject
) -> None:
    sound = {"pins": {"paper": 1}}, {"directories": ["checkpoints", "/other"]}
    for name, body in zip(("pins.json", "saved.json"), sound, strict=True):
        changed = data.draw(odd_values.mutations(body))
        (kept / name).write_bytes(sealed.dumps(changed))
    rows = listing.find(str(kept))
    assert listing.lines(rows)
    assert rows[0].state == "whole"
    assert listing.recorded(str(kept)) is not None
    with contextlib.suppress(sealed.DamagedError):
        assert all(
            step in range(2**63) for step in pins.read(str(kept)).values()
        )


def test_nothing_is_removed_before_its_successor_verifies(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk swallows what is written, and says that all went well."""
    save_steps(tmp_path, [1], retention.Last(1))
    commit = CheckpointDirectory.commit

    def commit_badly(self: CheckpointDirectory, step: int, *rest: object):  # noqa: ANN202
        made = commit(self, step, *rest)
        data = pathlib.Path(f"{self.prefix(step)}.data-00000-of-00001")
        content = bytearray(data.read_bytes())
        content[3] ^= 1
        data.write_bytes(content)
        return made

    monkeypatch.setattr(CheckpointDirectory, "commit", commit_badly)
    with pytest.raises(errors.StorageError, match="reads back wrong"):
        save_steps(tmp_path, [2], retention.Last(1))
    assert steps_in(tmp_path) == [1]
    assert (tmp_path / "quarantine/ckpt-2/reason.txt").exists()


def test_save_counter_is_the_step(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path / "often", [3, 5, 6, 10])
    save_steps(tmp_path / "once", [10])
    often, once = (
        CheckpointDirectory(f"{tmp_path}/{name}").manifest(10)
        for name in ("often", "once")
    )
    assert often.state == once.state
    assert (
        once.state != CheckpointDirectory(f"{tmp_path}/often").manifest(6).state
    )


def test_a_failed_save_is_told_of(tmp_path: pathlib.Path) -> None:
    (tmp_path / "pending").write_text("in the way")
    state = make_state()
    manager = checkpoint_lib.CheckpointManager(state, str(tmp_path))
    manager.save(1)
    with pytest.raises(errors.StorageError, match="Not a directory"):
        manager.close()


def test_two_managers_of_one_directory(tmp_path: pathlib.Path) -> None:
    """It may restore, and changes nothing; what it saves would be lost."""
    state = make_state()
    with (
        checkpoint_lib.CheckpointManager(state, str(tmp_path)) as manager,
        checkpoint_lib.CheckpointManager(state, str(tmp_path)) as another,
    ):
        manager.save(1, wait=True)
        pending = tmp_path / "pending/ckpt-2.json"
        pending.parent.mkdir()
        pending.touch()
        assert another.restore() == 1
        assert pending.exists()
        with pytest.raises(errors.UserError, match="this process saves in"):
            another.save(2)
        with pytest.raises(errors.UserError, match="this process saves in"):
            checkpoint_tool.run(["prune", str(tmp_path), "--max_to_keep=1"])
        manager.close()
        another.save(2, wait=True)
        shutil.move(tmp_path, f"{tmp_path}-moved")
        with pytest.raises(errors.UserError, match="was moved or removed"):
            another.save(3, wait=True)


def test_a_manager_that_nobody_has_any_more(tmp_path: pathlib.Path) -> None:
    """As that of a notebook's cell that is run again."""
    state = make_state()
    for step in (1, 2):
        checkpoint_lib.CheckpointManager(state, str(tmp_path)).save(
            step, wait=True
        )
        gc.collect()
    with checkpoint_lib.CheckpointManager(state, str(tmp_path)) as manager:
        assert manager.steps() == [1, 2]


def test_stock_tensorflow_reads_it(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path, [5, 10, 15, 20])
    newest = tf.train.latest_checkpoint(str(tmp_path))
    assert newest == f"{tmp_path}/ckpt-20"
    state = make_state()
    state.restore(newest).assert_consumed()
    np.testing.assert_array_equal(state.weights, [20.0, 21.0])
    manager = tf.train.CheckpointManager(state, str(tmp_path), max_to_keep=2)
    assert manager.checkpoints == [f"{tmp_path}/ckpt-{n}" for n in (10, 15, 20)]
    assert manager.restore_or_initialize() == newest
    # And it goes on from there by the rules of its own.
    assert manager.save(checkpoint_number=25) == f"{tmp_path}/ckpt-25"
    assert tf.train.latest_checkpoint(str(tmp_path)) == f"{tmp_path}/ckpt-25"


def test_stock_tensorflow_finds_it_by_a_relative_path_and_when_moved(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_steps(pathlib.Path("runs/a"), [5, 10])
    save_steps(tmp_path / "runs/b", [5, 10])
    (tmp_path / "runs").rename("moved")
    for name in ("a", "b"):
        for directory in (f"moved/{name}", f"{tmp_path}/moved/{name}"):
            newest = tf.train.latest_checkpoint(directory)
            assert newest == f"{directory}/ckpt-10"
            make_state().restore(newest).assert_consumed()


def test_one_that_a_person_removed_is_not_missed(
    tmp_path: pathlib.Path,
) -> None:
    state = make_state()
    manager = checkpoint_lib.CheckpointManager(state, str(tmp_path))
    for step in range(1, 6):
        manager.save(step, wait=True)
        for path in tmp_path.glob("ckpt-2.*"):
            path.unlink()
    assert steps_in(tmp_path) == [3, 4, 5]
    assert tf.train.latest_checkpoint(str(tmp_path)) == f"{tmp_path}/ckpt-5"
