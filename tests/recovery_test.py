"""A run goes on from the newest state that verifies, and says what it did."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
from typing import Any

import pytest
import tensorflow as tf

from dtrain import CheckpointManager, errors
from dtrain.checkpoint import going_on, listing, readable, snapshot
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.tier import Backup, Facts
from dtrain.cluster import environment
from dtrain.config import Config
from dtrain.run import checkpointer as checkpointer_lib
from dtrain.run import places, resuming
from dtrain.storage import claim, files
from tests import replicas

DATA = "data-00000-of-00001"


class Run:
    """Both tiers of a run, and a state whose weights are its step."""

    def __init__(self, run_dir: pathlib.Path) -> None:
        self.run_dir = run_dir
        self.weights = tf.Variable([0.0] * 10)
        self.state = tf.train.Checkpoint(weights=self.weights)

    def save(self, tier: str, *steps: int, run_id: str = "") -> Run:
        directory = CheckpointDirectory(f"{self.run_dir}/{tier}")
        facts = {"run": {"id": run_id} if run_id else {}}
        taker = snapshot.SnapshotTaker(self.state)
        for step in steps:
            self.weights.assign([float(step)] * 10)
            directory.commit(step, taker.take(step), facts)
        return self

    def damage(self, name: str) -> Run:
        path = self.run_dir / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return self

    def restore(self, run_id: str = "", **settings: str) -> resuming.Restored:
        self.weights.assign([-1.0] * 10)
        config = Config(run_dir=str(self.run_dir), **settings)
        checkpointer = checkpointer_lib.Checkpointer(
            self.state,
            config,
            environment.ALONE,
            run={"id": run_id} if run_id else {},
        )
        restored = checkpointer.restore(replicas.alone())
        if restored.manifest:
            assert set(self.weights.numpy()) == {restored.manifest.step}
        return restored


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Run:
    return Run(tmp_path / "run")


def test_falls_back_puts_aside_and_says_so(run: Run) -> None:
    run.save("checkpoints", 1, 2, 3).damage(f"checkpoints/ckpt-3.{DATA}")
    restored = run.restore()
    assert restored.prefix == f"{run.run_dir}/checkpoints/ckpt-2"
    [note] = restored.notes
    assert note.startswith(f"{run.run_dir}/checkpoints/ckpt-3 does not verify:")
    assert note.endswith(
        f"moved to {run.run_dir}/checkpoints/quarantine/ckpt-3"
    )
    assert "\n" not in note
    # And that was that.
    assert run.restore().notes == []


def test_falls_back_to_the_other_tier(run: Run) -> None:
    run.save("checkpoints", 5).save("backup", 7, 8)
    run.damage("backup/ckpt-8.json").damage("backup/ckpt-7.index")
    restored = run.restore()
    assert restored.prefix == f"{run.run_dir}/checkpoints/ckpt-5"
    assert len(restored.notes) == 2


def test_of_two_of_a_step_the_good_one_is_taken(run: Run) -> None:
    run.save("checkpoints", 5).save("backup", 5)
    run.damage(f"checkpoints/ckpt-5.{DATA}")
    assert run.restore().prefix == f"{run.run_dir}/backup/ckpt-5"


def test_older_ones_are_not_looked_at(run: Run) -> None:
    run.save("checkpoints", 1, 2).damage("checkpoints/ckpt-1.index")
    assert run.restore().notes == []
    assert not (run.run_dir / "checkpoints/quarantine").exists()


def test_never_starts_over_where_nothing_verifies(run: Run) -> None:
    run.save("checkpoints", 1, 2).save("backup", 3)
    for name in ("checkpoints/ckpt-1", "checkpoints/ckpt-2", "backup/ckpt-3"):
        run.damage(f"{name}.json")
    before = sorted(run.run_dir.rglob("*"))
    for _ in range(2):
        with pytest.raises(errors.UserError) as caught:
            run.restore()
        assert "none of them can be used" in str(caught.value)
        assert "ckpt-3 does not verify: its manifest is damaged" in str(
            caught.value
        )
        assert sorted(run.run_dir.rglob("*")) == before


def test_never_starts_over_where_all_is_in_quarantine(run: Run) -> None:
    run.save("checkpoints", 1, 2).damage("checkpoints/ckpt-2.index")
    assert run.restore().manifest
    CheckpointDirectory(f"{run.run_dir}/checkpoints").remove(1)
    with pytest.raises(errors.UserError, match="all there was is in quarantin"):
        run.restore()


def test_a_directory_that_is_refused_is_not_touched(run: Run) -> None:
    run.save("checkpoints", 1, 2).damage("checkpoints/ckpt-2.index")
    before = sorted(run.run_dir.rglob("*"))
    with pytest.raises(errors.UserError, match=r"resume \(never\)"):
        run.restore(resume="never")
    assert sorted(run.run_dir.rglob("*")) == before


def test_what_is_on_its_way_is_no_checkpoint(run: Run) -> None:
    """Seen by another worker, while the chief sweeps after a kill."""
    run.save("checkpoints", 1)
    checkpoints = run.run_dir / "checkpoints"
    (checkpoints / "pending").mkdir()
    (checkpoints / "ckpt-1.json").rename(checkpoints / "pending/ckpt-1.json")
    directory = CheckpointDirectory(str(checkpoints))
    seen = going_on.search([going_on.Place(directory, is_mine=False)], "full")
    assert not seen.holds_something
    assert (checkpoints / "ckpt-1.index").exists()


def test_an_unreadable_file_is_damage(run: Run) -> None:
    run.save("checkpoints", 1, 2)
    index = run.run_dir / "checkpoints/ckpt-2.index"
    index.unlink()
    index.symlink_to(index)
    assert run.restore().prefix.endswith("ckpt-1")


def test_a_memory_that_is_full_is_no_damage(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save("checkpoints", 1, 2)

    def fail(**_: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "out of memory")

    monkeypatch.setattr(tf.raw_ops, "RestoreV2", fail)
    with pytest.raises(errors.StorageError, match="out of memory"):
        run.restore()
    monkeypatch.undo()
    assert run.restore().prefix.endswith("ckpt-2")


def test_the_backup_of_a_host_that_had_another_number(run: Run) -> None:
    backup_dir = f"{run.run_dir}/ssd"
    config = Config(run_dir=str(run.run_dir), backup_dir=backup_dir)
    root = pathlib.Path(places.backup_root(config))
    run.save(f"ssd/{root.name}/worker-1", 4)
    (run.run_dir / "config.json").touch()
    restored = run.restore(backup_dir=backup_dir)
    assert restored.prefix == f"{root}/worker-1/ckpt-4"


def test_backups_of_a_run_that_is_to_start_over(
    run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory was removed, and its backups were forgotten."""
    backup_dir = f"{tmp_path}/ssd"
    config = Config(run_dir=str(run.run_dir), backup_dir=backup_dir)
    root = places.backup_root(config)
    run.save(f"../{os.path.relpath(root, tmp_path)}/worker-0", 4)
    with pytest.raises(errors.UserError) as caught:
        run.restore(backup_dir=backup_dir)
    assert "has step 4 of an earlier one; use --resume=must" in str(
        caught.value
    )
    # Either is what the person wants; a machine that starts it again goes on.
    prefix = f"{root}/worker-0/ckpt-4"
    restored = run.restore(backup_dir=backup_dir, resume="must")
    assert restored.prefix == prefix
    monkeypatch.setenv("DTRAIN_ATTEMPT", "1")
    assert run.restore(backup_dir=backup_dir).prefix == prefix
    monkeypatch.delenv("DTRAIN_ATTEMPT")
    shutil.rmtree(root)
    assert run.restore(backup_dir=backup_dir).prefix == ""


