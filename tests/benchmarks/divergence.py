"""Measures what it costs to judge every step.

    python -m tests.benchmarks.divergence [--rounds=10] [--steps=100] [flags]

Two GANs of `tests.benchmarks.train` take turns in one process: one as it is,
one without the norms of the gradients and without a verdict.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from unittest import mock

import numpy as np
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data import sources
from dtrain.gan import divergence
from tests.benchmarks import command, train


def _no_verdict(*_: object) -> tf.Tensor:
    return tf.constant(divergence.FINE)


def _no_norm(_: object) -> tf.Tensor:
    return tf.constant(1.0)


def compare(
    turns: dict[str, train.Turn], num_steps: int, config: Config
) -> float:
    """Lets each side train once; prints a row and returns the ratio."""
    ours, theirs = (
        train.measure(turn, num_steps, config) for turn in turns.values()
    )
    print(f"{ours:>8.1f}  {theirs:>8.1f}  {ours / theirs:>6.3f}", flush=True)
    return ours / theirs


def main() -> None:
    """Measures and prints the table."""
    own, rest = command.own_flags(sys.argv[1:], {"rounds": 10, "steps": 100})
    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (4096, 28, 28, 1), np.uint8)
    with tempfile.TemporaryDirectory() as directory:
        np.savez(f"{directory}/images.npz", images=images)
        dataset = f"--dataset=npz:{directory}/images.npz"
        config = config_lib.parse(
            [sys.argv[0], "--strategy=mirrored", dataset, *rest]
        )
        strategy = strategy_lib.make(config, environment.ALONE)
        data = sources.open_data(config)
    turns = {
        "judged": train.by_dtrain(config, strategy, data),
        "not judged": train.by_dtrain(config, strategy, data),
    }
    turns["judged"](config.steps_per_loop + 1)
    with (
        mock.patch.object(divergence.Divergence, "judge", _no_verdict),
        mock.patch.object(tf.linalg, "global_norm", _no_norm),
    ):
        # Traced here, and used below.
        turns["not judged"](config.steps_per_loop + 1)
    print("images/s\n  judged  not judged  ratio")
    ratios = [
        compare(turns, own["steps"], config) for _ in range(own["rounds"])
    ]
    print(f"median of the ratios {statistics.median(ratios):.4f}")


if __name__ == "__main__":
    main()
