"""A save is killed at each of its points, by a real SIGKILL.

Each of these processes is forked from one that has TensorFlow imported and not
used. It costs a quarter of a second, so every point can have its own.
"""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from dtrain.bundle import writer
from dtrain.checkpoint import going_on, pins, retention
from dtrain.checkpoint import manager as checkpoint_lib
from dtrain.checkpoint.directory import INDEX, MANIFEST, CheckpointDirectory
from dtrain.cluster.environment import ALONE
from dtrain.config import Config
from dtrain.run import checkpointer as checkpointer_lib
from dtrain.run import places
from dtrain.storage import files
from tests import faults, replicas

# The short form kills where it leaves something else than just before.
IS_LONG = "DTRAIN_NUM_KILLS" in os.environ
NUM_KILLS = int(os.environ.get("DTRAIN_NUM_KILLS", "10"))

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])


class Process:
    """A process that answers once, unless it is killed before."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.receiver, sender = FORKED.Pipe(duplex=False)
        self._process = FORKED.Process(
            target=_answer, args=(sender, function, *arguments)
        )
        self._process.start()
        sender.close()

    def finish(self) -> Any:
        """Waits for its end; returns its answer, or None if it was killed."""
        try:
            answer, failure = self.receiver.recv()
        except EOFError:
            answer, failure = None, ""
        self._process.join()
        assert not failure, failure
        code = 0 if answer is not None else -signal.SIGKILL
        assert self._process.exitcode == code
        return answer

    def kill(self) -> None:
        self._process.kill()


def run_forked(function: Callable[..., Any], *arguments: Any) -> Any:
    return Process(function, *arguments).finish()


def run_all(
    function: Callable[..., Any], calls: Sequence[Sequence[Any]]
) -> list[Any]:
    """Runs a process for each call, two at a time."""
    answers: list[Any] = []
    running: collections.deque[Process] = collections.deque()
    for arguments in calls:
        running.append(Process(function, *arguments))
        if len(running) == 2:
            answers.append(running.popleft().finish())
    return [*answers, *(process.finish() for process in running)]


def _answer(
    sender: connection.Connection,
    function: Callable[..., Any],
    *arguments: Any,
) -> None:
    try:
        # Each process would take all of its memory.
        tf.config.set_visible_devices([], "GPU")
        sender.send((function(*arguments), ""))
    except Exception:
        sender.send((None, traceback.format_exc()))
        raise


# A state that tells of what moment it is.


def weights(step: int, version: int = 0) -> np.ndarray:
    return np.random.default_rng((step, version)).random(999, np.float32)


def make_state() -> tf.train.Checkpoint:
    return tf.train.Checkpoint(
        step=tf.Variable(0, dtype=tf.int64),
        version=tf.Variable(0, dtype=tf.int64),
        weights=tf.Variable(tf.zeros([999])),
    )


def assign(state: Any, step: int, version: int = 0) -> None:
    state.step.assign(step)
    state.version.assign(version)
    state.weights.assign(weights(step, version))


def seen(state: Any) -> int:
    """Returns the step of a state, all of which must be of one moment."""
    step, version = int(state.step), int(state.version)
    np.testing.assert_array_equal(state.weights, weights(step, version))
    return step


def config_of(root: str) -> Config:
    return Config(
        run_dir=f"{root}/run",
        backup_dir=f"{root}/ssd",
        checkpoint_every_steps=1,
        max_to_keep=2,
    )


def copy_root(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a run; its backups are in a directory that its path names."""
    shutil.copytree(source, target)
    for old in (target / "ssd").glob("*"):
        old.rename(places.backup_root(config_of(str(target))))
    # It names the directories of the other one.
    (target / "run/saved.json").unlink(missing_ok=True)


def listing(root: str) -> list[str]:
    """Lists all files of a run, sorted, by their paths in it."""
    found = (each for each in pathlib.Path(root).rglob("*") if each.is_file())
    return sorted(
        re.sub("ssd/run-[0-9a-f]+", "ssd", str(each.relative_to(root)))
        for each in found
    )


