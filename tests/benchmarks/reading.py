"""Measures the input: dtrain's beside what reads pictures elsewhere.

    python -m tests.benchmarks.reading [--write] [--rounds=5] [--batches=200]

Batches of 64 images, shuffled, float32 in [-1, 1], of one worker: 60,000 of 28
pixels from memory, and JPEG and PNG files of 256 pixels from the disk. dtrain
computes which images a batch has from its step; `shuffle(10_000).batch()` of
tf.data, TFDS' ImageFolder and Grain, where it is installed, read on from where
they are. All take turns in one process. Then the time to the first batch: of a
new run, and of one at step 10 million, where a buffer would have to be filled
by reading all that came before. `--write` puts the table into docs/speed.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from dtrain import config as config_lib
from dtrain.data import pipeline, sources
from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table
from tests.benchmarks.stall import timed

BATCH_SIZE = 64
_BUFFER = 10_000
_NUM_FILES = 512
_LATER = 10_000_000
# At least as many batches as any side has ready before its turn.
_READ_AHEAD = 20
_PREFETCH = 4
_OF_FILES = ("--image_size=256", "--cache_gib=0")
_HEAD = (
    "| images | read by | images/s | of it dtrain's are | first batch, s "
    "| at step 10 million |",
    "|---|---|---|---|---|---|",
)
Side = Callable[[int], Iterator[Any]]


def _scaled(images: tf.Tensor) -> tf.Tensor:
    return tf.cast(images, tf.float32) / 127.5 - 1.0


def by_dtrain(dataset: str) -> Side:
    """Makes the input of a run, from a step on."""
    config = config_lib.parse(
        [
            *("main", f"--dataset={dataset}", f"--batch_size={BATCH_SIZE}"),
            *(() if dataset.startswith("npz") else _OF_FILES),
            "--run_dir=nowhere",
        ]
    )
    data = sources.open_data(config)
    part = pipeline.Part(BATCH_SIZE, 1, 1, 0)
    return lambda step: iter(
        pipeline.make_dataset_of_part(data, config, part, step)
    )


def by_tf_data(dataset: tf.data.Dataset) -> Side:
    """Shuffles and batches by tf.data, as its guide has it."""
    dataset = (
        dataset.repeat()
        .batch(BATCH_SIZE, drop_remainder=True)
        # By AUTOTUNE it would hold hundreds, read in the turns of others.
        .prefetch(_PREFETCH)
    )
    return lambda _: iter(dataset)


def from_memory(images: np.ndarray) -> tf.data.Dataset:
    """Reads an array."""
    dataset = tf.data.Dataset.from_tensor_slices(images)
    return dataset.shuffle(_BUFFER).map(_scaled, tf.data.AUTOTUNE)


def from_files(folder: pathlib.Path) -> tf.data.Dataset:
    """Reads pictures by their names."""

    def decode(path: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(
            tf.io.read_file(path), channels=3, expand_animations=False
        )
        return _scaled(tf.ensure_shape(image, [256, 256, 3]))

    names = sorted(map(str, folder.rglob("*.*")))
    dataset = tf.data.Dataset.from_tensor_slices(names).shuffle(_BUFFER)
    return dataset.map(decode, tf.data.AUTOTUNE)


def from_tfds(folder: pathlib.Path) -> tf.data.Dataset:
    """Reads pictures by TFDS, whose shuffling is tf.data's."""
    import tensorflow_datasets as tfds

    builder = tfds.ImageFolder(str(folder.parent), shape=(256, 256, 3))
    dataset = builder.as_dataset(split=folder.name, shuffle_files=True)
    return dataset.map(
        lambda row: _scaled(row["image"]), tf.data.AUTOTUNE
    ).shuffle(_BUFFER // 100)


def by_grain(images: np.ndarray | list[str]) -> Side | None:
    """Reads an array or files by Grain; None where that is not installed."""
    if not importlib.util.find_spec("grain"):
        return None
    grain = importlib.import_module("grain")

    def load(image: np.ndarray | str) -> np.ndarray:
        if isinstance(image, str):
            image = np.asarray(Image.open(image))
        return image / np.float32(127.5) - np.float32(1.0)

    dataset = (
        grain.MapDataset.source(images)
        .shuffle(seed=0)
        .repeat()
        .map(load)
        .batch(BATCH_SIZE, drop_remainder=True)
    )
    # Likewise of its default.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_PREFETCH)
    return lambda step: iter(dataset[step:].to_iter_dataset(ahead))


def write_files(folder: pathlib.Path, suffix: str) -> list[str]:
    """Writes pictures that compress as photographs do; returns their names."""
    chance = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    names = []
    for number in range(_NUM_FILES):
        coarse = chance.integers(0, 256, (32, 32, 3), np.uint8)
        names.append(str(folder / "all" / f"{number:04}.{suffix}"))
        picture = Image.fromarray(coarse).resize((256, 256))
        picture.save(names[-1], **({"quality": 90} if suffix == "jpg" else {}))
    return names


def _first_secs(start: Side, step: int) -> float:
    """Returns the seconds to the first batch."""
    return timed(lambda: next(start(step)))


def rows(
    name: str, sides: dict[str, Side | None], rounds: int, num_batches: int
) -> list[str]:
    """Lets all sides read in turns; returns their rows."""
    made = {side: start for side, start in sides.items() if start}
    first = {
        side: [_first_secs(start, step) for step in (0, _LATER)]
        for side, start in made.items()
    }
    readers = {side: start(0) for side, start in made.items()}

    def read(reader: Iterator[Any]) -> float:
        secs = timed(lambda: [next(reader) for _ in range(num_batches)])
        return num_batches * BATCH_SIZE / secs

    def read_afresh(reader: Iterator[Any]) -> float:
        # What it has read ahead while others had their turn is not counted.
        for _ in range(_READ_AHEAD):
            next(reader)
        return read(reader)

    for reader in readers.values():
        read(reader)
    speeds = [
        {side: read_afresh(reader) for side, reader in readers.items()}
        for _ in range(rounds)
    ]
    lines = []
    for side in made:
        speed = statistics.median(each[side] for each in speeds)
        ratio = statistics.median(
            each["dtrain"] / each[side] for each in speeds
        )
        new, later = first[side]
        can_seek = side in ("dtrain", "Grain")
        cells = [
            *(name, side, f"{speed:,.0f}", f"{ratio:.2f}", f"{new:.3f}"),
            f"{later:.3f}" if can_seek else "reads all before",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measures and prints the table."""
    is_written = "--write" in sys.argv
    own = command.only_own_flags(sys.argv[1:], {"rounds": 5, "batches": 200})
    print("\n".join(_HEAD), flush=True)
    lines = list(_HEAD)
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        noise = np.random.default_rng(0)
        images = noise.integers(0, 256, (60_000, 28, 28, 1), np.uint8)
        np.savez(place / "images.npz", images=images)
        lines += rows(
            "28x28, memory",
            {
                "dtrain": by_dtrain(f"npz:{place}/images.npz"),
                "`shuffle().batch()`": by_tf_data(from_memory(images)),
                "Grain": by_grain(images),
            },
            own["rounds"],
            own["batches"],
        )
        for suffix in ("jpg", "png"):
            folder = place / suffix / "train"
            names = write_files(folder, suffix)
            lines += rows(
                f"256x256, {suffix}",
                {
                    "dtrain": by_dtrain(f"folder:{folder}"),
                    "`shuffle().batch()`": by_tf_data(from_files(folder)),
                    "TFDS": by_tf_data(from_tfds(folder)),
                    "Grain": by_grain(names),
                },
                own["rounds"],
                max(10, own["batches"] // 4),
            )
    if is_written:
        replace_table(runs.ROOT / "docs/speed.md", "reading", lines)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
