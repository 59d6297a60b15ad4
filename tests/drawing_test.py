"""Pictures: of which latents, of which classes, in which range."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.config import Config
from dtrain.record import drawing

SEEDS = st.integers(0, 2**31 - 1)


@settings(max_examples=30)
@given(SEEDS, st.integers(0, 70), st.integers(0, 70), st.integers(1, 65))
def test_the_first_latents_are_the_same_for_any_number(
    seed: int, few: int, more: int, latent_size: int
) -> None:
    few, more = sorted((few, more))
    config = Config(latent_size=latent_size)
    many = drawing.latents(config, seed, more).numpy()
    assert many.shape == (more, latent_size)
    np.testing.assert_array_equal(
        drawing.latents(config, seed, few), many[:few]
    )


def test_latents_are_standard_normal_and_other_for_other_seeds() -> None:
    first, second = (
        drawing.latents(Config(), seed, 1000).numpy() for seed in (0, 1)
    )
    for latents in (first, second):
        assert abs(latents.mean()) < 0.02
        assert abs(latents.std() - 1.0) < 0.02
    assert abs((first * second).mean()) < 0.02


def identity(conditional: bool = False) -> drawing.Draw:
    """Draws pictures whose pixels are the latents; labels shift them."""
    latents = keras.Input((4,))
    pixels = latents
    inputs = latents
    if conditional:
        labels = keras.Input((), dtype="int32")
        shift = keras.layers.Rescaling(0.125)(labels)
        pixels = keras.layers.Reshape((1,))(shift) + 0.0 * latents
        inputs = [latents, labels]
    model = keras.Model(inputs, keras.layers.Reshape((2, 2, 1))(pixels))

    def draw(latents: tf.Tensor, labels: Any, start: int) -> tf.Tensor:
        del start
        return model(latents if labels is None else [latents, labels])

    return draw


def test_images_are_clipped_and_many_are_drawn() -> None:
    latents = tf.random.stateless_normal([600, 4], (0, 0))
    made = drawing.draw(identity(), latents, None)
    assert made.dtype == np.float32
    expected = np.clip(latents.numpy(), -1.0, 1.0).reshape(600, 2, 2, 1)
    np.testing.assert_array_equal(made, expected)


def test_a_conditional_grid_has_a_row_for_each_class() -> None:
    config = Config(latent_size=4, conditional=True)
    grid = drawing.fixed_grid(identity(conditional=True), config, 5)
    # 5 rows and 8 columns of 2x2 pixels, one pixel apart, enlarged.
    factor = grid.shape[1] // (8 * 3 + 1)
    assert grid.shape == ((5 * 3 + 1) * factor, (8 * 3 + 1) * factor, 1)
    small = grid[::factor, ::factor, 0]
    for label in range(5):
        row = small[3 * label + 1, 1::3]
        expected = np.rint((0.125 * label + 1) * 127.5)
        assert set(row.tolist()) == {expected}


def test_a_grid_is_the_same_each_time_and_another_for_another_seed() -> None:
    grids = [
        drawing.fixed_grid(
            identity(), Config(latent_size=4, seed=seed), num_classes=10
        )
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(grids[0], grids[1])
    assert not np.array_equal(grids[0], grids[2])


@pytest.mark.parametrize("num_classes", [3, 10])
def test_class_rows(num_classes: int) -> None:
    assert drawing.class_rows(Config(), num_classes, 16) is None
    labels = drawing.class_rows(Config(conditional=True), num_classes, 100)
    assert labels.dtype == np.int32
    assert len(labels) == 100
    rows = [
        set(labels[start : start + 8].tolist()) for start in range(0, 100, 8)
    ]
    assert rows == [{row % num_classes} for row in range(13)]


def test_an_animation_has_no_seam() -> None:
    frames = list(
        drawing.interpolation(identity(), Config(latent_size=4), 10, seed=0)
    )
    assert len(frames) == 48
    changes = [
        np.abs(frame.astype(int) - after.astype(int)).mean()
        for frame, after in zip(frames, frames[1:] + frames[:1], strict=True)
    ]
    # From the last to the first as from any to the next.
    assert changes[-1] < 1.5 * np.mean(changes)
    assert min(changes) > 0.0


def test_an_animation_of_classes() -> None:
    config = Config(latent_size=4, conditional=True)
    frames = list(
        drawing.interpolation(identity(conditional=True), config, 10, seed=0)
    )
    assert len(frames) == 48
    np.testing.assert_array_equal(frames[0], frames[24])