def test_backups_of_an_earlier_run_of_the_same_path(run: Run) -> None:
    """It was started over on another host, and comes back to this one."""
    backup_dir = f"{run.run_dir}/ssd"
    config = Config(run_dir=str(run.run_dir), backup_dir=backup_dir)
    own = f"ssd/{pathlib.Path(places.backup_root(config)).name}/worker-0"
    prefix = f"{run.run_dir}/{own}/ckpt"
    run.save(own, 8, 9, run_id="before")
    (run.run_dir / "config.json").touch()
    # Before its first save it begins, too, and with no state of another.
    assert run.restore("now", backup_dir=backup_dir).prefix == ""
    run.save("checkpoints", 3, run_id="now")
    restored = run.restore("now", backup_dir=backup_dir)
    assert restored.prefix == f"{run.run_dir}/checkpoints/ckpt-3"
    assert restored.notes == [
        f"{prefix}-{step} is of an earlier run; passed over" for step in (9, 8)
    ]
    # They take no place from those of this run, nor of one without an id.
    tier = Backup(f"{run.run_dir}/{own}", run={"id": "now"})
    taker = snapshot.SnapshotTaker(run.state)
    for step in (4, 5, 6):
        run.weights.assign([float(step)] * 10)
        tier.writing(step, taker.take(step), Facts())()
    assert tier.directory.steps() == [5, 6, 8, 9]
    restored = run.restore("now", backup_dir=backup_dir)
    assert restored.prefix == f"{prefix}-6"
    assert run.restore("before", backup_dir=backup_dir).prefix == f"{prefix}-9"
    assert run.restore(backup_dir=backup_dir).prefix == f"{prefix}-9"


