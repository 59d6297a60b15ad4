"""What a run does every N steps, and what becomes of its figures."""

from __future__ import annotations

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain import errors
from dtrain import main as dtrain_main
from dtrain.config import Config
from dtrain.record.rates import LearningRates
from dtrain.record.spread import SampleSpread
from tests import runs


@pytest.mark.parametrize(
    ("every_steps", "due"),
    [(0, set()), (3, {3, 6, 9}), (5, {5, 10}), (20, set())],
)
def test_when_it_is_due(
    every_steps: int, due: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = SampleSpread(
        Config(sample_every_steps=every_steps), 0, keras.Model(), is_chief=False
    )
    steps = range(1, 11)
    assert {step for step in steps if spread.is_due(step, 10)} == due
    monkeypatch.setattr(SampleSpread, "at_end", True)
    assert {step for step in steps if spread.is_due(step, 10)} == due | {10}
    assert spread.run(10) == {}, "the chief measures"


def constant_or_not(scale: float) -> keras.Model:
    """A generator whose pixels are its latents, times a number."""
    latents = keras.Input((4,))
    pixels = keras.layers.Rescaling(scale)(latents)
    return keras.Model(latents, keras.layers.Reshape((2, 2, 1))(pixels))


def test_spread_of_one_picture_is_none() -> None:
    config = Config(latent_size=4)

    def measured(scale: float) -> float:
        spread = SampleSpread(config, 0, constant_or_not(scale), is_chief=True)
        return spread.run(1)["sample_spread"]

    assert measured(0.0) == 0.0
    # Standard normal latents, of which few are cut at 1.
    assert measured(0.25) == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry_run"])
def test_a_best_of_what_is_never_measured_is_refused(
    tmp_path: pathlib.Path, more: list[str]
) -> None:
    flags = "--keep_best=1", "--best_metric=frechet_distanse", *more
    with pytest.raises(errors.UserError) as caught:
        dtrain_main.run(
            ["main", *runs.SMALL, *flags, f"--run_dir={tmp_path}/run"]
        )
    line = str(caught.value)
    assert "best_metric (frechet_distanse) is no metric of this run" in line
    assert "frechet_distance" in line
    assert "generator_learning_rate" in line
    assert "sample_spread" in line


def test_figures_stand_in_their_line_and_choose_the_best(
    tmp_path: pathlib.Path,
) -> None:
    code, output = runs.run(
        "dtrain.main",
        *runs.SMALL,
        "--num_steps=8",
        "--sample_every_steps=2",
        "--checkpoint_every_steps=2",
        "--max_to_keep=1",
        "--max_rollbacks=0",
        "--keep_best=1",
        "--best_metric=sample_spread",
        "--best_mode=max",
        "--warmup_steps=7",
        "--generator_learning_rate=0.007",
        f"--run_dir={tmp_path}",
    )
    assert code == errors.FINISHED, output
    lines = runs.metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    spreads = {
        line["step"]: line["sample_spread"]
        for line in lines
        if "sample_spread" in line
    }
    assert set(spreads) == {2, 4, 6, 8}
    assert np.isfinite(list(spreads.values())).all()
    rates = {
        line["step"]: line["generator_learning_rate"]
        for line in lines
        if "generator_learning_rate" in line
    }
    # Those that the steps had: they rise in seven of eight.
    assert rates == pytest.approx({2: 0.002, 4: 0.004, 6: 0.006, 8: 0.007})
    assert "discriminator_learning_rate" in lines[-1]
    [events] = tmp_path.glob("events/*")
    shown = [
        value
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
    ]
    assert {value.tag for value in shown} == {
        *("losses/discriminator_loss", "losses/generator_loss"),
        *("gradients/discriminator_gradient_norm", "penalties/r1_penalty"),
        *("gradients/generator_gradient_norm", "metrics/real_logits"),
        *("metrics/fake_logits", "figures/sample_spread", "samples"),
        *("learning_rates/generator_learning_rate", "speed/images_per_sec"),
        "learning_rates/discriminator_learning_rate",
        "_hparams_/session_start_info",
    }
    best = max(spreads, key=lambda step: spreads[step])
    kept = {path.stem for path in tmp_path.glob("checkpoints/ckpt-*.index")}
    assert kept == {f"ckpt-{best}", "ckpt-8"}


def test_learning_rates_of_ones_own_optimizers() -> None:
    """By a schedule, which is asked for the step that comes next."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    own = {
        "encoder": keras.optimizers.SGD(0.25),
        "decoder": keras.optimizers.Adam(schedule),
    }
    rates = LearningRates(Config(sample_every_steps=3), own, is_chief=True)
    assert rates.run(3) == {
        "encoder_learning_rate": 0.25,
        "decoder_learning_rate": 0.5,
    }
    assert rates.is_due(6, 10)
    other = LearningRates(Config(), own, is_chief=False)
    assert other.run(3) == {}, "the chief reads"
