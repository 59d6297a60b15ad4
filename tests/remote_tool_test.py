"""The checkpoint tool on an object store, as on a disk."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import pytest
import tensorflow as tf

from dtrain import CheckpointManager, checkpoint_tool, errors
from tests import checkpoint_test, object_store, runs


def save(directory: str, steps: list[int]) -> None:
    checkpoint_test.save_steps(directory, steps)


def write_stock(prefix: str) -> None:
    """As a program does that knows nothing of dtrain."""
    state = tf.train.Checkpoint(weights=tf.Variable([1.0, 2.0]))
    tf.train.CheckpointManager(state, prefix, 3).save(checkpoint_number=7)


def take_over(directory: str) -> list:
    """Goes on from what another program has left, under two names."""
    state = tf.train.Checkpoint(weights=tf.Variable([0.0, 0.0]))
    state.write(f"{directory}/other-6")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with CheckpointManager(state, directory) as manager:
            step = manager.restore_or_initialize()
            there = manager.steps()
            manager.save(step + 1, wait=True)
            there += manager.steps()
    taken = [str(each.message) for each in told if "taken" in str(each.message)]
    return [step, there, len(taken), state.weights.numpy().tolist()]


def tool(*words: str) -> list:
    """Returns the exit code of a command, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            code = checkpoint_tool.run(words)
        except errors.UserError as error:
            return [errors.USER_ERROR, str(error)]
    return [code, output.getvalue()]


@pytest.fixture(scope="module")
def client() -> Iterator[object_store.Client]:
    with (
        object_store.ObjectStore() as store,
        object_store.Client(runs.environment(**store.environment())) as made,
    ):
        made.call(save, "gs://bucket/run/checkpoints", [1, 2, 3])
        made.call(write_stock, "gs://bucket/stock")
        yield made


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("list gs://bucket/run", 0, "gs://bucket/run/checkpoints/ckpt-3"),
        ("list gs://bucket/stock", 0, "gs://bucket/stock/ckpt-7"),
        ("inspect gs://bucket/run", 0, "weights"),
        ("inspect gs://bucket/stock/ckpt-7", 0, "weights"),
        ("cat gs://bucket/run step", 0, "3\n"),
        ("verify gs://bucket/run", 0, "ok       gs://bucket/run/checkpoints"),
        ("verify gs://bucket/stock", 0, "by TensorFlow's checksums"),
        ("digest gs://bucket/run", 0, "gs://bucket/run/checkpoints/ckpt-3\n"),
        (
            "diff gs://bucket/run/checkpoints/ckpt-2 gs://bucket/run",
            1,
            "changed weights  2 of 2 values, by up to 1",
        ),
        (
            "edit gs://bucket/stock --output=gs://bucket/edited/ckpt-7 "
            "--scale=weights=2",
            0,
            "wrote gs://bucket/edited/ckpt-7",
        ),
        ("cat gs://bucket/edited weights", 0, "[2. 4.]\n"),
        (
            "edit gs://bucket/stock --output=gs://bucket/edited/ckpt-7 "
            "--drop=weights",
            78,
            "it exists; name another",
        ),
        (
            "export gs://bucket/run --output=gs://bucket/all.safetensors",
            0,
            "3 tensors",
        ),
        (
            "import gs://bucket/all.safetensors "
            "--output=gs://bucket/back/ckpt-3",
            0,
            "wrote gs://bucket/back/ckpt-3",
        ),
        ("diff gs://bucket/run gs://bucket/back", 0, "0 differ, 3 are"),
        ("pin gs://bucket/run/checkpoints/ckpt-1 paper", 0, "is pinned"),
        ("prune gs://bucket/run --max_to_keep=1", 0, "2 kept: 1, 3"),
        ("list gs://bucket/run", 0, "paper"),
        ("inspect gs://bucket/nothing", 78, "there is no checkpoint"),
    ],
)
def test_a_command(
    words: str, code: int, text: str, client: object_store.Client
) -> None:
    """In this order: some read what others wrote."""
    got, output = client.call(tool, *words.split())
    assert got == code, output
    assert text in output


def test_what_tensorflow_has_saved_there(client: object_store.Client) -> None:
    """It is summed from a copy, and another name is copied on the store."""
    assert client.call(take_over, "gs://bucket/stock") == [
        *(7, [6, 7, 6, 7, 8], 2),
        [1.0, 2.0],
    ]
