"""Compares dtrain with what else trains a GAN: by hand, Keras, PyTorch.

    python -m tests.benchmarks.train [--write] [--rounds=4] [--secs=2]
        [--sides=8,28,64] [--batches=16,64,256] [--flush_denormals]
        [dtrain flags]

The same DCGAN with the same loss, optimizers and moving average of the
generator: by dtrain; in a loop as TensorFlow's tutorials have it; in the
`train_step` of a Keras model, by `fit` with as many steps in one execution as
dtrain makes in one loop; and, where it is installed, in PyTorch, which has a
process of its own. All take turns, for some seconds each, and each comes after
each other one as often, for that makes a difference; the ratios are medians
over turns. PyTorch is as it comes; with `--flush_denormals` it takes tiny
numbers for zeros, as TensorFlow always does. `--write` puts the table into
docs/speed.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.gan import state as gan_lib
from dtrain.gan.step import Step
from dtrain.models import dcgan
from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table

Turn = Callable[[int], None]
_HEAD = (
    "| pixels | batch | dtrain, images/s | of by hand | of Keras `fit` "
    "| of PyTorch |",
    "|---|---|---|---|---|---|",
)


class ByHand:
    """The networks and the step of a TensorFlow tutorial."""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        self._shape = [config.batch_size, config.latent_size]
        self.generator, self.discriminator = dcgan.make(config, shape, 0)
        self.average, _ = dcgan.make(config, shape, 0)
        self.average.set_weights(self.generator.get_weights())
        adam = {"beta_1": config.beta_1, "beta_2": config.beta_2}
        self._optimizers = [keras.optimizers.Adam(1e-3, **adam) for _ in "GD"]
        for optimizer, network in zip(
            self._optimizers, (self.generator, self.discriminator), strict=True
        ):
            optimizer.build(network.trainable_variables)
        self._decay = 0.5 ** (config.batch_size / config.ema_half_life_images)

    def step(self, real_images: tf.Tensor) -> tf.Tensor:
        """Trains a step; returns the loss of the generator."""
        fake_images = self._fakes()
        with tf.GradientTape() as tape:
            real_logits = self.discriminator(real_images, training=True)
            fake_logits = self.discriminator(fake_images, training=True)
            loss = tf.reduce_mean(
                tf.nn.softplus(-real_logits) + tf.nn.softplus(fake_logits)
            )
        variables = self.discriminator.trainable_variables
        self._optimizers[1].apply(tape.gradient(loss, variables), variables)
        with tf.GradientTape() as tape:
            fake_logits = self.discriminator(self._fakes(), training=True)
            loss = tf.reduce_mean(tf.nn.softplus(-fake_logits))
        variables = self.generator.trainable_variables
        self._optimizers[0].apply(tape.gradient(loss, variables), variables)
        for mean, weight in zip(
            self.average.weights, self.generator.weights, strict=True
        ):
            mean.assign(self._decay * mean + (1.0 - self._decay) * weight)
        return loss

    def _fakes(self) -> Any:
        return self.generator(tf.random.normal(self._shape), training=True)


class Fitted(keras.Model):
    """Steps by hand, for Keras."""

    def __init__(self, step: Callable[[Any], tf.Tensor]) -> None:
        super().__init__()
        self._one_step = step
        # Under a strategy, `fit` builds what is not built by a call.
        self.built = True

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        # Between workers Keras sums over an axis, which a scalar has not.
        return {"loss": self._one_step(data)[tf.newaxis]}


def fitted(
    step: Callable[[Any], tf.Tensor], batches: tf.data.Dataset, at_once: int
) -> Turn:
    """Makes the loop of Keras, in the scope of a strategy if there is one.

    Args:
        step: trains one; returns a float32 scalar, which Keras wants.
        batches: without an end.
        at_once: steps of an execution.
    """
    model = Fitted(step)
    # By XLA, which it would choose by itself, it is slower on a CPU.
    model.compile(jit_compile=False, steps_per_execution=at_once)

    def turn(num_steps: int) -> None:
        model.fit(batches, steps_per_epoch=num_steps, verbose=0)

    return turn


def dataset(config: Config, images: np.ndarray) -> tf.data.Dataset:
    """Makes shuffled batches of images in [-1, 1], as Keras is given them."""
    return (
        tf.data.Dataset.from_tensor_slices(images)
        .shuffle(len(images), seed=0)
        .repeat()
        .batch(config.batch_size, drop_remainder=True)
        .map(lambda batch: tf.cast(batch, tf.float32) / 127.5 - 1.0)
        .prefetch(tf.data.AUTOTUNE)
    )


def by_hand(config: Config, images: np.ndarray) -> Turn:
    """Makes the loop of a TensorFlow tutorial: one function for each step.

    Args:
        config: the settings that all sides train with.
        images: uint8 [n, side, side, channels].

    Returns:
        A function that trains for some steps.
    """
    hand = ByHand(config, images.shape[1:])
    step = tf.function(hand.step)
    iterator = iter(dataset(config, images))

    def turn(num_steps: int) -> None:
        for _ in range(num_steps):
            step(next(iterator))
        hand.average.weights[0].numpy()

    return turn


def by_fit(config: Config, images: np.ndarray) -> Turn:
    """Makes the loop of Keras; see `by_hand`."""
    hand = ByHand(config, images.shape[1:])
    return fitted(hand.step, dataset(config, images), config.steps_per_loop)


def torch_batches(config: Config, images: np.ndarray) -> Iterator[np.ndarray]:
    """Yields batches for PyTorch, float32 [b, channels, side, side]."""
    chance = np.random.default_rng(0)
    channels_first = images.transpose(0, 3, 1, 2)
    while True:
        chosen = chance.integers(0, len(images), config.batch_size)
        yield channels_first[chosen] / np.float32(127.5) - np.float32(1.0)


def by_torch(config: Config, images: np.ndarray, flushes: bool) -> Turn:
    """Makes the loop of PyTorch.

    Args:
        config: its settings.
        images: that it trains on, uint8 [n, side, side, channels].
        flushes: whether it takes denormal numbers for zeros.
    """
    from tests.benchmarks import in_torch

    if not in_torch.torch.set_flush_denormal(flushes) and flushes:
        command.refuse("this CPU does not let PyTorch flush denormal numbers")
    _, side, _, channels = images.shape
    batches = torch_batches(config, images)
    return in_torch.Training(
        in_torch.dcgan, config, batches, side, channels
    ).turn


@contextlib.contextmanager
def torch_apart(
    make: Callable[..., Turn | None], *arguments: Any
) -> Iterator[Turn | None]:
    """Has PyTorch take its turns in a process of its own.

    Beside TensorFlow's it has 500 MB of new pages in each step of the DCGAN of
    28 pixels, which the allocator has given back, and is half as fast.

    Args:
        make: makes its turn, in that process; None where there is none.
        arguments: of `make`.

    Yields:
        Its turn; None where there is none, or PyTorch is not installed.

    Raises:
        SystemExit: that process has ended.
    """
    if not importlib.util.find_spec("torch"):
        yield None
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_take_turns, args=(theirs, make, arguments)
    )
    process.start()
    theirs.close()

    def answer() -> Any:
        try:
            return ours.recv()
        except EOFError:
            # It has said why.
            process.join()
            sys.exit(process.exitcode or 1)

    def turn(num_steps: int) -> None:
        ours.send(num_steps)
        answer()

    try:
        yield turn if answer() else None
    finally:
        ours.close()
        process.join()


def _take_turns(
    connection: Connection,
    make: Callable[..., Turn | None],
    arguments: Sequence[Any],
) -> None:
    """Is the other process: takes turns until the connection is closed."""
    turn = make(*arguments)
    connection.send(turn is not None)
    with contextlib.suppress(EOFError):
        while turn:
            turn(connection.recv())
            connection.send(None)


def by_dtrain(
    config: Config, strategy: tf.distribute.Strategy, data: sources.Data
) -> Turn:
    """Makes dtrain's loop; returns a function that trains for some steps."""
    source = data.source
    gan = gan_lib.GAN(
        config, strategy, source.image_shape, source.num_classes, data.specs
    )
    step = Step(gan)
    iterator = pipeline.make_iterator(data, config, strategy, 0, step.num_draws)

    def turn(num_steps: int) -> None:
        left = num_steps
        while left:
            now = min(left, config.steps_per_loop)
            step.run(iterator, tf.constant(now))[1].numpy()
            left -= now

    return turn


