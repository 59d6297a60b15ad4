"""Predicts one and two workers on this machine, and measures them.

Two processes that know each other as workers take turns, several times: each
trains alone while the other waits, both train alone at once, both sum vectors,
and both train as one run. What a step takes is fitted to batches of other
sizes; what a sum takes, to vectors that are no gradients; how long workers wait
for each other is what a run of a small batch takes beyond that. From these, the
formulas of `machines` predict the runs. `tests.benchmarks.scale` starts it and
makes the table.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dtrain import config as config_lib
from dtrain import errors
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.cluster.environment import Cluster
from dtrain.config import Config
from dtrain.data import sources
from launch.keep import worker
from tests import runs
from tests.benchmarks import cost, machines, train

# DCGAN on 28x28 as in `train`, of fewer channels: sums count for more.
FLAGS = ("--base_channels=16", "--r1_gamma=0", "--steps_per_loop=1000")
SHAPE = 28, 28, 1
# What is predicted; each of two workers has a half.
BATCH_SIZE = 64
# Of one that trains alone, and of both that do: a line through them.
ALONE = (16, 128)
AT_ONCE = (8, 64)
# float32 of a vector that is summed.
VECTORS = (1, 1_000_000)
# So short that what else the machine does strikes all sides of a round alike.
_TURN_SECS = 0.4
_LIMIT_SECS = 600.0

# Seconds of a step or of a sum, by the name of a side.
Secs = Mapping[str, float]


class Prediction(NamedTuple):
    """What was predicted of a run, and found.

    Attributes:
        predicted: seconds of a step.
        measured: likewise.
    """

    predicted: float
    measured: float


def predict(secs: Secs, found: cost.Cost) -> dict[str, Prediction]:
    """Predicts a run of one worker and one of two.

    Args:
        secs: what was measured.
        found: what a step of the model has.
    """
    sums = [secs[f"sum {size}"] for size in VECTORS]
    link = machines.Link(
        bandwidth=4 * (VECTORS[1] - VECTORS[0]) / max(sums[1] - sums[0], 1e-9),
        latency=sums[0] / 2,
    )
    travel = machines.ring(4 * found.gradients, 2, link)
    travel += (found.all_reduces - 1) * machines.ring(0, 2, link)
    alone = _on_line(
        {size: secs[f"alone {size}"] for size in ALONE}, BATCH_SIZE
    )
    at_once = _on_line(
        {size: secs[f"at once {size}"] for size in AT_ONCE}, BATCH_SIZE // 2
    )
    # Whoever is first waits for the other: no formula knows how long.
    wait = secs[f"two {2 * AT_ONCE[0]}"] - machines.step_secs(
        secs[f"at once {AT_ONCE[0]}"], travel
    )
    return {
        "one worker": Prediction(alone, secs["one"]),
        "two workers": Prediction(
            machines.step_secs(at_once, travel), secs["two"]
        ),
        "two workers that wait for each other": Prediction(
            machines.step_secs(at_once, travel) + max(wait, 0.0), secs["two"]
        ),
    }


def _on_line(points: Mapping[int, float], size: int) -> float:
    """Returns the seconds of a step of `size`: a constant, and operations."""
    (few, low), (many, high) = points.items()
    return low + (high - low) * (size - few) / (many - few)


def measure(rounds: int) -> list[Secs]:
    """Measures all sides in turns; returns what each round took.

    Args:
        rounds: turns of each.

    Raises:
        SystemExit: a process failed; with what it printed.
    """
    ports = worker.free_ports(2)
    cluster = Cluster(tuple(f"127.0.0.1:{port}" for port in ports), 0)
    with tempfile.TemporaryDirectory() as directory:
        noise = np.random.default_rng(0)
        images = noise.integers(0, 256, (4096, *SHAPE), np.uint8)
        np.savez(f"{directory}/images.npz", images=images)
        processes = [
            runs.start_anew(
                *("tests.benchmarks.loopback", directory, str(rounds)),
                TF_CONFIG=dataclasses.replace(
                    cluster, index=index
                ).to_tf_config(),
            )
            for index in range(2)
        ]
        ends = [runs.finish(each, timeout=_LIMIT_SECS) for each in processes]
        for code, output in ends:
            if code != errors.FINISHED:
                raise SystemExit(output)
        times = json.loads((pathlib.Path(directory) / "times").read_text())
    return [
        dict(zip(times, each, strict=True))
        for each in zip(*times.values(), strict=True)
    ]


class Side(NamedTuple):
    """What takes turns.

    Attributes:
        turn: does its thing so many times, and waits for the last.
        is_of_both: whether both processes do it.
    """

    turn: train.Turn
    is_of_both: bool = True


def _sides(config: Config, strategy: tf.distribute.Strategy) -> dict[str, Side]:
    """Makes all that take turns; both processes call it."""
    data = sources.open_data(config)
    lone = tf.distribute.get_strategy()

    def alone(batch_size: int) -> train.Turn:
        changed = dataclasses.replace(
            config, batch_size=batch_size, strategy="default"
        )
        return train.by_dtrain(changed, lone, data)

    sides = {f"alone {size}": Side(alone(size), False) for size in ALONE}
    sides["one"] = Side(alone(BATCH_SIZE), False)
    sides |= {f"at once {size}": Side(alone(size)) for size in AT_ONCE}
    sides |= {f"sum {size}": Side(_sums(strategy, size)) for size in VECTORS}
    small = dataclasses.replace(config, batch_size=2 * AT_ONCE[0])
    sides[f"two {small.batch_size}"] = Side(
        train.by_dtrain(small, strategy, data)
    )
    sides["two"] = Side(train.by_dtrain(config, strategy, data))
    return sides


def _sums(strategy: tf.distribute.Strategy, size: int) -> train.Turn:
    """Makes a loop of all-reduces of a vector, one after the other."""

    def mean(vector: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        # Of an operand without a device nobody knows where the sum goes.
        with tf.device("CPU:0"):
            return context.all_reduce(
                tf.distribute.ReduceOp.MEAN, tf.identity(vector)
            )

    @tf.function
    def loop(number: tf.Tensor) -> tf.Tensor:
        vector = tf.ones([size])
        for _ in tf.range(number):
            vector = strategy.run(mean, [vector])
        return vector

    return lambda number: loop(tf.constant(number)).numpy()


def _agreed(
    strategy: tf.distribute.Strategy,
) -> Callable[[float], float]:
    """Makes a function that all workers call; returns the chief's number."""

    @tf.function
    def agree(number: tf.Tensor) -> tf.Tensor:
        return strategy.reduce(
            tf.distribute.ReduceOp.SUM,
            strategy.run(lambda given: given, [number]),
            axis=None,
        )

    is_chief = not strategy.cluster_resolver.task_id
    return lambda number: float(
        agree(tf.constant(float(number) if is_chief else 0.0))
    )


