"""Measures how long a save makes the training wait.

    python -m tests.benchmarks.stall [--megabytes=30,150,600] [--rounds=10]
        [--write]

A Keras 3 model and its Adam are trained, a step at a time. In each round, in
turns: some steps alone; a stock `tf.train.Checkpoint.write`; our commit on the
training thread, which also sums, syncs and renames; our snapshot, written while
the steps go on until it is on the disk. All on one disk, in one process.

What the training waits is the time of its thread in `take` and `submit`; the
ratio is to the median of the stock save. The steps that overlap a save share
the machine with it: they are given in the time of plain steps, and what all of
them lose in seconds for each save. `--write` puts the table into
docs/recovery.md.
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
from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table

_PLAIN_STEPS = 5
_HEAD = (
    "| MB | stock save, ms | ours, waited for, ms | training waits, ms "
    "| at most (p99) | of the stock save | written after, s | a step, ms "
    "| a step beside a save, of a plain one | lost by a save, s |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


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
    """Measures one size; returns a row of the table."""
    trainer = Trainer(megabytes * 1_000_000)
    taker = snapshot.SnapshotTaker(trainer.state)
    durable = directory_lib.CheckpointDirectory(f"{directory}/durable")
    background = background_lib.Writer()
    plain, stock, commit, blocked, written = [], [], [], [], []
    overlap, lost = [], []
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

        begin = time.perf_counter()
        blocked.append(timed(submit))
        during = []
        while not background.is_idle:
            during.append(trainer.step())
        written.append(time.perf_counter() - begin)
        overlap += during
        usual = statistics.median(plain)
        lost.append(sum(during) - usual * len(during))
    background.close()
    reference, usual = statistics.median(stock), statistics.median(plain)
    waits, worst = np.percentile(blocked, [50, 99])
    size = sum(durable.manifest(1).sizes.values()) / 1e6
    cells = [
        *(f"{size:.0f}", f"{1e3 * reference:.0f}"),
        f"{1e3 * statistics.median(commit):.0f}",
        *(f"{1e3 * waits:.2f}", f"{1e3 * worst:.2f}"),
        f"{waits / reference:.2%}",
        f"{statistics.median(written):.2f}",
        f"{1e3 * usual:.0f}",
        f"{statistics.median(overlap) / usual if overlap else 1:.2f}",
        f"{statistics.median(lost):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures all sizes and prints the table."""
    own = command.only_own_flags(
        sys.argv[1:], {"megabytes": (30, 150, 600), "rounds": 10}
    )
    lines = list(_HEAD)
    print("\n".join(lines), flush=True)
    for megabytes in own["megabytes"]:
        with tempfile.TemporaryDirectory(dir=".") as directory:
            lines.append(measure(megabytes, own["rounds"], directory))
        print(lines[-1], flush=True)
    if "--write" in sys.argv:
        replace_table(runs.ROOT / "docs/recovery.md", "stall", lines)


if __name__ == "__main__":
    main()
