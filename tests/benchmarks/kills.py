"""Counts what a restart finds after a kill: dtrain's savers and the stock ones.

    python -m tests.benchmarks.kills [--num_kills=20] [--seed=1]

Each of them saves the same state, of 24 MB, again and again, and is killed by a
SIGKILL at a random instant; a new process goes on from what it left. All
numbers of the state are the count of its updates, so that of two moments cannot
be taken for one. A save is confirmed when it has returned or, where another
thread writes it, when its manifest is there.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import dtrain
from dtrain.checkpoint import going_on, retention
from dtrain.checkpoint import manager as checkpoint_lib
from dtrain.checkpoint.directory import CheckpointDirectory
from tests.benchmarks import command

FORKED = multiprocessing.get_context("forkserver")
# The slowest of them writes for this long.
SECS_PER_SAVE = 0.5
WIDTH = 1414


class Model(keras.Model):
    """A network and an Adam, of which an update adds one to every number."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(WIDTH, use_bias=False)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.dense(inputs)

    def numbers(self) -> list[Any]:
        rate = self.optimizer.learning_rate
        state = [v for v in self.optimizer.variables if v is not rate]
        return [*self.trainable_variables, *state]

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        del data
        for number in self.numbers():
            number.assign_add(tf.ones(number.shape, number.dtype))
        return {"loss": tf.zeros([])}


def make_model() -> Model:
    model = Model()
    model.compile("adam", "mse")
    model(tf.zeros([1, WIDTH]))
    model.optimizer.build(model.trainable_variables)
    for number in model.numbers():
        number.assign(tf.zeros(number.shape, number.dtype))
    return model


class Start(NamedTuple):
    """What a process went on from.

    Attributes:
        counts: of updates; more than one if the state is of several moments.
        failure: why it could not go on; empty if it could.
    """

    counts: set[int]
    failure: str = ""


def counts(model: Model, *others: int) -> set[int]:
    found = {int(x) for x in others}
    for number in model.numbers():
        found |= {int(x) for x in np.unique(number.numpy())}
    return found


# What saves. Each of them sends a Start, and the number of each save that is
# confirmed, until it is killed.

Sender = connection.Connection


def dtrain_manager(directory: str, sender: Sender) -> None:
    model, step, state = _state()
    manager = checkpoint_lib.CheckpointManager(
        state, directory, (retention.Last(2),)
    )
    place = going_on.Place(CheckpointDirectory(directory), is_mine=True)
    manager.directory.clean()
    search = going_on.search([place], "full")
    if search.newest:
        state.restore(search.newest.prefix).assert_consumed()
    elif search.holds_something:
        raise RuntimeError("nothing verifies")
    sender.send(Start(counts(model, int(step))))
    while True:
        model.train_step(None)
        step.assign_add(1)
        manager.save(int(step), wait=True)
        sender.send(int(step))


def stock_manager(directory: str, sender: Sender) -> None:
    model, step, state = _state()
    manager = tf.train.CheckpointManager(state, directory, max_to_keep=2)
    manager.restore_or_initialize()
    sender.send(Start(counts(model, int(step))))
    while True:
        model.train_step(None)
        step.assign_add(1)
        manager.save(int(step))
        sender.send(int(step))


def _state() -> tuple[Model, tf.Variable, tf.train.Checkpoint]:
    model, step = make_model(), tf.Variable(0, dtype=tf.int64)
    return (
        model,
        step,
        tf.train.Checkpoint(model=model, optimizer=model.optimizer, step=step),
    )


class Confirm(keras.callbacks.Callback):
    """Tells, as the last callback of a `fit`, what is restored and saved."""

    def __init__(
        self, sender: Sender, newest: Callable[[int], int] | None = None
    ) -> None:
        super().__init__()
        self._sender = sender
        self._newest = newest or int
        self._told = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        # Not sooner: restoring may end with the first of these calls.
        if not self._told:
            self._told = 1
            self._sender.send(Start(counts(self.model, epoch)))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del logs
        saved = self._newest(epoch + 1)
        if saved > self._told:
            self._told = saved
            self._sender.send(saved)


