"""Measures the input: dtrain's beside what reads pictures elsewhere.

    python -m tests.benchmarks.reading [--write] [--rounds=5] [--batches=200]

Batches of 64 images, shuffled, float32 in [-1, 1], of one worker: 60,000 of 28
pixels from memory, and JPEG and PNG files of 256 pixels from the disk. dtrain
computes which images a batch has from its step; `shuffle(10_000).batch()` of
tf.data, TFDS' ImageFolder and Grain, where it is installed, read on from where
they are. All take turns in one process. Then the time to the first batch: of a
new run, and of one at step 10 million, where a buffer would have to be filled
by reading all that came before; and the most memory that a side takes beside
TensorFlow, in a process of its own that reads for a turn. `--write` puts the
table into docs/speed.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import statistics
import subprocess
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
from tests.benchmarks import command, memory
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
    "| at step 10 million | memory, MiB |",
    "|---|---|---|---|---|---|---|",
)
_NAMES = {
    "npz": "28x28, memory",
    "jpg": "256x256, jpg",
    "png": "256x256, png",
}
Side = Callable[[int], Iterator[Any]]
Maker = Callable[[], Side | None]


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


def write_files(folder: pathlib.Path, suffix: str) -> None:
    """Writes pictures that compress as photographs do."""
    chance = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for number in range(_NUM_FILES):
        coarse = chance.integers(0, 256, (32, 32, 3), np.uint8)
        path = folder / "all" / f"{number:04}.{suffix}"
        picture = Image.fromarray(coarse).resize((256, 256))
        picture.save(path, **({"quality": 90} if suffix == "jpg" else {}))


def makers(place: pathlib.Path, kind: str) -> dict[str, Maker]:
    """Returns what makes the sides that read what `write` has written."""
    if kind == "npz":
        with np.load(place / "images.npz") as stored:
            images = stored["images"]
        return {
            "dtrain": lambda: by_dtrain(f"npz:{place}/images.npz"),
            "`shuffle().batch()`": lambda: by_tf_data(from_memory(images)),
            "Grain": lambda: by_grain(images),
        }
    folder = place / kind / "train"
    names = sorted(map(str, folder.rglob("*.*")))
    return {
        "dtrain": lambda: by_dtrain(f"folder:{folder}"),
        "`shuffle().batch()`": lambda: by_tf_data(from_files(folder)),
        "TFDS": lambda: by_tf_data(from_tfds(folder)),
        "Grain": lambda: by_grain(names),
    }


def write(place: pathlib.Path) -> None:
    """Writes all that is read."""
    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (60_000, 28, 28, 1), np.uint8)
    np.savez(place / "images.npz", images=images)
    for suffix in ("jpg", "png"):
        write_files(place / suffix / "train", suffix)


def print_memory(place: str, kind: str, side: str, num_batches: int) -> None:
    """Prints the MiB that a side takes at most, in a process of its own."""
    make = makers(pathlib.Path(place), kind)[side]

    def read() -> None:
        start = make()
        assert start
        reader = start(0)
        for _ in range(num_batches):
            next(reader)

    # What a first operation takes is no side's.
    tf.data.Dataset.range(1).map(tf.identity, 2).get_single_element()
    print(memory.peak_mib(read))


def memory_of(
    place: pathlib.Path, kind: str, side: str, num_batches: int
) -> float:
    """Returns what `print_memory` prints."""
    program = (
        "import sys; from tests.benchmarks import reading; "
        "reading.print_memory(*sys.argv[1:4], int(sys.argv[4]))"
    )
    printed = subprocess.run(
        [
            *(sys.executable, "-c", program),
            *(str(place), kind, side, str(num_batches)),
        ],
        cwd=runs.ROOT,
        env=runs.environment(PYTHONPATH=os.pathsep.join(sys.path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    ).stdout
    return float(printed.splitlines()[-1])


def _first_secs(start: Side, step: int) -> float:
    """Returns the seconds to the first batch."""
    return timed(lambda: next(start(step)))


def rows(
    place: pathlib.Path, kind: str, rounds: int, num_batches: int
) -> list[str]:
    """Lets all sides read in turns; returns their rows.

    Args:
        place: of what `write` has written.
        kind: npz, jpg or png.
        rounds: turns of each side.
        num_batches: of a turn.
    """
    sides = {side: make() for side, make in makers(place, kind).items()}
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
            _NAMES[kind],
            side,
            f"{speed:,.0f}",
            f"{ratio:.2f}",
            f"{new:.3f}",
            f"{later:.3f}" if can_seek else "reads all before",
            f"{memory_of(place, kind, side, num_batches):,.0f}",
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
        write(place)
        for kind in _NAMES:
            batches = own["batches"] // (1 if kind == "npz" else 4)
            lines += rows(place, kind, own["rounds"], max(10, batches))
    if is_written:
        replace_table(runs.ROOT / "docs/speed.md", "reading", lines)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
