"""Measures how fast checkpoints are written and restored, beside a copy.

    python -m tests.benchmarks.checkpoints [--megabytes=30,600,3000]
        [--rounds=5] [--write]

The same bytes, a Keras model and the moments of its Adam, on one disk, by
savers that take turns in one process: dtrain, TensorFlow's CheckpointManager,
what Keras' BackupAndRestore writes, Keras' OrbaxCheckpoint where Orbax is
installed, and PyTorch's asynchronous checkpoint where PyTorch is. In each turn
a file of as many bytes is copied, with fsync, and read: the ratios are to
these, of the same round. All is done twice and timed the second time, for
saves follow saves: on a virtual machine the first one after a read takes half
as long again. The memory is the most that a save or a restore takes beyond what
the process has, in sizes of the state. Of more than 1 GB two rounds
are made at most. `--write` puts the
table into docs/speed.md.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from dtrain.checkpoint import background, snapshot
from dtrain.checkpoint.directory import CheckpointDirectory
from tests import runs
from tests.benchmarks import command, memory
from tests.benchmarks.pages import replace_table
from tests.benchmarks.stall import Trainer, timed

_HEAD = (
    "| MB | saver | training waits, ms | written after, s | of a copy "
    "| restored after, s | of a read | memory, states |",
    "|---|---|---|---|---|---|---|---|",
)


class Saver(NamedTuple):
    """Something that saves and restores.

    Attributes:
        begin: saves; returns when training may go on.
        finish: returns when it is written.
        restore: reads what was written into the state.
    """

    begin: Callable[[], object]
    finish: Callable[[], object]
    restore: Callable[[], object]


def dtrain_saver(trainer: Trainer, place: pathlib.Path) -> Saver:
    """Saves as a run does: the thread of training takes a snapshot."""
    taker = snapshot.SnapshotTaker(trainer.state)
    directory = CheckpointDirectory(str(place))
    writer = background.Writer()

    def begin() -> None:
        taken = taker.take(1)
        writer.submit(lambda: _commit(directory, taken), keep=True)

    def restore() -> None:
        directory.verify(1)
        trainer.state.restore(directory.prefix(1)).assert_consumed()

    return Saver(begin, writer.drain, restore)


def _commit(directory: CheckpointDirectory, taken: snapshot.Snapshot) -> None:
    directory.commit(1, taken)


def tensorflow_saver(trainer: Trainer, place: pathlib.Path) -> Saver:
    """Saves by `tf.train.CheckpointManager`, which syncs nothing."""
    manager = tf.train.CheckpointManager(trainer.state, str(place), 1)
    return Saver(manager.save, lambda: None, manager.restore_or_initialize)


def keras_saver(trainer: Trainer, place: pathlib.Path) -> Saver:
    """Saves as Keras' BackupAndRestore does, weights and optimizer in HDF5."""
    model = trainer.model
    model.compile(optimizer=trainer.optimizer)
    place.mkdir()
    path = str(place / "latest.weights.h5")
    return Saver(
        lambda: model.save_weights(path, overwrite=True),
        lambda: None,
        lambda: model.load_weights(path),
    )


def orbax_saver(trainer: Trainer, place: pathlib.Path) -> Saver:
    """Saves by Keras' callback for Orbax, as at the end of an epoch."""
    model = trainer.model
    callback = keras.callbacks.OrbaxCheckpoint(str(place.absolute()))
    callback.set_model(model)
    epochs = itertools.count()
    return Saver(
        lambda: callback.on_epoch_end(next(epochs)),
        callback.wait_until_finished,
        lambda: model.load_weights(str(place.absolute())),
    )


def torch_saver(trainer: Trainer, place: pathlib.Path) -> Saver:
    """Saves by PyTorch's `async_save`, of one process without a group."""
    torch = importlib.import_module("torch")
    checkpoint = importlib.import_module("torch.distributed.checkpoint")

    state = {
        str(number): torch.from_numpy(np.array(variable.numpy()))
        for number, variable in enumerate(
            (*trainer.model.variables, *trainer.optimizer.variables)
        )
    }
    pending: list = []

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        pending.append(checkpoint.async_save(state, checkpoint_id=place))

    return Saver(
        begin,
        lambda: pending.pop().result(),
        lambda: checkpoint.load(state, checkpoint_id=place),
    )


