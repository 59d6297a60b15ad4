"""A run whose directory is on an object store loses nothing either."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import re
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf

from dtrain import CheckpointManager, errors
from dtrain.bundle import tensors
from dtrain.checkpoint import going_on, retention, tier
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.snapshot import SnapshotTaker
from dtrain.storage import files
from tests import object_store, runs

HISTORY = "gs://bucket/history"
# The long form, which takes some ten minutes, is that of `make chaos`.
IS_LONG = "DTRAIN_NUM_KILLS" in os.environ
# More than a block of an upload, so that a half of it may arrive.
NUM_WEIGHTS = 100_000


def weights_at(step: int) -> tf.Tensor:
    return tf.range(NUM_WEIGHTS, dtype=tf.float32) + float(step)


def make_state() -> tf.train.Checkpoint:
    return tf.train.Checkpoint(
        step=tf.Variable(0, dtype=tf.int64), weights=tf.Variable(weights_at(0))
    )


# These run in a process of their own; see `object_store.Client`.


def save(directory: str, first: int, last: int) -> list[list]:
    """Saves steps; returns each with what its save raised."""
    state = make_state()
    taker = SnapshotTaker(state)
    # Without a claim, whose requests would be among those that fail.
    history = tier.Tier(directory, (retention.Last(2),))
    results = []
    for step in range(first, last + 1):
        state.step.assign(step)
        state.weights.assign(weights_at(step))
        try:
            with files.storage_errors(directory):
                history.writing(step, taker.take(step), tier.Facts())()
            results.append([step, ""])
        except errors.StorageError as error:
            results.append([step, str(error)])
    return results


def restore(directory: str) -> list:
    """Goes on as a run does; returns the step, and whether it is right."""
    state = make_state()
    opened = CheckpointDirectory(directory)
    for left in reversed(range(5)):
        try:
            opened.clean()
            search = going_on.search([going_on.Place(opened, True)], "full")
            if search.newest is None:
                return [0, not search.holds_something, search.notes]
            newest = search.newest.manifest.step
            with search.newest.directory.reading(newest) as prefix:
                state.restore(prefix).assert_consumed()
            break
        except OSError:
            if not left:
                raise
    step = int(state.step.numpy())
    is_right = bool(np.array_equal(state.weights.numpy(), weights_at(step)))
    is_right = is_right and step == newest
    return [step, is_right, search.notes]


def use_stock(directory: str) -> list:
    """Restores as TensorFlow alone does; returns path and step."""
    newest = tf.train.latest_checkpoint(directory)
    step = tf.Variable(0, dtype=tf.int64)
    tf.train.Checkpoint(step=step).restore(newest).expect_partial()
    held = tf.train.load_checkpoint(newest)
    return [newest, int(step.numpy()), len(held.get_variable_to_shape_map())]


def clean_while_it_is_read(directory: str, step: int) -> list[bool]:
    """Returns whether it is on the disk before, after, and in the end."""
    opened = CheckpointDirectory(directory)
    with opened.reading(step) as prefix:
        index = pathlib.Path(f"{prefix}.index")
        seen = [index.exists()]
        opened.clean()
        seen.append(index.exists())
    return [*seen, index.exists()]


def digest(prefix: str) -> str:
    return tensors.digest(prefix)


@contextlib.contextmanager
def opened(
    store: object_store.ObjectStore, **more: str
) -> Iterator[object_store.Client]:
    environment = runs.environment(
        **store.environment(), GCS_RETRY_CONFIG_MAX_RETRIES="4", **more
    )
    with object_store.Client(environment) as client:
        yield client


def test_a_tenth_of_the_requests_fails() -> None:
    """Another machine restores each fifth save; the long form saves 50."""
    num_saves = 50 if IS_LONG else 10
    with (
        object_store.ObjectStore(rate=0.1, seed=1) as store,
        opened(store) as saving,
        opened(store) as restoring,
    ):
        saved = num_failed = 0
        for first in range(1, num_saves + 1, 5):
            for step, error in saving.call(save, HISTORY, first, first + 4):
                num_failed += bool(error)
                saved = saved if error else step
            step, is_right, notes = restoring.call(restore, HISTORY)
            assert is_right, notes
            assert step >= saved, notes
        failed = [each for each in store.requests if each.fault]
        print(
            f"{len(store.requests)} requests, {len(failed)} failed, "
            f"{num_failed} of {num_saves} saves raised"
        )
        assert saved >= num_saves - 5
        assert len(failed) > 0.05 * len(store.requests)
        store.calm()
        newest, step, _ = restoring.call(use_stock, HISTORY)
        assert (newest, step) == (f"{HISTORY}/ckpt-{saved}", saved)


@pytest.mark.parametrize("last", ["refused", "lost"])
def test_save_that_ends_at_any_request(last: str) -> None:
    """As if the process were killed there; the long form tries them all.

    The last request that arrives may be answered, or carried out alone.
    """
    stride = 1 if IS_LONG else 15
    with (
        object_store.ObjectStore() as store,
        # Each try stands for another process, which remembers nothing.
        opened(store, GCS_STAT_CACHE_MAX_AGE="0") as client,
    ):
        client.call(save, HISTORY, 1, 1)
        step, skip, is_over = 1, 0, False
        while not is_over:
            # Removes what the last one has left, or each had more to do.
            client.call(save, HISTORY, step + 1, step + 1)
            saved, step = step + 1, step + 2
            if last == "lost":
                store.inject("lost", skip=skip)
                skip += 1
            refused = store.inject("403", skip=skip, count=10**9)
            skip += stride
            [[_, error]] = client.call(save, HISTORY, step, step)
            is_over = refused.count == 10**9
            assert bool(error) != is_over
            store.calm()
            found, is_right, notes = client.call(restore, HISTORY)
            assert is_right, notes
            assert found in ((saved, step) if error else (step,)), notes
            assert not notes, "a kill is no damage"
        assert skip > 30
        # What is left is what belongs to two checkpoints, and the pointer.
        client.call(save, HISTORY, step + 1, step + 2)
        names = [
            name.removeprefix("history/") for name in store.names("history/")
        ]
        assert [name for name in names if not name.startswith("ckpt-")] == [
            "",
            "checkpoint",
        ]
        assert len(names) == 2 + 6


def test_listings_are_of_a_while_ago() -> None:
    """What was just written is there all the same."""
    with (
        object_store.ObjectStore() as store,
        opened(store) as saving,
        opened(store) as restoring,
    ):
        store.inject("stale", r"/o\?", count=10**9, lag=8)
        saved = saving.call(save, HISTORY, 1, 5)
        assert saved == [[step, ""] for step in range(1, 6)]
        step, is_right, notes = restoring.call(restore, HISTORY)
        assert is_right, notes
        assert step >= 3, notes
        store.calm()
        # Now only those that would find out whether there is a checkpoint, of
        # before the last one was begun.
        store.inject("stale", r"/o\?(?!.*delimiter)", count=10**9, lag=14)
        step, is_right, notes = restoring.call(restore, HISTORY)
        assert (step, is_right, notes) == (5, True, [])


def test_what_is_read_is_not_swept() -> None:
    with object_store.ObjectStore() as store, opened(store) as client:
        client.call(save, HISTORY, 1, 1)
        seen = client.call(clean_while_it_is_read, HISTORY, 1)
        assert seen == [True, True, False]


def test_process_killed_while_it_saves(chance: random.Random) -> None:
    num_kills = int(os.environ.get("DTRAIN_NUM_KILLS", "2"))
    with object_store.ObjectStore(rate=0.1, seed=4) as store:
        saved, first = 0, 1
        for _ in range(num_kills):
            with opened(store) as client:
                client.call(save, HISTORY, first, first)
                saved = first
                client.begin(save, HISTORY, first + 1, first + 100)
                time.sleep(chance.uniform(0.0, 3.0))
                client.process.kill()
            with opened(store) as client:
                step, is_right, notes = client.call(restore, HISTORY)
                assert is_right, notes
                assert not notes, "a kill is no damage"
                assert step >= saved
                first = step + 1


# Whole runs.


def flags(run_dir: str | pathlib.Path, num_steps: int) -> list[str]:
    return [
        *runs.SMALL,
        f"--run_dir={run_dir}",
        f"--num_steps={num_steps}",
        "--checkpoint_every_steps=5",
        "--backup_every_secs=0.001",
    ]


def newest_step(store: object_store.ObjectStore) -> int:
    """Returns the step of the newest checkpoint of the run."""
    names = [
        pathlib.PurePath(name)
        for name in store.names("run/checkpoints/ckpt-")
        if name.endswith(".json")
    ]
    return max([int(name.stem.removeprefix("ckpt-")) for name in names] or [0])


def wait_for_step(
    store: object_store.ObjectStore, process: runs.Process, step: int
) -> None:
    deadline = time.monotonic() + 240
    while newest_step(store) < step:
        assert process.poll() is None, runs.finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_run_is_killed_and_goes_on(tmp_path: pathlib.Path) -> None:
    run_dir = "gs://bucket/run"
    with object_store.ObjectStore(rate=0.05, seed=6) as store:
        environment = store.environment()
        process = runs.start(
            "dtrain.main", *flags(run_dir, 100_000), **environment
        )
        wait_for_step(store, process, 5)
        code, output = runs.run(
            "dtrain.main", *flags(run_dir, 100_000), **environment
        )
        assert code == errors.USER_ERROR, output
        assert f"another process trains in run_dir ({run_dir})" in output
        process.send_signal(signal.SIGKILL)
        runs.finish(process)
        num_steps = newest_step(store) // 5 * 5 + 7
        # As the host is the same, nothing is waited for.
        code, output = runs.run(
            "dtrain.main", *flags(run_dir, num_steps), **environment
        )
        assert code == errors.FINISHED, output
        assert f"resumed from {run_dir}" in output
        assert "waiting" not in output
        whole = tmp_path / "whole"
        code, output = runs.run("dtrain.main", *flags(whole, num_steps))
        assert code == errors.FINISHED, output
        assert (
            store.read("run/metrics.jsonl")
            == (whole / "metrics.jsonl").read_bytes()
        )
        store.calm()
        with opened(store) as client:
            prefix = f"checkpoints/ckpt-{num_steps}"
            assert client.call(digest, f"{run_dir}/{prefix}") == (
                tensors.digest(f"{whole}/{prefix}")
            )
            newest, step, _ = client.call(use_stock, f"{run_dir}/checkpoints")
            assert (newest, step) == (f"{run_dir}/{prefix}", num_steps)
        left = {name.split("/")[1] for name in store.names("run/")}
        assert left <= {
            *("", "checkpoints", "config.json", "discriminator.json"),
            *("events", "generator.json", "metrics.jsonl", "samples"),
            *("ledger", "init.png", "reals.png", "saved.json"),
        }
        code, output = runs.run(
            "dtrain.report", f"--run_dir={run_dir}", **environment
        )
        assert code == errors.FINISHED, output
        assert re.search("^attempts .*1 finished", output, re.MULTILINE)
        assert store.read("run/report.png").startswith(b"\x89PNG")
        code, printed = runs.run(
            "dtrain.gallery", f"--run_dir={run_dir}", **environment
        )
        assert code == errors.FINISHED, printed
        page = store.read("run/page.html").decode()
        assert "samples of step " in page
        assert "generator loss" in page


def test_history_on_a_store_and_backups_on_a_disk(
    tmp_path: pathlib.Path,
) -> None:
    """And the store goes down for a while: nothing stops."""
    with object_store.ObjectStore() as store:
        environment = {
            **store.environment(),
            "GCS_RETRY_CONFIG_MAX_RETRIES": "1",
        }
        arguments = [
            *flags(tmp_path / "run", 100_000),
            "--checkpoint_dir=gs://bucket/run/checkpoints",
        ]
        process = runs.start("dtrain.main", *arguments, **environment)
        wait_for_step(store, process, 5)
        store.inject("503", "upload", count=40)
        before = newest_step(store)
        wait_for_step(store, process, before + 5)
        process.send_signal(signal.SIGTERM)
        code, output = runs.finish(process)
        assert code == errors.RUN_AGAIN, output
        assert newest_step(store) == runs.metrics(tmp_path / "run")[-1]["step"]


_MANAGERS: list[CheckpointManager] = []


def manage(directory: str, step: int) -> None:
    """Saves with a manager, which stays open."""
    _MANAGERS.append(CheckpointManager(make_state(), directory))
    _MANAGERS[-1].save(step, wait=True)


def close_managers() -> None:
    while _MANAGERS:
        _MANAGERS.pop().close()


def test_two_managers_on_a_store() -> None:
    """One of them saves, until it is closed; see `lease`."""
    with (
        object_store.ObjectStore() as store,
        opened(store) as first,
        opened(store) as second,
    ):
        first.call(manage, HISTORY, 1)
        with pytest.raises(object_store.Raised, match="holds its lease"):
            second.call(manage, HISTORY, 2)
        first.call(close_managers)
        second.call(manage, HISTORY, 2)
        second.call(close_managers)
        assert "history/lease.json" not in store.names("history")
