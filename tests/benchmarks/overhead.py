"""Measures what a step costs the host beyond its mathematics.

    python -m tests.benchmarks.overhead [--rounds=10] [--steps=500] [--write]

Networks of one layer each, on batches of 8 digits: what is left is the work of
the host. dtrain runs 1, 10 or 100 steps at once (`--steps_per_loop`); by hand
are the same networks and objectives, with Keras' Adam, in one `tf.while_loop`
of 100 steps, and as a Python call a step. What is beyond is taken apart: loops
of 100 steps that each lack a part. All take turns in one process; the table has
medians, in microseconds, of a step and of what is beyond the loop. `--write`
puts it into docs/speed.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import sys
import time
from unittest import mock

import keras
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.gan import divergence, draws
from dtrain.gan import step as step_lib
from dtrain.gan.state import GAN
from tests import runs
from tests.benchmarks import command, train
from tests.benchmarks.pages import replace_table
from tests.benchmarks.programs import Loop

_AT_ONCE = (1, 10, 100)
_HEAD = (
    "| | microseconds a step | beyond the mathematics | least to most |",
    "|---|---|---|---|",
)


def make(
    config: Config, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[keras.Model, keras.Model]:
    """Makes networks with next to no mathematics."""
    del num_classes
    height, width, channels = image_shape
    generator = keras.Sequential(
        [
            keras.Input([config.latent_size]),
            keras.layers.Dense(height * width * channels),
            keras.layers.Reshape(image_shape),
        ],
        name="generator",
    )
    discriminator = keras.Sequential(
        [
            keras.Input(image_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ],
        name="discriminator",
    )
    return generator, discriminator


def sides(config: Config, data: sources.Data) -> dict[str, train.Turn]:
    """Builds all that take turns, by their names in the table."""
    loop = Loop(config, data)
    made = {
        "by hand, a loop of 100 steps": loop.turn_at_once,
        "by hand, a call a step": loop.turn,
    }
    strategy = strategy_lib.make(config, environment.ALONE)
    for count in _AT_ONCE:
        changed = dataclasses.replace(config, steps_per_loop=count)
        name = f"dtrain, `--steps_per_loop={count}`"
        made[name] = train.by_dtrain(changed, strategy, data)
    batch = next(pipeline.make_iterator(data, config, strategy, 0, 1))
    changed = dataclasses.replace(config, steps_per_loop=max(_AT_ONCE))
    for name, patch in without(config, batch).items():
        turn = train.by_dtrain(changed, strategy, data)
        with patch:
            # Its step is traced now.
            turn(1)
        made[f"the same, without {name}"] = turn
    return made


def without(
    config: Config, batch: pipeline.Batch
) -> dict[str, contextlib.AbstractContextManager[object]]:
    """Makes patches that each leave out a part of a step that is traced.

    Args:
        config: its settings.
        batch: that every step has in place of its own.
    """
    patch = mock.patch.object
    fine = tf.constant(divergence.FINE)
    latents = tf.ones([config.batch_size, config.latent_size])
    return {
        "the verdict on divergence": patch(
            divergence.Divergence, "judge", return_value=fine
        ),
        "norms of gradients": patch(
            tf.linalg, "global_norm", return_value=tf.constant(1.0)
        ),
        "latents by seed and step": patch(
            draws, "latents_at", return_value=latents
        ),
        "the moving average": patch(GAN, "update_average"),
        "input": patch(step_lib, "next", create=True, return_value=batch),
    }


def main() -> None:
    """Measures and prints the table."""
    is_written = "--write" in sys.argv
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    own, rest = command.own_flags(arguments, {"rounds": 10, "steps": 500})
    config = config_lib.parse(
        [
            *("main", "--model=tests.benchmarks.overhead:make", "--r1_gamma=0"),
            *("--batch_size=8", "--latent_size=4", *rest),
        ]
    )
    # That one function is traced for each side.
    tf.get_logger().setLevel("ERROR")
    turns = sides(config, sources.open_data(config))
    for turn in turns.values():
        turn(2 * max(_AT_ONCE))
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(own["rounds"]):
        for name in train.order(list(turns), number):
            begin = time.perf_counter()
            turns[name](own["steps"])
            elapsed = time.perf_counter() - begin
            times[name].append(1e6 * elapsed / own["steps"])
    mathematics = times["by hand, a loop of 100 steps"]
    lines = list(_HEAD)
    for name, values in times.items():
        beyond = statistics.median(
            value - base
            for value, base in zip(values, mathematics, strict=True)
        )
        lines.append(
            f"| {name} | {statistics.median(values):.0f} | {beyond:.0f} "
            f"| {min(values):.0f} to {max(values):.0f} |"
        )
    print("\n".join(lines), flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/speed.md", "overhead", lines)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