def savers(trainer: Trainer, root: pathlib.Path) -> dict[str, Saver]:
    """Makes all that can be made here, by their names in the table."""
    made = {
        "dtrain: syncs, verifies": dtrain_saver(trainer, root / "dtrain"),
        "`tf.train.CheckpointManager`": tensorflow_saver(
            trainer, root / "tensorflow"
        ),
        "Keras `BackupAndRestore`": keras_saver(trainer, root / "keras"),
    }
    if importlib.util.find_spec("orbax"):
        made["Keras `OrbaxCheckpoint`"] = orbax_saver(trainer, root / "orbax")
    if importlib.util.find_spec("torch"):
        made["PyTorch `async_save`"] = torch_saver(trainer, root / "torch")
    return made


def copy(source: pathlib.Path) -> None:
    """Copies a file beside itself, onto the disk."""
    target = source.with_suffix(".copy")
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


class Turn(NamedTuple):
    """The seconds of a turn, and those of a copy and a read beside it.

    Attributes:
        mib: of memory that it took, beyond what there was.
    """

    waits: float
    written: float
    copied: float
    restored: float
    read: float
    mib: float


def turn(saver: Saver, yardstick: pathlib.Path) -> Turn:
    """Lets a saver save and restore, twice; times the second time."""

    def save() -> tuple[float, float]:
        # Or who syncs would wait for what another one has left unwritten.
        os.sync()
        waits = timed(saver.begin)
        return waits, waits + timed(saver.finish)

    def again(action: Callable[[], object]) -> float:
        os.sync()
        return timed(action)

    mib = memory.peak_mib(save)
    waits, written = save()
    copy(yardstick)
    copied = again(lambda: copy(yardstick))
    mib = max(mib, memory.peak_mib(saver.restore))
    restored = again(saver.restore)
    yardstick.read_bytes()
    read = again(yardstick.read_bytes)
    return Turn(waits, written, copied, restored, read, mib)


def row(size: int, name: str, every: list[Turn]) -> str:
    """Makes a row of the table: medians, and the most memory.

    Args:
        size: of the state, in bytes.
        name: of the saver.
        every: its turns.
    """
    # In the first TensorFlow and the disk allocate what they need.
    turns = every[1:]

    def median(value: Callable[[Turn], float]) -> float:
        return statistics.median(map(value, turns))

    cells = [
        f"{size / 1e6:.0f}",
        name,
        f"{1e3 * median(lambda turn: turn.waits):.1f}",
        f"{median(lambda turn: turn.written):.2f}",
        f"{median(lambda turn: turn.copied / turn.written):.2f}",
        f"{median(lambda turn: turn.restored):.2f}",
        f"{median(lambda turn: turn.read / turn.restored):.2f}",
        f"{2**20 * max(turn.mib for turn in every) / size:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def measure(megabytes: int, rounds: int, root: pathlib.Path) -> list[str]:
    """Measures one size; returns its rows."""
    trainer = Trainer(megabytes * 1_000_000)
    size = sum(
        variable.numpy().nbytes
        for variable in (*trainer.model.variables, *trainer.optimizer.variables)
    )
    yardstick = root / "bytes"
    yardstick.write_bytes(os.urandom(size))
    made = savers(trainer, root)
    turns: dict[str, list[Turn]] = {name: [] for name in made}
    for _ in range(rounds + 1):
        for name, saver in made.items():
            turns[name].append(turn(saver, yardstick))
    keras.backend.clear_session()
    return [row(size, name, turns[name]) for name in made]


def main() -> None:
    """Measures all sizes and prints the table."""
    is_written = "--write" in sys.argv
    own = command.only_own_flags(
        sys.argv[1:], {"megabytes": (30, 600, 3000), "rounds": 5}
    )
    lines = [*_HEAD]
    print("\n".join(lines), flush=True)
    for megabytes in own["megabytes"]:
        with tempfile.TemporaryDirectory(dir=".") as directory:
            root = pathlib.Path(directory)
            # A round of 3 GB takes two minutes.
            rounds = min(own["rounds"], 2 if megabytes > 1000 else 1000)
            rows = measure(megabytes, rounds, root)
        print("\n".join(rows), flush=True)
        lines += rows
    if is_written:
        replace_table(runs.ROOT / "docs/speed.md", "checkpoints", lines)


if __name__ == "__main__":
    main()