def measure(turn: Turn, num_steps: int, config: Config) -> float:
    """Lets a side train once; returns its images/s."""
    start = time.perf_counter()
    turn(num_steps)
    elapsed = time.perf_counter() - start
    return num_steps * config.batch_size / elapsed


def order(names: Sequence[str], number: int) -> list[str]:
    """Returns who takes turns after whom in a round, a balanced Latin square.

    In as many rounds as there are names each has had each place and, if the
    number of names is even, has come once after each other one (Williams,
    "Experimental designs balanced for the estimation of residual effects of
    treatments", 1949).

    Args:
        names: of all sides.
        number: of the round, from 0 on.
    """
    count = len(names)
    # 0, 1, -1, 2, -2: the distances between neighbours are all different.
    zigzag = [
        (place + 1) // 2 if place % 2 else -(place // 2)
        for place in range(count)
    ]
    return [names[(place + number) % count] for place in zigzag]


def compare(
    sides: dict[str, Turn | None], config: Config, rounds: int, secs: int
) -> list[str]:
    """Lets sides train in turns; returns the cells of a row.

    Args:
        sides: by name, dtrain's first; None where one is not installed.
        config: the settings that all sides train with.
        rounds: turns of each side.
        secs: of a turn of dtrain, about; the others make as many steps.

    Returns:
        dtrain's images/s, and of how many times the speed of each other side
        that is; empty where one is not installed.
    """
    turns = {name: turn for name, turn in sides.items() if turn}
    ours, *_ = names = list(turns)
    at_once = config.steps_per_loop
    for turn in turns.values():
        turn(at_once + 1)
    # All sides, for penalties are taken in some steps only: at the same ones.
    speed, *_ = [measure(turn, at_once, config) for turn in turns.values()]
    steps = at_once * max(1, round(secs * speed / config.batch_size / at_once))
    speeds = []
    for number in range(rounds):
        speeds.append(
            {
                name: measure(turns[name], steps, config)
                for name in order(names, number)
            }
        )
    cells = [f"{statistics.median(each[ours] for each in speeds):,.0f}"]
    for name in list(sides)[1:]:
        ratios = [each[ours] / each[name] for each in speeds if name in each]
        cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
    return cells


