"""Pictures: of which latents, of which classes, in which range."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.config import Config
from dtrain.record import drawing, images

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


def test_a_grid_is_the_same_each_time() -> None:
    grids = [
        drawing.fixed_grid(
            identity(), Config(latent_size=4, seed=seed), num_classes=10
        )
        for seed in (1, 2)
    ]
    # Of other runs, too: what differs is what they have learned.
    np.testing.assert_array_equal(grids[0], grids[1])


@settings(max_examples=20, deadline=None)
@given(st.lists(SEEDS, min_size=1, max_size=20), st.booleans())
def test_a_seed_has_its_latents_and_its_place(
    seeds: list[int], truncated: bool
) -> None:
    config, starts = Config(latent_size=4), []

    def draw(latents: tf.Tensor, labels: Any, start: int) -> tf.Tensor:
        starts.append(start)
        assert labels is None
        return tf.reshape(latents, [-1, 2, 2, 1])

    truncation = 0.5 if truncated else 0.0
    made = drawing.draw_seeds(draw, config, seeds, None, truncation)
    expected = drawing.of_seeds(config, seeds, truncation).numpy()
    np.testing.assert_array_equal(
        made.reshape(-1, 4), np.clip(expected, -1.0, 1.0)
    )
    assert starts == sorted({seed // 8 * 8 for seed in seeds})


@pytest.mark.parametrize("truncation", [0.3, 1.0, 2.5])
def test_truncated_latents_are_normal_within(truncation: float) -> None:
    config = Config(latent_size=64)
    latents = drawing.of_seeds(config, range(100), truncation).numpy()
    assert np.abs(latents).max() <= truncation
    # The deviation of a truncated normal distribution, in closed form.
    within = math.erf(truncation / math.sqrt(2.0))
    density = math.exp(-(truncation**2) / 2.0) / math.sqrt(2.0 * math.pi)
    expected = math.sqrt(1.0 - 2.0 * truncation * density / within)
    assert latents.std() == pytest.approx(expected, rel=0.03)
    assert abs(latents.mean()) < 0.02 * truncation


def animation(conditional: bool, **walk: Any) -> list[np.ndarray]:
    config = Config(latent_size=4, conditional=conditional)
    return list(
        drawing.interpolation(
            identity(conditional),
            config,
            range(8),
            range(3) if conditional else (),
            drawing.Walk(**walk),
        )
    )


def test_an_animation_has_no_seam() -> None:
    frames = animation(False, num_images=2)
    assert len(frames) == 48
    changes = [
        np.abs(frame.astype(int) - after.astype(int)).mean()
        for frame, after in zip(frames, frames[1:] + frames[:1], strict=True)
    ]
    # From the last to the first as from any to the next.
    assert changes[-1] < 2.0 * np.mean(changes)
    assert min(changes) > 0.0


def test_an_animation_passes_through_the_pictures_of_the_seeds() -> None:
    frames = animation(False, num_images=2, width=1)
    seeds = drawing.draw_seeds(identity(), Config(latent_size=4), range(8))
    # Two images, each of four seeds, twelve frames from one to the next.
    for stop in range(4):
        both = np.stack([seeds[stop], seeds[4 + stop]])
        np.testing.assert_array_equal(
            frames[12 * stop], images.make_grid(both, 2, min_width=1)
        )


def test_an_animation_through_classes() -> None:
    frames = animation(True, num_frames=6, through_classes=True)
    for one, two in ((0, 1), (2, 3), (4, 5)):
        np.testing.assert_array_equal(frames[one], frames[two])
    assert len({frame.tobytes() for frame in frames}) == 3
    # And of each class, where they do not change.
    frames = animation(True, num_frames=6)
    assert len({frame.tobytes() for frame in frames}) == 1
