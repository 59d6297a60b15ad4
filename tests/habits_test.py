"""What a model does beside its state and its example: refused, or right."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import pytest
import tensorflow as tf

from dtrain import errors
from dtrain.bundle import fit
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.errors import UserError
from dtrain.gan import state as gan_lib
from dtrain.gan.step import Step
from tests import habits, replicas, runs

CONFIG = Config(batch_size=8, latent_size=4, ema_half_life_images=1.0)


def begin(name: str, num_replicas: int = 1) -> tuple[gan_lib.GAN, Step, Any]:
    """Makes the state of a model, its step, and the data."""
    config = dataclasses.replace(
        CONFIG,
        model=f"tests.habits:{name}",
        batch_size=8 * num_replicas,
        strategy="mirrored" if num_replicas > 1 else "default",
    )
    strategy = tf.distribute.get_strategy()
    if num_replicas > 1:
        strategy = replicas.mirrored(num_replicas)
    source = sources.open_source(config)
    gan = gan_lib.GAN(config, strategy, source.image_shape, 0)
    steps = Step(gan)

    def data_from(number: int) -> Any:
        return pipeline.make_iterator(
            sources.Data(source), config, strategy, number, steps.num_draws
        )

    return gan, steps, data_from


def step(name: str, num_replicas: int = 1) -> None:
    """Does a step of a model, on so many replicas."""
    _, steps, data_from = begin(name, num_replicas)
    steps.run(data_from(0), tf.constant(1))


@pytest.mark.parametrize("name", habits.REFUSED)
def test_what_no_resumed_run_would_repeat_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=habits.REFUSED[name]) as caught:
        step(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["noise", "counting", "mean"])
def test_also_on_several_replicas(name: str) -> None:
    with pytest.raises(UserError, match=habits.REFUSED[name]):
        step(name, 2)


def test_replicas_that_differ_are_told_after_the_first_step(
    tmp_path: pathlib.Path,
) -> None:
    code, output = runs.run(
        *("dtrain.main", *runs.SMALL, f"--run_dir={tmp_path}/run"),
        *("--strategy=mirrored", "--num_devices=2", "--num_steps=50"),
        *("--model=tests.habits:own_mean", "--backup_every_secs=0"),
    )
    assert code == errors.USER_ERROR, output
    [line] = re.findall(r"error: .*", output)
    assert "after step 1 the replicas differ in 2 variables" in line
    assert "own_mean/mean: a variable that a model assigns" in line
    assert "Traceback" not in output


@pytest.mark.parametrize("name", habits.RIGHT)
def test_what_is_right_goes_on_to_the_same_bits(
    name: str, tmp_path: pathlib.Path
) -> None:
    # What a network keeps for itself is where replicas could differ.
    num_replicas = 2 if name in habits.WITH_STATE else 1
    gan, steps, data_from = begin(name, num_replicas)
    data = data_from(0)
    steps.run(data, tf.constant(3))
    gan.checkpoint.write(f"{tmp_path}/ckpt")
    steps.run(data, tf.constant(3))
    after = fingerprint(gan)
    gan, steps, data_from = begin(name, num_replicas)
    gan.checkpoint.read(f"{tmp_path}/ckpt").expect_partial()
    steps.run(data_from(3), tf.constant(3))
    assert fingerprint(gan) == after


def fingerprint(gan: gan_lib.GAN) -> dict[str, bytes]:
    # By their keys, for Keras numbers the layers of a process.
    live = fit.of_objects(gan.checkpoint).tensors
    return {
        key: live[key].read().tobytes()
        for key in live
        if not key.startswith("save_counter")
    }