def row(
    config: Config, images: np.ndarray, rounds: int, secs: int, flushes: bool
) -> str:
    """Compares all sides; returns a row of the table.

    Args:
        config: the settings that all sides train with.
        images: that they train on, uint8 [n, side, side, channels].
        rounds: turns of each side.
        secs: of a turn, about.
        flushes: see `by_torch`.
    """
    strategy = strategy_lib.make(config, environment.ALONE)
    with torch_apart(by_torch, config, images, flushes) as torch_turn:
        sides = {
            "dtrain": by_dtrain(config, strategy, sources.open_data(config)),
            "by hand": by_hand(config, images),
            "fit": by_fit(config, images),
            "PyTorch": torch_turn,
        }
        cells = compare(sides, config, rounds, secs)
    return f"| {images.shape[1]} | {config.batch_size} | {' | '.join(cells)} |"


def write_images(place: pathlib.Path, side: int) -> pathlib.Path:
    """Writes grey noise, uint8 [4096, side, side, 1]; returns the npz file."""
    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (4096, side, side, 1), np.uint8)
    path = place / "images.npz"
    np.savez(path, images=images)
    return path


def main() -> None:
    """Measures and prints the table."""
    switches = "--write", "--flush_denormals"
    is_written, flushes = (switch in sys.argv for switch in switches)
    if is_written and flushes:
        command.refuse("the page has PyTorch as it comes: one of both flags")
    own, rest = command.own_flags(
        [each for each in sys.argv[1:] if each not in switches],
        {
            **{"rounds": 4, "secs": 2},
            **{"sides": (8, 28, 64), "batches": (16, 64, 256)},
        },
    )
    lines = list(_HEAD)
    print("\n".join(lines), flush=True)
    for side in own["sides"]:
        with tempfile.TemporaryDirectory() as directory:
            path = write_images(pathlib.Path(directory), side)
            images = np.load(path)["images"]
            config = config_lib.parse(
                [
                    *("main", "--strategy=mirrored", "--r1_gamma=0"),
                    f"--dataset=npz:{path}",
                    *("--steps_per_loop=10", *rest),
                ]
            )
            for batch_size in own["batches"]:
                # Of more, ten steps would be longer than a turn.
                at_once = 10 if side**2 * batch_size < 200_000 else 1
                now = dataclasses.replace(
                    config, batch_size=batch_size, steps_per_loop=at_once
                )
                told = own["rounds"], own["secs"], flushes
                lines.append(row(now, images, *told))
                print(lines[-1], flush=True)
                keras.backend.clear_session()
    if is_written:
        replace_table(runs.ROOT / "docs/speed.md", "train", lines)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
