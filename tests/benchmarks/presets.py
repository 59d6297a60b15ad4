"""Compares the speed of presets with loops written by hand.

    python -m tests.benchmarks.presets [--write] [NAME[:BATCH] ...]
        [--rounds=4] [--secs=2]

Images of 32 pixels in colour, batch 32, few channels; of `mlp`, points in the
plane, as it comes; three presets at other batches, too. By hand is the loop of
TensorFlow's tutorials around the same networks and objectives (`programs`),
`fit` has the same in a `train_step` of Keras, with as many steps in one
execution, and where PyTorch is installed, its loop is around networks with as
many weights (`in_torch`), in a process of its own. All take turns of some
seconds; the ratios are medians over turns. `--write` puts each row into
docs/speed.md when it is made; the others stay.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config, presets
from dtrain.data import pipeline, sources
from dtrain.gan import loading
from tests import programs_test, runs, small_presets
from tests.benchmarks import command, train
from tests.benchmarks.pages import replace_table, tables
from tests.benchmarks.programs import Loop

SIDE = 32
_COMMON = ("--batch_size=32", "--latent_size=64")
_IMAGES_PER_LOOP = 320
# Of presets with fewer images a second, and of points.
_OWN_IMAGES_PER_LOOP = {"cyclegan": 64, "mlp": 1280, "r3gan": 64, "sngan": 64}
_USUAL = ("--base_channels=16", *_COMMON)
# What sets the width of each preset, and its batch.
SIZES = {
    "r3gan": ("--base_channels=64", *_COMMON),
    "biggan_small": ("--base_channels=8", *_COMMON),
    "mlp": ("--base_channels=128", "--batch_size=128", "--latent_size=2"),
}
# By their batch, where it is another.
_AT_BATCHES = [
    f"{name}:{batch}"
    for name in ("sngan", "stylegan2", "r3gan")
    for batch in (16, 64, 256)
]
_HEAD = (
    "| preset | dtrain, images/s | of by hand | of Keras `fit` | of PyTorch |",
    "|---|---|---|---|---|",
)


def by_fit(config: Config, data: sources.Data) -> train.Turn:
    """Makes the loop of Keras."""
    loop = Loop(config, data)

    def step(batches: Any) -> tf.Tensor:
        draws = [
            tf.nest.map_structure(operator.itemgetter(number), batches)
            for number in range(loop.num_draws)
        ]
        loop.run_step(draws)
        return tf.cast(loop.step, tf.float32)

    batches = loop.dataset(data).batch(loop.num_draws).prefetch(4)
    return train.fitted(step, batches, config.steps_per_loop)


def _batches(config: Config, data: sources.Data) -> list[np.ndarray]:
    """Makes batches as PyTorch has them, in memory."""
    part = pipeline.Part(config.batch_size, 1, 1, 0)
    dataset = pipeline.make_dataset_of_part(data, config, part, 0).take(16)
    return [
        np.ascontiguousarray(batch.images.numpy().transpose(0, 3, 1, 2))
        for batch in dataset
    ]


def num_weights(config: Config, data: sources.Data) -> tuple[int, int]:
    """Counts those that are trained, of the discriminator and all others."""
    source = data.source
    of_data = source.image_shape, source.num_classes, data.specs
    program = loading.build(loading.load(config.model), config, *of_data)
    counts = {
        name: sum(
            weight.shape.num_elements() for weight in network.trainable_weights
        )
        for name, network in program.networks.items()
    }
    judges = counts.pop("discriminator", 0)
    return judges, sum(counts.values())


def in_torch(
    name: str,
    config: Config,
    images: list[np.ndarray],
    num_weights: tuple[int, int],
) -> train.Turn | None:
    """Makes the loop of PyTorch; None where the networks are not there.

    Args:
        name: of the preset.
        config: the settings that all sides train with.
        images: batches, float32 [b, channels, side, side].
        num_weights: of the discriminator, and of all other networks.
    """
    from tests.benchmarks import in_torch as lib
    from tests.benchmarks import stylegan2_in_torch

    batches = itertools.cycle(images)
    if config.model == "stylegan2":
        training = stylegan2_in_torch.Training(config, batches, SIDE)
    elif name in lib.NETWORKS:
        training = lib.Training(lib.NETWORKS[name], config, batches, SIDE)
    else:
        return None
    theirs = tuple(
        sum(weight.numel() for weight in network.parameters())
        for network in (training.discriminator, training.generator)
    )
    assert theirs == num_weights, (name, theirs, num_weights)
    return training.turn


def row(label: str, place: pathlib.Path, rounds: int, secs: int) -> str:
    """Lets all sides train in turns; returns the row of a preset.

    Args:
        label: the preset, or preset:batch.
        place: of the data, as `small_presets` wants it.
        rounds: turns of each side.
        secs: of a turn of dtrain, about; the others make as many steps.
    """
    name, _, batch = label.partition(":")
    told = [
        *small_presets.flags(name, place),
        *SIZES.get(name, _USUAL),
        "--run_dir=nowhere",
        *([f"--batch_size={batch}"] if batch else []),
    ]
    config = config_lib.parse(["main", *told])
    at_once = _OWN_IMAGES_PER_LOOP.get(name, _IMAGES_PER_LOOP)
    config = dataclasses.replace(
        config, steps_per_loop=max(1, at_once // config.batch_size)
    )
    strategy = strategy_lib.make(config, environment.ALONE)
    data = sources.open_data(config)
    given = name, config, _batches(config, data), num_weights(config, data)
    with train.torch_apart(in_torch, *given) as torch_turn:
        sides = {
            "dtrain": train.by_dtrain(config, strategy, data),
            "by hand": Loop(config, data).turn,
            "fit": by_fit(config, data),
            "PyTorch": torch_turn,
        }
        cells = train.compare(sides, config, rounds, secs)
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    """Measures and prints the table."""
    is_written = "--write" in sys.argv
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    own, names = command.own_flags(arguments, {"rounds": 4, "secs": 2})
    for name in names:
        preset, colon, batch = name.partition(":")
        is_batch = batch.isascii() and batch.isdigit() and int(batch) > 0
        if preset not in presets.PRESETS or (colon and not is_batch):
            command.refuse(
                f"{name} is no preset, or preset:batch, of "
                f"{', '.join(presets.PRESETS)}"
            )
    print("\n".join(_HEAD), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        programs_test.write_data(place, SIDE)
        for name in names or [*presets.PRESETS, *_AT_BATCHES]:
            line = row(name, place, own["rounds"], own["secs"])
            print(line, flush=True)
            if is_written:
                _write(name, line)
            tf.keras.backend.clear_session()


def _write(name: str, line: str) -> None:
    page = runs.ROOT / "docs/speed.md"
    lines = {
        cells[0]: f"| {' | '.join(cells)} |"
        for cells in tables(page)["presets"][1:]
    }
    lines[name] = line
    replace_table(page, "presets", [*_HEAD, *lines.values()])


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
