"""What is saved, what is kept, and where a run goes on."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain import checkpoint as checkpoint_lib
from dtrain import checkpoint_reader, checkpoint_tool, errors
from dtrain.config import Config
from dtrain.errors import UserError
from tests import runs


def make_state(value: float = 0.0) -> tf.train.Checkpoint:
    """Makes a state of two variables; the step is saved, but is not used."""
    return tf.train.Checkpoint(
        step=tf.Variable(0, dtype=tf.int64),
        weights=tf.Variable([value, value + 1.0]),
    )


def save_steps(
    directory: pathlib.Path, steps: list[int], **options: int
) -> checkpoint_lib.CheckpointManager:
    """Saves a state whose weights are its step."""
    state = make_state()
    manager = checkpoint_lib.CheckpointManager(
        state, str(directory), **{"max_to_keep": 3, **options}
    )
    for step in steps:
        state.step.assign(step)
        state.weights.assign([step, step + 1.0])
        manager.save(step)
    return manager


def steps_in(directory: pathlib.Path) -> list[int]:
    return list(checkpoint_reader.steps(str(directory)))


# The kept history.


def test_what_is_kept_on_disk(tmp_path: pathlib.Path) -> None:
    save_steps(
        tmp_path, [2, 4, 5, 8, 10, 11], keep_every_n_steps=4, max_to_keep=2
    )
    steps = (4, 8, 10, 11)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint",
        *(f"ckpt-{step}.index" for step in steps),
        *(f"ckpt-{step}.data-00000-of-00001" for step in steps),
    }


def test_what_is_kept_is_told_by_the_directory_after_a_restart(
    tmp_path: pathlib.Path,
) -> None:
    save_steps(tmp_path, [1, 2, 3])
    save_steps(tmp_path, [4])
    assert steps_in(tmp_path) == [2, 3, 4]


def test_save_counter_is_the_step(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path / "often", [3, 5, 6, 10])
    save_steps(tmp_path / "once", [10])
    digests = [
        checkpoint_reader.digest(f"{tmp_path}/{name}/ckpt-10")
        for name in ("often", "once")
    ]
    assert digests[0] == digests[1]
    values = dict(checkpoint_reader.variables(f"{tmp_path}/once/ckpt-10"))
    assert values["save_counter"] == 10


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
    assert steps_in(tmp_path) == [20, 25]


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


# Where a run goes on.


def checkpointer(
    run_dir: pathlib.Path,
    state: tf.train.Checkpoint | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    is_chief: bool = True,
    **settings: object,
) -> checkpoint_lib.Checkpointer:
    config = Config(run_dir=str(run_dir), **settings)
    return checkpoint_lib.Checkpointer(
        state or make_state(), config, is_chief=is_chief, clock=clock
    )


def restored(run_dir: pathlib.Path) -> tuple[str | None, float]:
    """Restores a run; returns the prefix below run_dir, and the weights."""
    state = make_state(-1.0)
    prefix = checkpointer(run_dir, state).restore()
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


def unfinished_save(directory: pathlib.Path) -> None:
    """What kills at several moments of a save leave behind."""
    data = next(directory.glob("ckpt-2.data*")).read_bytes()
    index = (directory / "ckpt-2.index").read_bytes()
    (directory / "ckpt-9.data-00000-of-00001").write_bytes(data)
    (directory / "ckpt-8_temp").mkdir()
    (directory / "ckpt-8_temp/part-00000-of-00001.index").write_bytes(index)
    (directory / "ckpt-7.index.tempstate123").write_bytes(index[:10])
    (directory / "ckpt-6.index_temporary").write_bytes(index)
    (directory / "checkpoint.tmp").write_bytes(b"model_ch")


@pytest.mark.parametrize(
    "damage",
    [
        truncate_pointer,
        empty_pointer,
        remove_pointer,
        old_pointer,
        unfinished_save,
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
        checkpointer(tmp_path, resume="must").restore()
    save_steps(tmp_path / "backup", [4])
    with pytest.raises(UserError, match=r"resume \(never\).* up to step 4"):
        checkpointer(tmp_path, resume="never").restore()
    assert checkpointer(tmp_path, resume="must").restore()


def test_one_step_of_a_run(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path / "checkpoints", [1, 2, 3])
    config = Config(run_dir=str(tmp_path))
    state = make_state()
    checkpoint_lib.restore_step(state, config, 2)
    assert float(state.weights[0]) == 2.0
    with pytest.raises(UserError, match="of step 0; there: 1, 2, 3"):
        checkpoint_lib.restore_step(state, config, 0)


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
        checkpointer(tmp_path, state()).restore()
    said = str(caught.value)
    assert "ckpt-1 does not fit the networks of --model=dcgan: " in said
    assert said.endswith("make the model as it was, or name another run_dir")
    assert "{" not in said


# When it saves.


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
        due = saver.due(step)
        prefix = saver.maybe_save(step)
        assert due == (prefix is not None)
        assert not saver.due(step), "saved twice"
        if prefix:
            made.append(str(pathlib.Path(prefix).relative_to(run_dir)))
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
    assert saver.save(10) == f"{tmp_path}/checkpoints/ckpt-10"
    saver.complete()
    saver.complete()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_restored_step_is_not_saved_again(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path / "backup", [6])
    saver = checkpointer(tmp_path, checkpoint_every_steps=3)
    saver.restore()
    assert not saver.due(6)
    assert saver.due(9)


def test_a_step_is_saved_once(tmp_path: pathlib.Path) -> None:
    state = make_state()
    saver = checkpointer(tmp_path, state)
    saver.save(4)
    state.weights.assign([9.0, 9.0])
    saver.save(4)
    assert restored(tmp_path) == ("checkpoints/ckpt-4", 0.0)


def test_other_workers_write_nothing(tmp_path: pathlib.Path) -> None:
    clock = Clock()
    saver = checkpointer(
        tmp_path, None, clock, is_chief=False, checkpoint_every_steps=1
    )
    clock.secs = 1e6
    assert not saver.due(1)
    assert saver.maybe_save(1) is None
    assert saver.save(1) is None
    saver.complete()
    assert not list(tmp_path.iterdir())


def test_other_workers_restore_and_leave_the_backup(
    tmp_path: pathlib.Path,
) -> None:
    save_steps(tmp_path / "backup", [6])
    state = make_state()
    saver = checkpointer(tmp_path, state, is_chief=False)
    assert saver.restore() == f"{tmp_path}/backup/ckpt-6"
    assert float(state.weights[0]) == 6.0
    saver.complete()
    assert steps_in(tmp_path / "backup") == [6]


# The digest.


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable of a state, as hypothesis makes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    seed: int

    def value(self) -> np.ndarray:
        size = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        content = np.random.default_rng(self.seed).bytes(size)
        return np.frombuffer(content, self.dtype).reshape(self.shape)


VARIABLES = st.builds(
    Variable,
    name=st.sampled_from(["a", "b", "kernel", "kernel_1"]),
    dtype=st.sampled_from(["float32", "int32", "int64", "float16"]),
    shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    seed=st.integers(0, 9),
)
STATES = st.lists(
    VARIABLES, min_size=1, max_size=3, unique_by=lambda variable: variable.name
)


def digest_of(state: list[Variable]) -> str:
    values = {each.name: tf.Variable(each.value()) for each in state}
    with tempfile.TemporaryDirectory() as directory:
        prefix = tf.train.Checkpoint(**values).write(f"{directory}/ckpt")
        return checkpoint_reader.digest(prefix)


@settings(max_examples=20)
@given(STATES)
def test_equal_states_have_equal_digests(state: list[Variable]) -> None:
    assert digest_of(state) == digest_of(state[::-1])


OTHER_DTYPES = {
    "float32": "int32",
    "int32": "float32",
    "int64": "uint64",
    "float16": "uint16",
}


def another(changed: Variable, part: str) -> Variable:
    """Changes one thing; the bytes stay, but for the part `seed`."""
    changes = {
        "name": changed.name + "x",
        "dtype": OTHER_DTYPES[changed.dtype],
        "shape": (*changed.shape, 1),
        "seed": changed.seed + 100,
    }
    return dataclasses.replace(changed, **{part: changes[part]})


@settings(max_examples=40)
@given(STATES, st.sampled_from(["name", "dtype", "shape", "seed"]), st.data())
def test_another_state_has_another_digest(
    state: list[Variable], part: str, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(state) - 1))
    changed = list(state)
    changed[place] = another(state[place], part)
    assert digest_of(changed) != digest_of(state)


def test_one_bit_changes_the_digest(tmp_path: pathlib.Path) -> None:
    one = np.float32(1.0)
    digests = set()
    for value in (one, np.nextafter(one, np.float32(2.0)), -0.0, 0.0):
        weight = tf.Variable(np.array([value], np.float32))
        state = tf.train.Checkpoint(weight=weight)
        prefix = state.write(str(tmp_path / "ckpt"))
        digests.add(checkpoint_reader.digest(prefix))
    assert len(digests) == 4


WRITE = """
import sys
import tensorflow as tf

