"""Counts what replicas send each other in a step of each preset.

    python -m tests.benchmarks.collectives [--write] [NAME ...]

The step is traced on two replicas, and its all-reduces are counted: one of all
gradients, losses and metrics for each phase, and one for each BatchNorm in each
pass, and once more for its gradient; `--reduction=ordered` has the first alone.
`--write` puts the table into docs/results.md.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import tensorflow as tf

from dtrain import config as config_lib
from dtrain.config import presets
from dtrain.data import pipeline, sources
from dtrain.gan.state import GAN
from dtrain.gan.step import Step
from dtrain.models.batch_norm import BatchNorm
from tests import programs_test, replicas, runs, small_presets
from tests.benchmarks.pages import replace_table

NUM_REPLICAS = 2
SIDE = 32


class Counts(NamedTuple):
    """What there is in a step.

    Attributes:
        phases: those of the program.
        passes: of all BatchNorms in training.
        collectives: of all kinds.
    """

    phases: int
    passes: int
    collectives: int


def count(name: str, place: pathlib.Path) -> Counts:
    """Counts what there is in a step of a preset.

    Args:
        name: of the preset.
        place: of the data, as `small_presets` wants it.
    """
    told = small_presets.flags(name, place)
    config = config_lib.parse(["main", *told, "--run_dir=nowhere"])
    data = sources.open_data(config)
    strategy, source = replicas.mirrored(NUM_REPLICAS), data.source
    gan = GAN(
        *(config, strategy, source.image_shape, source.num_classes), data.specs
    )
    step = Step(gan)
    iterator = pipeline.make_iterator(data, config, strategy, 0, step.num_draws)
    with counting_passes() as passes:
        traced = step._run.get_concrete_function(iterator, tf.constant(1))
    found = replicas.collectives(traced.graph, NUM_REPLICAS)
    return Counts(
        len(gan.program.phases),
        len(passes) // NUM_REPLICAS,
        sum(found.values()),
    )


@contextlib.contextmanager
def counting_passes() -> Iterator[list[BatchNorm]]:
    """Yields a list of the BatchNorms that are traced in this context."""
    passes: list[BatchNorm] = []
    batch_statistics = BatchNorm._batch_statistics

    def counted(layer: BatchNorm, values: tf.Tensor, is_alone: bool) -> object:
        passes.append(layer)
        return batch_statistics(layer, values, is_alone)

    with mock.patch.object(BatchNorm, "_batch_statistics", counted):
        yield passes


def main() -> None:
    """Counts, and prints the table."""
    is_written = "--write" in sys.argv
    names = [each for each in sys.argv[1:] if each != "--write"]
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * NUM_REPLICAS
    )
    lines = ["| preset | phases | BatchNorm passes | all-reduces |"]
    lines += ["|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        programs_test.write_data(place, SIDE)
        for name in names or presets.PRESETS:
            counts = " | ".join(map(str, count(name, place)))
            lines.append(f"| {name} | {counts} |")
            print(lines[-1], flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/results.md", "collectives", lines)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
