"""When a run saves, and where it goes on."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import tensorflow as tf

from dtrain.cluster import environment
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.run import checkpointer as checkpointer_lib
from dtrain.run import resuming
from tests import replicas
from tests.checkpoint_test import make_state, save_steps, steps_in

# Where a run goes on.


def checkpointer(
    run_dir: pathlib.Path,
    state: tf.train.Checkpoint | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    is_chief: bool = True,
    **settings: object,
) -> checkpointer_lib.Checkpointer:
    config = Config(run_dir=str(run_dir), **settings)
    workers = environment.ALONE
    if not is_chief:
        workers = environment.Cluster(("a:1", "b:1"), 1)
    return checkpointer_lib.Checkpointer(
        state or make_state(), config, workers, clock=clock
    )


def restored(run_dir: pathlib.Path) -> tuple[str | None, float]:
    """Restores a run; returns the prefix below run_dir, and the weights."""
    state = make_state(-1.0)
    prefix = (
        checkpointer(run_dir, state).restore(replicas.alone()).prefix or None
    )
    if prefix is not None:
        prefix = str(pathlib.Path(prefix).relative_to(run_dir))
    return prefix, float(state.weights[0])


def test_a_fresh_run_restores_nothing(tmp_path: pathlib.Path) -> None:
    assert restored(tmp_path) == (None, -1.0)


@pytest.mark.parametrize(
    ("checkpoints", "backups", "expected"),
    [
        ([5, 10], [12], "backup/ckpt-12"),
        ([5, 10], [8], "checkpoints/ckpt-10"),
        ([], [3, 4], "backup/ckpt-4"),
        ([9, 100], [], "checkpoints/ckpt-100"),
        ([7], [7], "checkpoints/ckpt-7"),
    ],
)
def test_the_newer_tier_wins(
    checkpoints: list[int],
    backups: list[int],
    expected: str,
    tmp_path: pathlib.Path,
) -> None:
    save_steps(tmp_path / "checkpoints", checkpoints)
    save_steps(tmp_path / "backup", backups)
    newest = max(checkpoints + backups)
    assert restored(tmp_path) == (expected, float(newest))


def truncate_pointer(directory: pathlib.Path) -> None:
    path = directory / "checkpoint"
    path.write_bytes(path.read_bytes()[:30])


def empty_pointer(directory: pathlib.Path) -> None:
    (directory / "checkpoint").write_bytes(b"")


def remove_pointer(directory: pathlib.Path) -> None:
    (directory / "checkpoint").unlink()


def old_pointer(directory: pathlib.Path) -> None:
    (directory / "checkpoint").write_text('model_checkpoint_path: "ckpt-1"\n')


@pytest.mark.parametrize(
    "damage",
    [
        truncate_pointer,
        empty_pointer,
        remove_pointer,
        old_pointer,
    ],
)
@pytest.mark.parametrize("tier", ["checkpoints", "backup"])
def test_the_newest_whole_state_is_found(
    damage: Callable[[pathlib.Path], None], tier: str, tmp_path: pathlib.Path
) -> None:
    save_steps(tmp_path / tier, [1, 2])
    damage(tmp_path / tier)
    assert restored(tmp_path) == (f"{tier}/ckpt-2", 2.0)
    # And the next save mends the pointer.
    save_steps(tmp_path / tier, [3])
    assert tf.train.latest_checkpoint(str(tmp_path / tier)).endswith("ckpt-3")


def test_a_pointer_without_checkpoints(tmp_path: pathlib.Path) -> None:
    tier = tmp_path / "checkpoints"
    tier.mkdir()
    (tier / "checkpoint").write_bytes(b"\0\0\0\0")
    assert restored(tmp_path) == (None, -1.0)
    save_steps(tier, [1])
    assert restored(tmp_path) == ("checkpoints/ckpt-1", 1.0)


def test_resume_never_and_must(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"resume \(must\).*no checkpoint"):
        checkpointer(tmp_path, resume="must").restore(replicas.alone())
    save_steps(tmp_path / "backup", [4])
    with pytest.raises(UserError, match=r"resume \(never\).* up to step 4"):
        checkpointer(tmp_path, resume="never").restore(replicas.alone())
    assert checkpointer(tmp_path, resume="must").restore(replicas.alone())


def test_one_step_of_a_run(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path / "checkpoints", [1, 2, 3])
    config = Config(run_dir=str(tmp_path))
    state = make_state()
    resuming.restore_step(state, config, 2)
    assert float(state.weights[0]) == 2.0
    with pytest.raises(UserError, match="of step 0; there: 1, 2, 3"):
        resuming.restore_step(state, config, 0)


@pytest.mark.parametrize(
    "state",
    [
        lambda: tf.train.Checkpoint(
            step=tf.Variable(0, dtype=tf.int64), weights=tf.Variable([0.0] * 3)
        ),
        lambda: tf.train.Checkpoint(step=tf.Variable(0, dtype=tf.int64)),
        lambda: tf.train.Checkpoint(
            weights=tf.Variable([0.0, 0.0]),
            step=tf.Variable(0, dtype=tf.int64),
            more=tf.Variable(0.0),
        ),
    ],
    ids=["another shape", "less", "more"],
)
def test_a_state_that_does_not_fit(
    state: Callable[[], tf.train.Checkpoint], tmp_path: pathlib.Path
) -> None:
    save_steps(tmp_path / "checkpoints", [1])
    with pytest.raises(UserError) as caught:
        checkpointer(tmp_path, state()).restore(replicas.alone())
    said = caught.value.text
    assert "ckpt-1 does not fit the networks of --model=dcgan: " in said
    assert said.endswith("make the model as it was, or name another run_dir")
    assert "{" not in said


# When it saves.


def save_last(saver: checkpointer_lib.Checkpointer, step: int) -> None:
    saver.begin_last(step)
    saver.drain()


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.secs = 0.0

    def __call__(self) -> float:
        return self.secs


def saves(
    run_dir: pathlib.Path,
    secs_per_step: float,
    num_steps: int,
    **settings: object,
) -> list[str]:
    """Runs the loop's part of saving; returns what was saved, in order."""
    clock = Clock()
    saver = checkpointer(run_dir, None, clock, **settings)
    made = []
    for step in range(1, num_steps + 1):
        clock.secs += secs_per_step
        if saver.due(step):
            saver.save(step)
            saver.wait()
            assert not saver.due(step), "saved twice"
            made += [
                f"{tier}/ckpt-{step}"
                for tier in ("backup", "checkpoints")
                if step in steps_in(run_dir / tier)
            ]
    return made


