"""Measures how long a save makes the training wait.

    python -m tests.benchmarks.stall [--megabytes=30,150,600] [--rounds=50]

A Keras 3 model and its Adam are trained, a step at a time. In each round, in
turns: some steps alone; a stock `tf.train.Checkpoint.write`; our commit on the
training thread, which also sums, syncs and renames; our snapshot, written while
the steps go on until it is on the disk. All on one disk, in one process.

blocked is the time of the training thread in `take` and `submit`; its ratios
are to the median of the stock save. The steps that overlap a save are slower,
since they share the machine with it: that is the inflation, in the time of
plain steps, and in seconds for each save.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from dtrain.checkpoint import (
    background as background_lib,
)
from dtrain.checkpoint import (
    directory as directory_lib,
)
from dtrain.checkpoint import (
    snapshot,
)
from tests.benchmarks import command

_PLAIN_STEPS = 5


class Trainer:
    """A model whose state, with Adam's two moments, has a given size."""

    def __init__(self, num_bytes: int, num_layers: int = 12) -> None:
        width = int((num_bytes / 12 / num_layers) ** 0.5)
        self.model = keras.Sequential(
            [keras.Input((width,))]
            + [keras.layers.Dense(width) for _ in range(num_layers)]
        )
        self.optimizer = keras.optimizers.Adam(1e-5)
        self.optimizer.build(self.model.trainable_variables)
        self.state = tf.train.Checkpoint(
            model=self.model, optimizer=self.optimizer
        )
        self._images = tf.random.normal([32, width])
        self.step()

    @tf.function
    def _step(self) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.model(self._images) ** 2)
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    def step(self) -> float:
        """Trains a step; returns its seconds."""
        return timed(lambda: self._step().numpy())


def timed(action: Callable[[], object]) -> float:
    """Returns the seconds that something takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(megabytes: int, rounds: int, directory: str) -> str:
    """Measures one size; returns a line of the table."""
    trainer = Trainer(megabytes * 1_000_000)
    taker = snapshot.SnapshotTaker(trainer.state)
    durable = directory_lib.CheckpointDirectory(f"{directory}/durable")
    background = background_lib.Writer()
    plain, stock, commit, blocked, overlap = [], [], [], [], []
    inflation = []
    for number in range(1, rounds + 1):
        plain += [trainer.step() for _ in range(_PLAIN_STEPS)]
        stock.append(timed(lambda: trainer.state.write(f"{directory}/stock")))

        def save(number: int = number) -> None:
            durable.commit(1, taker.take(number))

        commit.append(timed(save))
        trainer.step()

        def submit(number: int = number) -> None:
            taken = taker.take(number)
            background.submit(lambda: durable.commit(1, taken), keep=True)

        blocked.append(timed(submit))
        during = []
        while not background.is_idle:
            during.append(trainer.step())
        overlap += during
        usual = statistics.median(plain)
        inflation.append(sum(during) - usual * len(during))
    background.close()
    reference = statistics.median(stock)
    usual = statistics.median(plain)
    median, worst = np.percentile(blocked, [50, 99])
    size = sum(durable.manifest(1).sizes.values()) / 1e6
    return (
        f"{size:>5.0f}  {1e3 * reference:>8.1f}  "
        f"{1e3 * statistics.median(commit):>8.1f}  "
        f"{1e3 * median:>8.2f}  {1e3 * worst:>8.2f}  "
        f"{median / reference:>7.2%}  {worst / reference:>7.2%}  "
        f"{1e3 * usual:>7.1f}  "
        f"{statistics.median(overlap) / usual if overlap else 1:>7.2f}  "
        f"{statistics.median(inflation):>7.2f}"
    )


def main() -> None:
    """Measures all sizes and prints the table."""
    own = command.only_own_flags(
        sys.argv[1:], {"megabytes": (30, 150, 600), "rounds": 50}
    )
    print(
        "          stock    commit        blocked (ms)    of the stock save"
        "     step    overlapping a save\n"
        "   MB      (ms)      (ms)       p50       p99      p50      p99"
        "     (ms)  x step   s/save"
    )
    for megabytes in own["megabytes"]:
        with tempfile.TemporaryDirectory(dir=".") as directory:
            line = measure(megabytes, own["rounds"], directory)
        print(line, flush=True)


if __name__ == "__main__":
    main()