@pytest.fixture(autouse=True)
def supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is killed here is started again by no person."""
    monkeypatch.setenv("DTRAIN_ATTEMPT", "1")


def checkpointer(root: str, state: Any) -> checkpointer_lib.Checkpointer:
    """Opens a run that saves each step in both tiers."""
    return checkpointer_lib.Checkpointer(state, config_of(root), ALONE)


# What is killed. Each of these goes on from what is there.


def run_steps(root: str, *steps: int) -> int:
    """Saves steps as a run does; returns where it went on, or 0."""
    state = make_state()
    saver = checkpointer(root, state)
    restored = saver.restore(replicas.alone())
    assert not restored.notes, restored.notes
    start = seen(state) if restored.manifest else 0
    for step in steps:
        if step > start:
            assign(state, step)
            saver.save(step)
    saver.close()
    return start


def finish(root: str) -> int:
    """Removes the backups of a run that has nothing left to do."""
    state = make_state()
    saver = checkpointer(root, state)
    restored = saver.restore(replicas.alone())
    assert not restored.notes, restored.notes
    saver.begin_last(seen(state))
    saver.drain()
    saver.complete()
    saver.close()
    return seen(state)


def _tiers(root: str) -> list[pathlib.Path]:
    ssd = pathlib.Path(root, "ssd").glob("*/*")
    return [pathlib.Path(root, "run/checkpoints"), *ssd]


def save_again(root: str) -> int:
    """Saves a step, and then again with another state."""
    state = make_state()
    manager = checkpoint_lib.CheckpointManager(
        state, str(_tiers(root)[0]), (retention.Last(2),)
    )
    for version in (0, 1):
        assign(state, 3, version)
        manager.save(3, wait=True)
    manager.close()
    return 3


def put_aside(root: str) -> int:
    """Finds that a state is damaged, and goes on from the one before."""
    state = make_state()
    saver = checkpointer(root, state)
    saver.restore(replicas.alone())
    saver.close()
    return seen(state)


def pin(root: str) -> int:
    directory = str(_tiers(root)[0])
    pins.add(directory, 1, "first")
    pins.add(directory, 2, "second")
    pins.remove(directory, "first")
    return run_steps(root)


def damage_newest(root: pathlib.Path) -> None:
    for directory in _tiers(str(root)):
        [path] = directory.glob("ckpt-2.data-*")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


class Case(NamedTuple):
    """Something that is killed.

    Attributes:
        before: steps that are saved already.
        action: what is killed.
        after: the steps where the next process goes on, in the order of the
            points.
        is_damaged: whether the newest of `before` is.
    """

    before: tuple[int, ...]
    action: Callable[[str], int]
    after: tuple[int, ...]
    is_damaged: bool = False


def first(root: str) -> int:
    return run_steps(root, 1)


def replace_and_prune(root: str) -> int:
    return run_steps(root, 3)


CASES = {
    "first": Case((), first, (0, 1)),
    "prune": Case((1, 2), replace_and_prune, (2, 3)),
    "finish": Case((1, 2), finish, (2,)),
    "again": Case((1, 2), save_again, (2, 3, 2, 3)),
    "quarantine": Case((1, 2), put_aside, (1,), is_damaged=True),
    "pin": Case((1, 2), pin, (2,)),
}
# Where the next processes end.
LAST_STEP = 5


def _prepare(case: Case, root: str) -> bool:
    os.mkdir(root)
    run_steps(root, *case.before)
    if case.is_damaged:
        damage_newest(pathlib.Path(root))
    return True


def _injected(root: str, at: int | None, is_store: bool) -> faults.Faults:
    # What is on its way to a store is written here first.
    tempfile.tempdir = f"{root}/tmp"
    os.makedirs(tempfile.tempdir, exist_ok=True)
    store = f"{root}/run" if is_store else None
    return faults.Faults(at, store=store, watched=root if at is None else "")


def _kill(
    case: Case, root: str, at: int | None, is_store: bool
) -> list[tuple[int, str]]:
    """Runs a case to one of its points; returns all if it is told none."""
    with _injected(root, at, is_store).injected() as layer:
        case.action(root)
    return [
        (number, point)
        for number, point in enumerate(layer.points)
        if IS_LONG or layer.is_new[number]
    ]


def _go_on(
    case: Case, roots: list[str], is_store: bool
) -> list[tuple[int, list[str]]]:
    """Goes on from each; returns where, and what lies there at the end."""
    answers = []
    for root in roots:
        with _injected(root, None, is_store).injected():
            start = (put_aside if case.is_damaged else run_steps)(root)
            run_steps(root, *range(1, LAST_STEP + 1))
        answers.append((start, listing(root)))
    return answers


# A store is this disk, written to as to a store.
PLACES = ("disk", "store")
RUNS = (
    [(name, place) for name in CASES for place in PLACES]
    if IS_LONG
    else [
        ("prune", "disk"),
        ("prune", "store"),
        ("finish", "disk"),
        ("again", "disk"),
        ("quarantine", "disk"),
        ("pin", "disk"),
    ]
)


@pytest.mark.parametrize(("name", "place"), RUNS)
def test_killed_at_every_point(
    name: str, place: str, tmp_path: pathlib.Path
) -> None:
    case, is_store = CASES[name], place == "store"
    before, whole = tmp_path / "before", tmp_path / "whole"
    assert run_forked(_prepare, case, str(before))
    copy_root(before, whole)
    points = run_forked(_kill, case, str(whole), None, is_store)
    [(_, left)] = run_forked(_go_on, case, [str(whole)], is_store)

    roots = [tmp_path / str(at) for at, _ in points]
    for root in roots:
        copy_root(before, root)

    assert not any(
        run_all(
            _kill,
            [(case, str(tmp_path / str(at)), at, is_store) for at, _ in points],
        )
    )
    half = len(roots) // 2
    halves = run_all(
        _go_on,
        [
            (case, list(map(str, some)), is_store)
            for some in (roots[:half], roots[half:])
        ],
    )
    answers = [*halves[0], *halves[1]]

    for (_, point), (start, there) in zip(points, answers, strict=True):
        print(f"{start} {point}")
        assert start in case.after
        check_left(name, there, left)
    starts = [start for start, _ in answers]
    assert tuple(key for key, _ in itertools.groupby(starts)) == case.after


def check_left(name: str, there: list[str], expected: list[str]) -> None:
    """Checks that after the next saves there is no more than without a kill."""
    # A claim leaves it, whether or not the killed process came so far.
    there, expected = (
        [path for path in paths if not path.endswith("/.lock")]
        for paths in (there, expected)
    )
    if name == "quarantine":
        there, expected = (
            [path for path in paths if "/quarantine/" not in path]
            for paths in (there, expected)
        )
    if name == "pin":
        # Which of the pins are there is told by where it was killed.
        pinned = {"run/checkpoints/pins.json", *files_of(1), *files_of(2)}
        assert {*expected} - pinned <= {*there} <= {*expected} | pinned
    else:
        assert there == expected


def files_of(step: int) -> list[str]:
    return [
        f"run/checkpoints/ckpt-{step}.{suffix}"
        for suffix in ("data-00000-of-00001", INDEX, MANIFEST)
    ]


# Any instant.


def save_until_killed(
    root: str, sender: connection.Connection, part_bytes: int
) -> None:
    """Saves one state after the other, and tells of each that is saved.

    The variables change while they are written.
    """
    writer._PART_BYTES = part_bytes
    state = make_state()
    manager = checkpoint_lib.CheckpointManager(
        state, root, (retention.Last(2),)
    )
    manager.directory.clean()
    place = going_on.Place(manager.directory, is_mine=True)
    search = going_on.search([place], "full")
    assert not search.notes, search.notes
    step = 0
    if search.newest:
        state.restore(search.newest.prefix).assert_consumed()
        step = seen(state)
        assert step == search.newest.manifest.step
    sender.send_bytes(b"%d" % step)
    while True:
        step += 1
        assign(state, step)
        manager.save(step)
        assign(state, 0, version=step)
        # Waits until it is written.
        manager.steps()
        sender.send_bytes(b"%d" % step)


def read_steps(receiver: connection.Connection) -> Iterator[int]:
    while True:
        try:
            yield int(receiver.recv_bytes())
        except EOFError:
            return


@pytest.mark.parametrize(
    "part_bytes", [1 << 20, 1], ids=["one data file", "a file for each"]
)
def test_killed_at_random_instants(
    tmp_path: pathlib.Path, part_bytes: int
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    root = str(tmp_path / "checkpoints")
    saved = num_committed = 0
    for _ in range(NUM_KILLS):
        receiver, sender = FORKED.Pipe(duplex=False)
        process = Process(save_until_killed, root, sender, part_bytes)
        sender.close()
        steps = read_steps(receiver)
        resumed = next(steps)
        # What was being written when it was killed may have been committed.
        assert resumed in (saved, saved + 1)
        num_committed += resumed == saved + 1
        first = next(steps)
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        assert process.finish() is None
        saved = max([first, *steps])
    print(f"{num_committed} of {NUM_KILLS} saves were committed and not told")
    run_forked(check_left_by_one_save, root, part_bytes)


def check_left_by_one_save(root: str, part_bytes: int) -> int:
    writer._PART_BYTES = part_bytes
    state = make_state()
    manager = checkpoint_lib.CheckpointManager(
        state, root, (retention.Last(2),)
    )
    step = manager.directory.steps()[-1] + 1
    manager.save(step, wait=True)
    manager.close()
    names = os.listdir(root)
    assert any("-of-00001" in name for name in names) == (part_bytes > 1)
    assert {re.sub("data-.*", "data", name) for name in names} == {
        *("checkpoint", ".lock"),
        *(
            f"ckpt-{each}.{suffix}"
            for each in (step - 1, step)
            for suffix in ("data", INDEX, MANIFEST)
        ),
    }
    return step


# A power cut, which leaves less than a kill.


def save_all(path: pathlib.Path, disk: faults.Disk) -> list[tuple[int, int]]:
    """Saves steps, one of them twice; returns when each was confirmed."""
    state = make_state()
    manager = checkpoint_lib.CheckpointManager(
        state, str(path / "checkpoints"), (retention.Last(2),)
    )
    confirmed = [(0, 0)]
    for step, version in ((1, 0), (2, 0), (3, 0), (3, 1), (4, 0)):
        assign(state, step, version)
        manager.save(step, wait=True)
        confirmed.append((len(disk.log), step))
    manager.close()
    return confirmed


def go_on_after(root: pathlib.Path) -> int:
    """Returns the step of the state that a directory has; 0 is none."""
    directory = CheckpointDirectory(f"{root}/checkpoints")
    directory.clean()
    search = going_on.search([going_on.Place(directory, is_mine=True)], "full")
    assert not search.notes, search.notes
    if search.newest is None:
        return 0
    state = make_state()
    state.restore(search.newest.prefix).assert_consumed()
    return seen(state)


def cut_everywhere(tmp_path: pathlib.Path, num_cuts: int) -> set[int]:
    """Cuts the power at each moment; returns the steps that were found."""
    path = tmp_path / "whole"
    path.mkdir()
    disk = faults.Disk(path)
    with disk.watched():
        confirmed = save_all(path, disk)
    found = set()
    for moment in range(len(disk.log) + 1):
        [*_, saved] = [step for at, step in confirmed if at <= moment]
        # While it is saved again, there is the one before.
        expected = {saved, saved + 1} | ({2} if saved == 3 else set())
        for number in range(num_cuts):
            root = tmp_path / f"{moment}-{number}"
            disk.cut(moment, random.Random(moment * 1000 + number), root)
            step = go_on_after(root)
            assert step in expected, root
            found.add(step)
    return found


def test_a_power_cut(tmp_path: pathlib.Path) -> None:
    found = cut_everywhere(tmp_path, max(NUM_KILLS // 20, 1))
    assert found == {0, 1, 2, 3, 4}


def test_a_power_cut_without_a_sync(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would show nothing."""
    monkeypatch.setattr(files, "sync", lambda _: None)
    with pytest.raises(AssertionError):
        cut_everywhere(tmp_path, 1)
