"""Presets as they train: killed, in parts of a batch, on replicas.

`make chaos` runs it; CI has one preset, for a step of some takes a minute to
trace on two cores.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.config import presets
from dtrain.data import pipeline, sources
from dtrain.gan.state import GAN
from dtrain.gan.step import Step
from tests import programs_test, replicas, small_presets
from tests.benchmarks import collectives
from tests.benchmarks import presets as benchmark

IS_LONG = bool(os.environ.get("DTRAIN_ALL_PROGRAMS"))
SIDE = 64 if IS_LONG else 16
NUM_STEPS = 200
NAMES = list(presets.PRESETS) if IS_LONG else ["pix2pix"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("data")
    programs_test.write_data(place, SIDE)
    return place


def _made(config: config_lib.Config, data: sources.Data) -> GAN:
    """Builds a preset on one device."""
    source = data.source
    shape, num_classes = source.image_shape, source.num_classes
    return GAN(config, replicas.mirrored(1), shape, num_classes, data.specs)


@pytest.mark.parametrize("name", NAMES)
def test_what_replicas_send_each_other(name: str, place: pathlib.Path) -> None:
    """One packed sum a phase, and one a pass of a norm and of its gradient."""
    counts = collectives.count(name, place)
    assert counts.collectives >= counts.phases + counts.passes
    assert counts.collectives <= counts.phases + 2 * counts.passes


@pytest.mark.parametrize("name", NAMES if IS_LONG else ["cyclegan"])
def test_a_benchmark_has_all_that_a_preset_wants(
    name: str, place: pathlib.Path
) -> None:
    """As a second set of images, without which it is refused."""
    told = [*small_presets.flags(name, place), "--run_dir=nowhere"]
    config = config_lib.parse(["main", *told])
    data = sources.open_data(config)
    trained = sum(
        weight.shape.num_elements()
        for network in _made(config, data).program.networks.values()
        for weight in network.trainable_weights
    )
    assert sum(benchmark.num_weights(config, data)) == trained > 0


def _losses(
    name: str, place: pathlib.Path, micro_batches: int
) -> dict[str, np.ndarray]:
    """Trains some steps on one device; returns the losses of each."""
    told = small_presets.flags(name, place)
    config = config_lib.parse(
        ["main", *told, f"--micro_batches={micro_batches}", "--run_dir=nowhere"]
    )
    data = sources.open_data(config)
    gan = _made(config, data)
    step = Step(gan)
    iterator = pipeline.make_iterator(
        data, config, gan.strategy, 0, step.num_draws
    )
    metrics, _ = step.run(iterator, tf.constant(3))
    return {
        metric: column.numpy()
        for metric, column in metrics.items()
        if metric.endswith("loss")
    }


# In CI, `programs_test` kills one program.
if IS_LONG:

    @pytest.mark.parametrize(
        "name", [name for name in NAMES if name not in small_presets.NORMED]
    )
    def test_parts_of_a_batch_are_the_batch(
        name: str, place: pathlib.Path
    ) -> None:
        one, four = (_losses(name, place, parts) for parts in (1, 4))
        assert one.keys() == four.keys()
        for metric, values in one.items():
            np.testing.assert_allclose(
                four[metric], values, rtol=1e-3, atol=1e-3, err_msg=metric
            )

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("strategy", ["mirrored", "multi_worker"])
    def test_a_killed_run_ends_with_the_same_bits(
        name: str, strategy: str, place: pathlib.Path, tmp_path: pathlib.Path
    ) -> None:
        told = [
            *small_presets.flags(name, place),
            *("--steps_per_loop=1", f"--num_steps={NUM_STEPS}"),
            *("--checkpoint_every_steps=0", "--backup_every_secs=0.001"),
            "--sample_every_steps=0",
        ]
        programs_test.end_with_the_same_bits(strategy, told, tmp_path)
