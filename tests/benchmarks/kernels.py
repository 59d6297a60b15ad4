"""Profiles a step: which kinds of operation its time goes into.

    python -m tests.benchmarks.kernels [--steps=20] [--sides=8,28,64] [--write]

The DCGAN of `train`, with batches of 64, by TensorFlow's profiler: the time of
each operation, added up by kind. Operations that overlap count in full, and
what takes next to no time is not seen. Convolutions are oneDNN's, which whoever
trains these networks by TensorFlow calls alike: their share says how much there
is to be ahead by. `--write` puts the table into docs/speed.md.
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

import keras
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from dtrain import config as config_lib
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.data import sources
from tests import runs
from tests.benchmarks import command, train
from tests.benchmarks.pages import replace_table

# By column, what the names of its operations hold; the first that fits counts.
_KINDS = {
    "convolutions": "Conv2D",
    "products of matrices": "MatMul",
    "activations, biases": "Relu|Bias|Tanh|Sigmoid|Softplus",
}
_REST = "optimizer, average, norms, verdict, random numbers"
_HEAD = (
    f"| pixels | ms a step | {' | '.join((*_KINDS, _REST))} |",
    "|---|---|---|---|---|---|",
)
# Until TensorFlow knows which operations are cheap.
_WARM_STEPS = 80


def ms_by_operation(
    place: str, turn: train.Turn, steps: int
) -> dict[str, float]:
    """Trains under the profiler; returns the ms a step of each operation.

    Args:
        place: an empty directory, for what the profiler writes.
        turn: trains for so many steps.
        steps: to train for.
    """
    options = tf.profiler.experimental.ProfilerOptions(
        host_tracer_level=3, python_tracer_level=0
    )
    with tf.profiler.experimental.Profile(place, options):
        turn(steps)
    [path] = pathlib.Path(place).rglob("*.xplane.pb")
    # Its classes are made when it is imported.
    messages: Any = xplane_pb2
    space = messages.XSpace.FromString(path.read_bytes())
    found = collections.Counter[str]()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                # Of an operation, its name in the graph and its type.
                operation = re.fullmatch(r"[\w/.-]+:(\w+)", name)
                if operation:
                    found[operation[1]] += event.duration_ps / 1e9 / steps
    return dict(found)


def row(side: int, steps: int) -> str:
    """Profiles images of one size; returns its row of the table."""
    with tempfile.TemporaryDirectory() as place:
        images = train.write_images(pathlib.Path(place), side)
        config = config_lib.parse(
            [
                *("main", "--strategy=mirrored", "--r1_gamma=0"),
                *(f"--dataset=npz:{images}", "--steps_per_loop=10"),
            ]
        )
        turn = train.by_dtrain(
            config,
            strategy_lib.make(config, environment.ALONE),
            sources.open_data(config),
        )
        turn(_WARM_STEPS)
        begin = time.perf_counter()
        turn(steps)
        ms = 1e3 * (time.perf_counter() - begin) / steps
        found = ms_by_operation(f"{place}/profile", turn, steps)
    total = sum(found.values())
    spent = collections.Counter[str]()
    for name, each in found.items():
        spent[_kind(name)] += each / total
    cells = [f"{spent[kind]:.3f}" for kind in (*_KINDS, _REST)]
    return f"| {side} | {ms:.1f} | {' | '.join(cells)} |"


def _kind(operation: str) -> str:
    for kind, names in _KINDS.items():
        if re.search(names, operation):
            return kind
    return _REST


def main() -> None:
    """Profiles all sizes and prints the table."""
    is_written = "--write" in sys.argv
    own = command.only_own_flags(
        sys.argv[1:], {"steps": 20, "sides": (8, 28, 64)}
    )
    lines = list(_HEAD)
    print("\n".join(lines), flush=True)
    for side in own["sides"]:
        lines.append(row(side, own["steps"]))
        print(lines[-1], flush=True)
        keras.backend.clear_session()
    if is_written:
        replace_table(runs.ROOT / "docs/speed.md", "kernels", lines)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
