"""Compares two replicas of dtrain with two of Keras and of PyTorch.

    python -m tests.benchmarks.replicas [--write] [--rounds=3] [--secs=2]
        [--sides=8,28]

The DCGAN of `train` with batches of 64: on one replica, on two devices of one
process (the CPU, taken for two), and on two workers that talk over 127.0.0.1.
Keras has `fit` under the same strategies; PyTorch has two processes with
`DistributedDataParallel` over gloo. Each is started anew for each turn, and all
take turns. `--write` puts the table into docs/speed.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
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
from tests.benchmarks import command, train
from tests.benchmarks.pages import replace_table

BATCH_SIZE = 64
_FLAGS = (
    *("--r1_gamma=0", "--steps_per_loop=10", f"--batch_size={BATCH_SIZE}"),
    "--run_dir=nowhere",
)
# By name: who trains, under which strategy, in how many processes.
SIDES = {
    "dtrain, one replica": ("dtrain", "one_device", 1),
    "dtrain, two devices": ("dtrain", "mirrored", 1),
    "dtrain, two workers": ("dtrain", "multi_worker", 2),
    "fit, one replica": ("fit", "one_device", 1),
    "fit, two devices": ("fit", "mirrored", 1),
    "fit, two workers": ("fit", "multi_worker", 2),
    "PyTorch, one replica": ("torch", "one_device", 1),
    "PyTorch, two workers": ("torch", "multi_worker", 2),
}
_KINDS = ("one replica", "two devices", "two workers")
_HEAD = (
    "| pixels | on | dtrain, images/s | of one replica | of Keras `fit` "
    "| of PyTorch | MiB, dtrain | `fit` | PyTorch |",
    "|---|---|---|---|---|---|---|---|---|",
)
_LIMIT_SECS = 600.0


class Turn(NamedTuple):
    """What a side has done.

    Attributes:
        speed: images/s.
        mib: the most memory that its processes have had.
    """

    speed: float
    mib: float


def take_turn(name: str, images: pathlib.Path, secs: int) -> Turn:
    """Starts a side anew and lets it train.

    Args:
        name: of `SIDES`.
        images: an npz file.
        secs: that it trains for, about.

    Raises:
        SystemExit: a process failed; with what it printed.
    """
    num_processes = SIDES[name][2]
    ports = worker.free_ports(num_processes)
    cluster = Cluster(tuple(f"127.0.0.1:{port}" for port in ports), 0)
    processes = [
        runs.start_anew(
            *("tests.benchmarks.replicas", "side", name, str(images)),
            str(secs),
            TF_CONFIG=dataclasses.replace(cluster, index=index).to_tf_config()
            if num_processes > 1
            else "",
            TF_CPP_MIN_LOG_LEVEL="3",
            # Where PyTorch may be.
            PYTHONPATH=f"{runs.ROOT}:{os.environ.get('PYTHONPATH', '')}",
        )
        for index in range(num_processes)
    ]
    turns = []
    try:
        for each in processes:
            code, output = runs.finish(each, timeout=_LIMIT_SECS)
            if code != errors.FINISHED:
                raise SystemExit(f"{name}: {output}")
            turns.append(Turn(*map(float, output.splitlines()[-1].split())))
    finally:
        # One may wait for another that has failed.
        for each in processes:
            each.kill()
    # All do every step together: the slower one says how long it takes.
    return Turn(
        min(turn.speed for turn in turns), sum(turn.mib for turn in turns)
    )


def be_side(name: str, path: str, secs: int) -> None:
    """Is one process of a side; prints images/s of all, and its own MiB."""
    who, strategy_name, num_processes = SIDES[name]
    flags = [f"--dataset=npz:{path}", f"--strategy={strategy_name}", *_FLAGS]
    if strategy_name == "mirrored":
        flags.append("--num_devices=2")
    if who != "dtrain":
        # Its random numbers want a seed then.
        flags.append("--nodeterministic")
    config = config_lib.parse(["main", *flags])
    cluster = environment.from_environment(os.environ)
    images = np.load(path)["images"]
    if who == "torch":
        turn = _torch_turn(config, images, cluster)
    else:
        strategy = strategy_lib.make(config, cluster)
        if who == "dtrain":
            data = sources.open_data(config)
            turn = train.by_dtrain(config, strategy, data)
        else:
            turn = _fit_turn(config, images, strategy)
    at_once = config.steps_per_loop
    turn(at_once)
    pace = train.measure(turn, at_once, config)
    # As many on each, or one would wait for the other.
    loops = max(1, round(secs * pace / BATCH_SIZE / at_once))
    loops = _agreed(loops, pathlib.Path(path), cluster, num_processes)
    pace = train.measure(turn, loops * at_once, config)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(pace, most)


def _agreed(
    loops: int, path: pathlib.Path, cluster: Cluster, num_processes: int
) -> int:
    """Returns the loops that the chief wants; by a file, for all kinds."""
    if num_processes == 1:
        return loops
    told = path.with_name(f"loops-{cluster.workers[0].rpartition(':')[2]}")
    if cluster.is_chief:
        told.with_suffix(".new").write_text(str(loops))
        told.with_suffix(".new").rename(told)
    while not told.exists():
        time.sleep(0.01)
    return int(told.read_text())


def _fit_turn(
    config: Config, images: np.ndarray, strategy: tf.distribute.Strategy
) -> train.Turn:
    """Makes the loop of Keras.

    Several steps in one execution fail in it: Keras 3.15 and TensorFlow 2.21
    lose an input of the loop under a strategy of two CPUs.
    """
    replicas = strategy.num_replicas_in_sync
    at_once = config.steps_per_loop if replicas == 1 else 1
    share = dataclasses.replace(config, batch_size=BATCH_SIZE // replicas)
    with strategy.scope():
        hand = train.ByHand(share, images.shape[1:])
        return train.fitted(hand.step, train.dataset(config, images), at_once)


def _torch_turn(
    config: Config, images: np.ndarray, cluster: Cluster
) -> train.Turn:
    from tests.benchmarks import in_torch

    wrap = in_torch.join(cluster.workers, cluster.index)
    share = dataclasses.replace(
        config, batch_size=BATCH_SIZE // cluster.num_workers
    )
    batches = train.torch_batches(share, images)
    _, side, _, channels = images.shape
    made = in_torch.Training(
        in_torch.dcgan, share, batches, side, channels, wrap
    )
    return made.turn


def rows(images: pathlib.Path, side: int, rounds: int, secs: int) -> list[str]:
    """Lets all sides train in turns; returns their rows of the table."""
    names = [
        name
        for name, (who, _, _) in SIDES.items()
        if who != "torch" or importlib.util.find_spec("torch")
    ]
    turns = [
        {name: take_turn(name, images, secs) for name in names}
        for _ in range(rounds)
    ]

    def ratio(name: str, of: str) -> str:
        if of not in names:
            return ""
        ratios = [each[name].speed / each[of].speed for each in turns]
        return f"{statistics.median(ratios):.2f}"

    def mib(name: str) -> str:
        if name not in names:
            return ""
        return f"{statistics.median(each[name].mib for each in turns):,.0f}"

    lines = []
    for kind in _KINDS:
        ours, of_fit, of_torch = (
            f"{who}, {kind}" for who in ("dtrain", "fit", "PyTorch")
        )
        speed = statistics.median(each[ours].speed for each in turns)
        cells = [
            *(f"{side}", kind, f"{speed:,.0f}"),
            *(ratio(ours, f"dtrain, {_KINDS[0]}"), ratio(ours, of_fit)),
            *(ratio(ours, of_torch), mib(ours), mib(of_fit), mib(of_torch)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Measures and prints the table; or is one process of a side."""
    if arguments[:1] == ["side"]:
        be_side(arguments[1], arguments[2], int(arguments[3]))
        return
    is_written = "--write" in arguments
    own = command.only_own_flags(
        [each for each in arguments if each != "--write"],
        {"rounds": 3, "secs": 2, "sides": (8, 28)},
    )
    lines = list(_HEAD)
    print("\n".join(lines), flush=True)
    for side in own["sides"]:
        with tempfile.TemporaryDirectory() as directory:
            path = train.write_images(pathlib.Path(directory), side)
            lines += rows(path, side, own["rounds"], own["secs"])
        print("\n".join(lines[-len(_KINDS) :]), flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/speed.md", "replicas", lines)


if __name__ == "__main__":
    main(sys.argv[1:])