def test_a_search_moves_only_what_is_ones_own(run: Run) -> None:
    run.save("checkpoints", 1, 2).damage("checkpoints/ckpt-2.index")
    directory = CheckpointDirectory(f"{run.run_dir}/checkpoints")
    seen = going_on.search([going_on.Place(directory, is_mine=False)], "full")
    assert seen.newest
    assert seen.newest.manifest.step == 1
    assert seen.notes[0].endswith("; passed over")
    assert directory.candidates() == [1, 2]


def test_never_starts_over_where_a_run_was_saved_elsewhere(
    run: Run,
) -> None:
    """Its disk is not mounted, or its flag forgotten."""
    elsewhere = run.run_dir.parent / "elsewhere"
    config = Config(run_dir=str(run.run_dir), checkpoint_dir=str(elsewhere))
    run.run_dir.mkdir()
    directory = CheckpointDirectory(str(elsewhere))
    directory.commit(3, snapshot.SnapshotTaker(run.state).take(3))
    run.weights.assign([3.0] * 10)
    directory.commit(3, snapshot.SnapshotTaker(run.state).take(3))
    places.record(config, environment.ALONE)
    assert run.restore().prefix == f"{elsewhere}/ckpt-3"

    elsewhere.rename(run.run_dir.parent / "not mounted")
    with pytest.raises(errors.UserError) as caught:
        run.restore()
    assert f"was saved to {elsewhere}, " in str(caught.value)
    assert "nothing of it is there" in str(caught.value)
    (run.run_dir / "saved.json").write_text("damaged")
    with pytest.raises(errors.UserError, match="a directory that cannot be"):
        run.restore()


def test_a_run_that_was_moved_finds_its_own(run: Run) -> None:
    run.save("checkpoints", 2)
    places.record(Config(run_dir=str(run.run_dir)), environment.ALONE)
    moved = run.run_dir.rename(run.run_dir.with_name("moved"))
    run.run_dir = moved
    assert run.restore().prefix == f"{moved}/checkpoints/ckpt-2"
    assert listing.recorded(str(moved)) == [
        f"{moved}/backup",
        f"{moved}/checkpoints",
    ]