def test_checkpoints_by_the_step(tmp_path: pathlib.Path) -> None:
    made = saves(
        tmp_path, 1.0, 10, checkpoint_every_steps=4, backup_every_secs=0
    )
    assert made == ["checkpoints/ckpt-4", "checkpoints/ckpt-8"]


def test_checkpoints_by_the_clock(tmp_path: pathlib.Path) -> None:
    by_the_clock = {"checkpoint_every_steps": 0, "checkpoint_every_secs": 2.5}
    made = saves(tmp_path, 1.0, 10, **by_the_clock, backup_every_secs=0)
    assert made == [f"checkpoints/ckpt-{step}" for step in (3, 6, 9)]


def test_a_checkpoint_serves_as_a_backup(tmp_path: pathlib.Path) -> None:
    made = saves(
        tmp_path, 1.0, 11, checkpoint_every_steps=5, backup_every_secs=3
    )
    assert made == [
        "backup/ckpt-3",
        "checkpoints/ckpt-5",
        "backup/ckpt-8",
        "checkpoints/ckpt-10",
    ]


def test_nothing_is_saved_unasked(tmp_path: pathlib.Path) -> None:
    never = {"checkpoint_every_steps": 0, "backup_every_secs": 0}
    assert saves(tmp_path, 1e6, 5, **never) == []
    assert not list(tmp_path.iterdir())


def test_backups_are_two_and_leave_at_the_end(tmp_path: pathlib.Path) -> None:
    saves(tmp_path, 1.0, 9, checkpoint_every_steps=0, backup_every_secs=1)
    assert steps_in(tmp_path / "backup") == [8, 9]
    saver = checkpointer(tmp_path)
    save_last(saver, 10)
    saver.complete()
    saver.complete()
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints",
        "saved.json",
    }


def test_a_restored_step_is_not_saved_again(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path / "backup", [6])
    saver = checkpointer(tmp_path, checkpoint_every_steps=3)
    saver.restore(replicas.alone())
    assert not saver.due(6)
    assert saver.due(9)


def test_a_step_is_saved_once(tmp_path: pathlib.Path) -> None:
    state = make_state()
    saver = checkpointer(tmp_path, state)
    save_last(saver, 4)
    state.weights.assign([9.0, 9.0])
    save_last(saver, 4)
    assert restored(tmp_path) == ("checkpoints/ckpt-4", 0.0)


def test_other_workers_write_nothing(tmp_path: pathlib.Path) -> None:
    clock = Clock()
    saver = checkpointer(
        tmp_path, None, clock, is_chief=False, checkpoint_every_steps=1
    )
    clock.secs = 1e6
    assert not saver.due(1)
    saver.save(1)
    save_last(saver, 2)
    saver.complete()
    saver.close()
    assert not list(tmp_path.iterdir())


def test_other_workers_back_up_on_their_own_disk(
    tmp_path: pathlib.Path,
) -> None:
    saver = checkpointer(
        tmp_path / "run", is_chief=False, backup_dir=f"{tmp_path}/ssd"
    )
    for step in (1, 2, 3):
        saver.save(step)
        saver.wait()
    [directory] = (tmp_path / "ssd").iterdir()
    assert steps_in(directory / "worker-1") == [2, 3]
    saver.complete()
    assert [path.name for path in tmp_path.iterdir()] == ["ssd"]
    assert not list((tmp_path / "ssd").iterdir())


def test_a_save_that_fails_is_tried_again(tmp_path: pathlib.Path) -> None:
    clock = Clock()
    saver = checkpointer(
        tmp_path, None, clock, checkpoint_every_steps=5, backup_every_secs=0
    )
    (tmp_path / "checkpoints").write_text("in the way")
    assert saver.due(5)
    saver.save(5)
    saver.wait()
    assert saver.rearm_failed_save() == "the save failed: Not a directory"
    assert saver.rearm_failed_save() == ""
    assert not saver.due(6)
    (tmp_path / "checkpoints").unlink()
    clock.secs += 60
    assert saver.due(7)
    saver.save(7)
    saver.wait()
    assert not saver.rearm_failed_save()
    assert steps_in(tmp_path / "checkpoints") == [7]
    assert not saver.due(8)


def test_damaged_pins_are_told_of(tmp_path: pathlib.Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/pins.json").write_text("{}")
    [note] = checkpointer(tmp_path).restore(replicas.alone()).notes
    assert "pins.json is damaged" in note


def test_a_backup_that_fails_brings_no_checkpoint_forward(
    tmp_path: pathlib.Path,
) -> None:
    clock = Clock()
    saver = checkpointer(
        tmp_path, None, clock, checkpoint_every_steps=50, backup_every_secs=5
    )
    (tmp_path / "backup").write_text("in the way")
    for step in range(1, 40):
        clock.secs += 10
        saver.save(step)
        saver.wait()
        assert saver.rearm_failed_save() == "the save failed: Not a directory"
    assert not (tmp_path / "checkpoints").exists()
