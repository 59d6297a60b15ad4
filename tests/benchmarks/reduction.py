"""Measures what --reduction=ordered costs.

    python -m tests.benchmarks.reduction [--rounds=5] [--secs=2] [--write]
        [dtrain flags]

On one, two and four replicas, which share the cores of this machine, for the
digits of 8 pixels and for noise of 28: fast with one micro-batch for each
replica, fast with as many as ordered, and ordered. They take turns in one
process; the table has the median of the rounds, in ms a step, and what each
replica sends in a step. `--write` puts it into docs/elastic.md.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.gan import reduction
from dtrain.gan import state as gan_lib
from dtrain.gan.step import Step
from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table
from tests.replicas import mirrored

REPLICAS = (1, 2, 4)
COLUMNS: dict[str, dict[str, object]] = {
    "fast": {"reduction": "fast", "micro_batches": 0},
    "fast, 8 parts": {"reduction": "fast", "micro_batches": 8},
    "ordered": {"reduction": "ordered", "micro_batches": 8},
}
_HEAD = (
    f"| pixels | replicas | {' | '.join(COLUMNS)} | ordered / fast "
    "| MB sent a step |",
    "|---|---|---|---|---|---|---|",
)


def make_turn(
    config: Config, num_replicas: int, source: sources.Source
) -> tuple[Callable[[float], float], int]:
    """Builds a GAN and traces its step.

    Args:
        config: its settings.
        num_replicas: that share this machine.
        source: of the images.

    Returns:
        A function that trains for about so many seconds and returns ms a
        step; and the bytes that a replica sends in a step.
    """
    strategy = mirrored(num_replicas)
    gan = gan_lib.GAN(config, strategy, source.image_shape, source.num_classes)
    step = Step(gan)
    iterator = pipeline.make_iterator(
        sources.Data(source), config, strategy, 0, config.discriminator_steps
    )
    packed: list[int] = []
    pack = reduction.pack

    def measure(values: list[tf.Tensor]) -> tf.Tensor:
        vector = pack(values)
        packed.append(4 * vector.shape[0])
        return vector

    def train(num_steps: int) -> float:
        tf.config.optimizer.set_experimental_options(
            {"arithmetic_optimization": config.reduction == "fast"}
        )
        begin = time.perf_counter()
        _, verdict = step.run(iterator, tf.constant(num_steps))
        verdict.numpy()
        return (time.perf_counter() - begin) / num_steps

    with mock.patch.object(reduction, "pack", measure):
        train(1)
    secs_per_step = train(2)
    # Every replica has packed each phase; a ring sends 2 (R - 1) / R of it,
    # and so does the exchange of slices.
    sent = 2 * (num_replicas - 1) * sum(packed) // num_replicas**2
    return lambda secs: 1e3 * train(max(int(secs / secs_per_step), 1)), sent


def rows(config: Config, pixels: str, rounds: int, secs: int) -> list[str]:
    """Lets all take turns on one data set; returns its rows.

    Args:
        config: its settings.
        pixels: of its images, for the table.
        rounds: turns of each.
        secs: of a turn.
    """
    source = sources.open_source(config)
    lines = []
    for num_replicas in REPLICAS:
        turns = {}
        sent = 0
        for name, changes in COLUMNS.items():
            changed = dataclasses.replace(config, **changes)
            turns[name], sent = make_turn(changed, num_replicas, source)
        times: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for _ in range(rounds):
            for name, turn in turns.items():
                times[name].append(turn(secs))
        medians = {name: statistics.median(ms) for name, ms in times.items()}
        ratio = statistics.median(
            ordered / fast
            for ordered, fast in zip(
                times["ordered"], times["fast"], strict=True
            )
        )
        cells = [
            *(pixels, str(num_replicas)),
            *(f"{medians[name]:.1f}" for name in COLUMNS),
            *(f"{ratio:.2f}", f"{sent / 1e6:.2f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measures and prints the table."""
    is_written = "--write" in sys.argv
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    own, rest = command.own_flags(arguments, {"rounds": 5, "secs": 2})
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * max(REPLICAS)
    )
    tf.config.experimental.enable_op_determinism()
    lines = list(_HEAD)
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        noise = np.random.default_rng(0)
        images = noise.integers(0, 256, (2_000, 28, 28, 1), np.uint8)
        np.savez(f"{directory}/images.npz", images=images)
        for pixels, flags in {
            "8x8": [],
            "28x28": [f"--dataset=npz:{directory}/images.npz"],
        }.items():
            config = config_lib.parse(
                ["reduction", "--jit_compile=off", *flags, *rest]
            )
            lines += rows(config, pixels, own["rounds"], own["secs"])
    if is_written:
        replace_table(runs.ROOT / "docs/elastic.md", "reduction", lines)


if __name__ == "__main__":
    main()