def take_turns(directory: str, rounds: int) -> None:
    """Is one of both processes; the chief writes the times of all sides.

    Args:
        directory: of the images, and of what is written.
        rounds: turns of each side.
    """
    cluster = environment.from_environment(os.environ)
    told = (f"--dataset=npz:{directory}/images.npz", "--run_dir=nowhere")
    told += (f"--batch_size={BATCH_SIZE}", "--strategy=multi_worker", *FLAGS)
    config = config_lib.parse(["main", *told])
    strategy = strategy_lib.make(config, cluster)
    sides = _sides(config, strategy)
    agreed = _agreed(strategy)
    counts = dict.fromkeys(sides, 1)
    times: dict[str, list[float]] = {name: [] for name in sides}
    # The first is a trace, and the second says how many fit into a turn.
    for number in range(rounds + 2):
        for name, side in sides.items():
            agreed(0)
            begin = time.perf_counter()
            if side.is_of_both or cluster.is_chief:
                side.turn(counts[name])
            if side.is_of_both:
                # A run is as fast as the slower of its workers.
                agreed(0)
            secs = (time.perf_counter() - begin) / counts[name]
            if number > 1:
                times[name].append(secs)
            counts[name] = int(agreed(max(1, min(_TURN_SECS / secs, 1000))))
    if cluster.is_chief:
        (pathlib.Path(directory) / "times").write_text(json.dumps(times))


def main(arguments: Sequence[str]) -> None:
    """Is one of both processes."""
    take_turns(arguments[0], int(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
