"""Counts which of 1,000 modes a loss covers: three digits as the channels.

    python -m tests.benchmarks.stacked_digits [--seeds=3] [--write] [flags]

The protocol of Stacked-MNIST (Metz et al. 2017, "Unrolled GANs"; Lin et al.
2018, "PacGAN") on the embedded digits of 8 pixels: 128,000 images, each of
three digits by chance as red, green and blue; 26,000 samples, whose channels a
classifier of digits reads; the modes are the numbers from 0 to 999 that are
seen, the reverse KL is that of their histogram against the uniform one.
`--write` puts the table into docs/results.md.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from dtrain.cluster import environment
from dtrain.cluster.workers import Workers
from dtrain.config import Config
from dtrain.data import digits, sources
from dtrain.quality import choosing
from dtrain.quality.samples import AVERAGE, RAW, Samples
from dtrain.quality.saying import Slowly
from dtrain.run import export
from tests import runs
from tests.benchmarks import command, grid
from tests.benchmarks.pages import replace_table

NUM_IMAGES, NUM_SAMPLES, NUM_MODES = 128_000, 26_000, 1000
_AT_ONCE = 1000
# Of all rows: the networks and the optimizers are the same.
COMMON = (
    *("--model=dcgan", "--base_channels=64", "--latent_size=64"),
    *("--batch_size=64", "--num_steps=1500", "--sample_every_steps=0"),
    *("--generator_learning_rate=2e-4", "--discriminator_learning_rate=2e-4"),
    *("--beta_1=0", "--beta_2=0.99", "--burn_in_images=96000"),
    *("--end_learning_rate_factor=0.1", "--ema_half_life_images=5000"),
)
_R1, _R2 = (f"--r{number}_gamma=1" for number in (1, 2))
_NO_R1, _NO_R2 = (f"--r{number}_gamma=0" for number in (1, 2))
_FALLS = "--end_gamma_factor=0.1"
RELATIVISTIC, PLAIN = "--loss=relativistic", "--loss=non_saturating"
# The rows, by the flags of each.
RECIPES = {
    "relativistic, R1 + R2": (*COMMON, RELATIVISTIC, _R1, _R2, _FALLS),
    "plain": (*COMMON, PLAIN, _NO_R1, _NO_R2),
    "relativistic, R1 alone": (*COMMON, RELATIVISTIC, _R1, _NO_R2, _FALLS),
    "relativistic, R2 alone": (*COMMON, RELATIVISTIC, _NO_R1, _R2, _FALLS),
    "plain, R1 + R2": (*COMMON, PLAIN, _R1, _R2, _FALLS),
    "`--preset=dcgan`, with BatchNorm": (
        *("--preset=dcgan", "--batch_size=64", "--latent_size=64"),
        *("--num_steps=1500", "--sample_every_steps=0"),
    ),
}
_HEAD = (
    "| | weights | modes of 1,000 | reverse KL | CPU seconds |",
    "|---|---|---|---|---|",
)
# Makes numbers from 0 to 999, int [n], of images float32 [n, 8, 8, 3].
Reader = Callable[[tf.Tensor], npt.NDArray[np.int64]]


class Modes(NamedTuple):
    """What is seen in samples.

    Attributes:
        covered: numbers from 0 to 999 that are there.
        reverse_kl: at least 0; of uniform numbers 0.019.
    """

    covered: int
    reverse_kl: float


def write(path: pathlib.Path) -> None:
    """Writes the images of the data set, the same each time."""
    images, _ = digits.read()
    chosen = np.random.default_rng(0).integers(0, len(images), (NUM_IMAGES, 3))
    stacked = np.concatenate(
        [images[chosen[:, channel]] for channel in range(3)], axis=-1
    )
    np.savez(path, images=stacked)


def make_reader() -> Reader:
    """Trains the classifier that reads digits."""
    config = Config()
    source = sources.open_source(config)
    workers = Workers(tf.distribute.get_strategy(), environment.ALONE)
    say = Slowly(lambda line: print(line, file=sys.stderr))
    classifier = choosing.make("classifier", source, config, workers, "", say)

    @tf.function
    def read(images: tf.Tensor) -> tf.Tensor:
        images = tf.clip_by_value(tf.cast(images, tf.float32), -1.0, 1.0)
        found = [
            tf.argmax(classifier(images[..., channel : channel + 1])[1], 1)
            for channel in range(3)
        ]
        return 100 * found[0] + 10 * found[1] + found[2]

    return lambda images: read(images).numpy()


def measure(run_dir: str, weights: str, read: Reader) -> Modes:
    """Measures the samples of a run."""
    trained = export.restore(run_dir)
    data = sources.open_data(trained.config)
    samples = Samples(trained.gan, data, 0, weights)
    samples.prepare()
    make = tf.function(lambda indices: samples.make(indices)[0])
    numbers = [
        read(make(tf.range(start, start + _AT_ONCE, dtype=tf.int64)))
        for start in range(0, NUM_SAMPLES, _AT_ONCE)
    ]
    shares = np.bincount(np.concatenate(numbers), minlength=NUM_MODES)
    shares = shares[shares > 0] / NUM_SAMPLES
    return Modes(
        len(shares), float((shares * np.log(shares * NUM_MODES)).sum())
    )


def _row(name: str, weights: str, rows: list[Modes], secs: str) -> str:
    covered = " ".join(str(each.covered) for each in rows)
    distance = " ".join(f"{each.reverse_kl:.3f}" for each in rows)
    return f"| {name} | {weights} | {covered} | {distance} | {secs} |"


def main() -> None:
    """Trains, measures and prints the table."""
    is_written = "--write" in sys.argv
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    own, rest = command.own_flags(arguments, {"seeds": 3})
    read, lines = make_reader(), list(_HEAD)
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as place:
        path = pathlib.Path(place) / "stacked.npz"
        write(path)
        for name, flags in RECIPES.items():
            found: dict[str, list[Modes]] = {RAW: [], AVERAGE: []}
            secs = []
            for seed in range(own["seeds"]):
                run_dir = f"{place}/{len(lines)}-{seed}"
                told = (f"--dataset=npz:{path}", f"--seed={seed}", *flags)
                secs.append(grid.trained(run_dir, *told, *rest))
                for weights, rows in found.items():
                    rows.append(measure(run_dir, weights, read))
            took = f"{min(secs):.0f} to {max(secs):.0f}"
            for weights, rows in found.items():
                lines.append(_row(name, weights, rows, took))
                print(lines[-1], flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/results.md", "stacked_digits", lines)


if __name__ == "__main__":
    main()
