"""Measures what --reduction=ordered costs.

    python -m tests.benchmarks.reduction [--rounds=5] [--secs=2] [dtrain flags]

On one, two and four replicas, which share the cores of this machine: fast with
one micro-batch for each replica, fast with as many as ordered, and ordered.
They take turns in one process; the table has the median of the rounds, in ms a
step, and what each replica sends in a step.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import tensorflow as tf

from dtrain import config as config_lib
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.gan import reduction
from dtrain.gan import state as gan_lib
from dtrain.gan.step import Step
from tests.benchmarks import command
from tests.replicas import mirrored

REPLICAS = (1, 2, 4)
COLUMNS: dict[str, dict[str, object]] = {
    "fast": {"reduction": "fast", "micro_batches": 0},
    "fast, 8 parts": {"reduction": "fast", "micro_batches": 8},
    "ordered": {"reduction": "ordered", "micro_batches": 8},
}


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


def main() -> None:
    """Measures and prints the table."""
    options, rest = command.own_flags(sys.argv[1:], {"rounds": 5, "secs": 2})
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * max(REPLICAS)
    )
    tf.config.experimental.enable_op_determinism()
    config = config_lib.parse(["reduction", "--jit_compile=off", *rest])
    source = sources.open_source(config)
    print(f"{'replicas':>8}", *(f"{name:>14}" for name in COLUMNS), end="")
    print(f"{'ordered/fast':>14}{'MB sent a step':>16}")
    for num_replicas in REPLICAS:
        turns = {}
        sent = 0
        for name, changes in COLUMNS.items():
            changed = dataclasses.replace(config, **changes)
            turns[name], sent = make_turn(changed, num_replicas, source)
        times: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for _ in range(int(options["rounds"])):
            for name, turn in turns.items():
                times[name].append(turn(options["secs"]))
        medians = {name: statistics.median(ms) for name, ms in times.items()}
        ratio = medians["ordered"] / medians["fast"]
        print(f"{num_replicas:>8}", end=" ")
        print(*(f"{medians[name]:>14.1f}" for name in COLUMNS), end="")
        print(f"{ratio:>14.2f}{sent / 1e6:>16.2f}", flush=True)


if __name__ == "__main__":
    main()
