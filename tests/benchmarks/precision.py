"""How far bfloat16, and XLA, lead a preset away from float32.

    python -m tests.benchmarks.precision [--write] [--steps=200] [NAME ...]

Each preset is trained from the same seed on images of 32 pixels, with few
channels, on one device. The distance is that of all trained weights from those
of float32, over how far these have moved themselves: 0 is the same run. The
last column is a run of the same first weights on other latents, and the data in
another order. `--write` puts the table into docs/results.md.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.config import presets
from dtrain.data import pipeline, sources
from dtrain.gan.state import GAN
from dtrain.gan.step import Step
from tests import programs_test, runs, small_presets
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table

SIDE = 32
WAYS = {
    "float32": (),
    "bfloat16": ("--precision=mixed_bfloat16",),
    "XLA": ("--jit_compile=on",),
}
# Steps of data that the run of comparison leaves out.
_SKIPPED = 1_000_000
_HEAD = ("| preset | bfloat16 | XLA | other data |", "|---|---|---|---|")

Weights = npt.NDArray[np.float64]


def trained(
    name: str,
    place: pathlib.Path,
    num_steps: int,
    *flags: str,
    skipped: int = 0,
) -> tuple[Weights, Weights]:
    """Trains a preset; returns its weights before and after, in one row each.

    Args:
        name: of the preset.
        place: of the data, as `small_presets` wants it.
        num_steps: of the run.
        flags: more of them.
        skipped: steps whose data and random numbers are left out.
    """
    told = [*small_presets.flags(name, place), *flags, "--run_dir=nowhere"]
    config = config_lib.parse(["main", *told])
    keras.config.set_dtype_policy(config.precision)
    data = sources.open_data(config)
    strategy, source = tf.distribute.get_strategy(), data.source
    gan = GAN(
        *(config, strategy, source.image_shape, source.num_classes), data.specs
    )
    if skipped:
        # As after a divergence there.
        gan.divergence.roll_back(gan.divergence.counts, 0, skipped)
    step = Step(gan)
    before = _weights(gan)
    iterator = pipeline.make_iterator(
        data, config, strategy, skipped, step.num_draws
    )
    step.run(iterator, tf.constant(num_steps))
    return before, _weights(gan)


def _weights(gan: GAN) -> Weights:
    return np.concatenate(
        [
            np.asarray(weight, np.float64).ravel()
            for name in gan.program.trained
            for weight in gan.program.networks[name].trainable_weights
        ]
    )


def row(name: str, place: pathlib.Path, num_steps: int) -> str:
    """Returns the row of a preset.

    Args:
        name: of the preset.
        place: of the data.
        num_steps: of each run.
    """
    ends = {}
    for way, flags in WAYS.items():
        before, ends[way] = trained(name, place, num_steps, *flags)
    _, ends["other"] = trained(name, place, num_steps, skipped=_SKIPPED)
    moved = np.linalg.norm(ends["float32"] - before)
    distances = [
        np.linalg.norm(ends[way] - ends["float32"]) / moved
        for way in ("bfloat16", "XLA", "other")
    ]
    return (
        f"| {name} | " + " | ".join(f"{each:.3f}" for each in distances) + " |"
    )


def main() -> None:
    """Trains and prints the table."""
    is_written = "--write" in sys.argv
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    own, names = command.own_flags(arguments, {"steps": 200})
    tf.config.experimental.enable_op_determinism()
    lines = list(_HEAD)
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        programs_test.write_data(place, SIDE)
        for name in names or presets.PRESETS:
            lines.append(row(name, place, own["steps"]))
            print(lines[-1], flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/results.md", "precision", lines)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