def _fit(*callbacks: keras.callbacks.Callback) -> None:
    # An epoch is one batch, and so one update.
    data = tf.data.Dataset.from_tensors((tf.zeros([1, WIDTH]), tf.zeros([1])))
    make_model().fit(data, epochs=10**6, verbose=0, callbacks=[*callbacks])


def dtrain_callback(directory: str, sender: Sender) -> None:
    there = CheckpointDirectory(directory)
    _fit(
        dtrain.BackupAndRestore(directory),
        Confirm(sender, lambda _: max([0, *there.steps()])),
    )


def keras_callback(directory: str, sender: Sender) -> None:
    _fit(keras.callbacks.BackupAndRestore(directory), Confirm(sender))


def keras_callback_twice(directory: str, sender: Sender) -> None:
    _fit(
        keras.callbacks.BackupAndRestore(directory, double_checkpoint=True),
        Confirm(sender),
    )


SAVERS = {
    "dtrain CheckpointManager": dtrain_manager,
    "dtrain.BackupAndRestore in fit": dtrain_callback,
    "tf.train.CheckpointManager": stock_manager,
    "keras BackupAndRestore": keras_callback,
    "  with double_checkpoint": keras_callback_twice,
}


# The kills.


def work(saver: str, directory: str, sender: Sender) -> None:
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    tf.config.set_visible_devices([], "GPU")
    try:
        SAVERS[saver](directory, sender)
    except Exception as error:
        sender.send(Start(set(), f"{type(error).__name__}: {error}"))
        raise


def answers(receiver: Sender) -> Iterator[Any]:
    with contextlib.suppress(EOFError):
        while True:
            yield receiver.recv()


def run_once(
    saver: str, directory: str, delay_secs: float
) -> tuple[Start, int]:
    """Runs a process until it is killed; returns its start and last save."""
    receiver, sender = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=work, args=(saver, directory, sender))
    process.start()
    sender.close()
    told = answers(receiver)
    start = next(told)
    if start.failure:
        process.join()
        return start, 0
    newest = next(told)
    assert isinstance(newest, int), newest
    time.sleep(delay_secs)
    process.kill()
    process.join()
    return start, max([newest, *told])


# In the order of the table.
OUTCOMES = ("newest", "lost", "unrecoverable", "wrong")


def outcome(start: Start, saved: int) -> str:
    """Says what a restart is, that follows a confirmed save."""
    if start.failure or start.counts == {0}:
        return "unrecoverable"
    if len(start.counts) > 1:
        return "wrong"
    return "newest" if min(start.counts) >= saved else "lost"


def kill_and_look(
    saver: str, num_kills: int, chance: random.Random
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns how often each outcome, and each reason, was seen."""
    totals: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        directory = f"{root}/saved"
        saved = 0
        # One more process than kills, at the least: the first finds nothing.
        while totals.total() < num_kills:
            delay_secs = chance.uniform(0.0, 2 * SECS_PER_SAVE)
            start, newest = run_once(saver, directory, delay_secs)
            if saved:
                found = outcome(start, saved)
                totals[found] += 1
                if found == "unrecoverable":
                    reasons[start.failure[:70] or "started over"] += 1
            saved = newest
            if start.failure:
                shutil.rmtree(directory, ignore_errors=True)
                saved = 0
    return totals, reasons


def main() -> None:
    """Kills all of them in turn and prints the table."""
    options = command.only_own_flags(sys.argv[1:], {"num_kills": 20, "seed": 1})
    # All that takes long to import.
    FORKED.set_forkserver_preload(["dtrain.checkpoint.callbacks"])
    print(
        "restarts after a kill           resumed the newest   lost a    "
        "unrecoverable   wrong\n"
        "                                confirmed save       save      "
        "                state",
        flush=True,
    )
    for saver in SAVERS:
        chance = random.Random(options["seed"])
        totals, reasons = kill_and_look(saver, options["num_kills"], chance)
        numbers = [totals.get(name, 0) for name in OUTCOMES]
        print(
            f"{saver:<32}{numbers[0]:>8}{numbers[1]:>17}{numbers[2]:>14}"
            f"{numbers[3]:>14}",
            flush=True,
        )
        for reason, count in reasons.items():
            print(f"    {count} x {reason}", flush=True)


if __name__ == "__main__":
    main()