def test_a_disk_that_reads_nothing_is_no_damage(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save("checkpoints", 1, 2)

    def fail(path: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(files, "read", fail)
    with pytest.raises(errors.StorageError, match="Input/output error"):
        run.restore()


def failing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
) -> list[str]:
    """Has reads of a checkpoint fail; returns what was asked for."""
    asked: list[str] = []
    is_of_tensorflow = isinstance(error, tf.errors.OpError)
    home, name = (
        (tf.raw_ops, "RestoreV2") if is_of_tensorflow else (files, "size")
    )
    real = getattr(home, name)

    def fail(*arguments: object, **named: object) -> object:
        path = str(named.get("prefix", arguments[:1]))
        if "ckpt-2" in path:
            asked.append(path)
            if len(asked) <= times:
                raise error
        return real(*arguments, **named)

    monkeypatch.setattr(home, name, fail)
    return asked


TROUBLE = [
    *(OSError(errno.EIO, "e"), OSError(errno.ECONNRESET, "e")),
    *(OSError(errno.EHOSTUNREACH, "e"), OSError(errno.ESTALE, "e")),
    tf.errors.UnknownError(None, None, "Input/output error"),
    tf.errors.UnavailableError(None, None, "Connection reset by peer"),
    tf.errors.DeadlineExceededError(None, None, "timed out"),
]
every_trouble = pytest.mark.parametrize(
    "error", TROUBLE, ids=lambda error: f"{type(error).__name__}-{error}"
)


@every_trouble
def test_trouble_that_passes_is_no_damage(
    error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save("checkpoints", 1, 2)
    asked = failing(monkeypatch, error, times=1)
    restored = run.restore()
    assert restored.prefix == f"{run.run_dir}/checkpoints/ckpt-2"
    assert restored.notes == []
    assert len(asked) > 1


@every_trouble
def test_trouble_that_stays(
    error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not read one file is damaged there; a host that does
    not answer may do so later."""
    run.save("checkpoints", 1, 2)
    failing(monkeypatch, error, times=1000)
    monkeypatch.setattr(readable, "_PAUSES_SECS", (0.0, 0.0))
    if "Input/output" in str(error) or "Errno 5]" in str(error):
        assert run.restore().prefix == f"{run.run_dir}/checkpoints/ckpt-1"
        assert (run.run_dir / "checkpoints/quarantine/ckpt-2").exists()
    else:
        with pytest.raises(errors.StorageError):
            run.restore()
        assert not (run.run_dir / "checkpoints/quarantine").exists()


@pytest.mark.parametrize("name", [f"ckpt-3.{DATA}", "ckpt-3.index"])
def test_sizes_alone_do_not_show_damage(name: str, run: Run) -> None:
    """What TensorFlow finds at the restore is put aside as well."""
    run.save("checkpoints", 1, 2, 3).damage(f"checkpoints/{name}")
    restored = run.restore(verify="sizes")
    assert restored.prefix == f"{run.run_dir}/checkpoints/ckpt-2"
    assert len(restored.notes) == 1
    assert (run.run_dir / "checkpoints/quarantine/ckpt-3").exists()


@pytest.mark.parametrize("reader", ["run", "manager"])
def test_what_is_removed_while_it_is_read(
    reader: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that goes on saving, and keeps one: the next is taken."""
    run.save("checkpoints", 1)
    path = f"{run.run_dir}/checkpoints"
    directory = CheckpointDirectory(path)
    real = going_on.restore
    removed: list[int] = []

    def sweep(*arguments: Any, **words: str) -> None:
        if len(removed) < 2:
            removed.append(len(removed) + 1)
            run.save("checkpoints", removed[-1] + 1)
            directory.remove(removed[-1])
        real(*arguments, **words)

    monkeypatch.setattr(going_on, "restore", sweep)
    if reader == "run":
        config = Config(run_dir=str(run.run_dir))
        resuming.restore_step(run.state, config)
    else:
        with claim.claim(path), CheckpointManager(run.state, path) as manager:
            assert manager.restore() == 3
    assert set(run.weights.numpy()) == {3.0}
    assert removed == [1, 2]