state = tf.train.Checkpoint(
    step=tf.Variable(3, dtype=tf.int64),
    weights=tf.Variable(tf.reshape(tf.range(60.0), [3, 20])),
    names=tf.Variable([b"zero", b"one"]),
)
print(state.write(sys.argv[1]))
"""


def test_digest_is_the_same_for_two_processes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, f"{tmp_path}/{name}/ckpt-3"],
            env=runs.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in ("one", "two")
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for name in ("one/ckpt-3", "two/ckpt-3.index", "two"):
        code = checkpoint_tool.run(["digest", f"{tmp_path}/{name}"])
        assert code == errors.FINISHED
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len({digest for digest, _ in lines}) == 1
    assert [path for _, path in lines] == [
        f"{tmp_path}/{name}/ckpt-3" for name in ("one", "two", "two")
    ]
    assert len(lines[0][0]) == 64


def test_the_tools_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint_tool.run(["--help"]) == errors.FINISHED
    assert "digest CKPT" in capsys.readouterr().out


# Damage.


@settings(max_examples=60)
@given(st.data())
def test_no_damage_goes_unnoticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        run_dir = pathlib.Path(directory)
        save_steps(run_dir / "checkpoints", [3])
        whole = checkpoint_reader.digest(f"{run_dir}/checkpoints/ckpt-3")
        path = data.draw(
            st.sampled_from(sorted((run_dir / "checkpoints").glob("ckpt*")))
        )
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= data.draw(st.integers(1, 255))
        else:
            del content[place:]
        path.write_bytes(content)
        digest, said = whole, "ckpt-3"
        try:
            digest = checkpoint_reader.digest(f"{run_dir}/checkpoints/ckpt-3")
            restored(run_dir)
        except UserError as error:
            said = str(error)
        assert digest == whole
        assert "ckpt-3" in said
