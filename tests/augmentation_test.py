"""What is changed before the discriminator: by whom, how much, and back."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from dtrain import config as config_lib
from dtrain import errors
from dtrain import main as dtrain_main
from dtrain.bundle import fit, tensors
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.gan import augmentation, losses
from dtrain.gan import state as gan_lib
from dtrain.gan.example import Draw, Example, Place
from dtrain.gan.step import Step
from tests import programs_test, replicas, runs


class Remembered(Example):
    """Examples that remember what was drawn of them."""

    def _next(self, draw: Draw) -> tf.Tensor:
        value = super()._next(draw)
        self.inputs.setdefault("drawn", []).append(value.numpy())  # type: ignore[attr-defined]
        return value

    @property
    def remembered(self) -> list[np.ndarray]:
        return [each.astype(np.float64) for each in self.inputs["drawn"]]


def example(number: int, seed: int = 0) -> Remembered:
    return Remembered(
        real_images=tf.zeros([number, 1, 1, 1]),
        labels=tf.zeros([number], tf.int32),
        latents=tf.zeros([number, 4]),
        uniforms=tf.zeros([number]),
        step=tf.constant(0, tf.int64),
        inputs={},
        place=Place(tf.constant([seed, 7], tf.int64), tf.constant(0, tf.int64)),
    )


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


# DiffAugment.


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (1, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_diff_augment_is_that_of_the_paper(
    size: tuple[int, int], channels: int
) -> None:
    given, some = images(50, *size, channels), example(50)
    made = augmentation.diff_augment(tf.constant(given), some).numpy()
    draws = zip(*some.remembered, strict=True)
    for image, found, (light, colour, contrast, *places) in zip(
        given.astype(np.float64), made, draws, strict=True
    ):
        expected = image + light - 0.5
        grey = expected.mean(-1, keepdims=True)
        expected = grey + (expected - grey) * 2 * colour
        mean = expected.mean()
        expected = mean + (expected - mean) * (contrast + 0.5)
        shifts = []
        for axis in (0, 1):
            most = int(size[axis] / 8 + 0.5)
            shifts.append(int(places[axis] * (2 * most + 1)) - most)
        moved = np.zeros_like(expected)
        for row in range(size[0]):
            for column in range(size[1]):
                at = row + shifts[0], column + shifts[1]
                if 0 <= at[0] < size[0] and 0 <= at[1] < size[1]:
                    moved[row, column] = expected[at]
        cuts = []
        for axis in (0, 1):
            cut = int(size[axis] / 2 + 0.5)
            middle = int(places[2 + axis] * (size[axis] + 1 - cut % 2))
            first = middle - cut // 2
            cuts.append(slice(max(first, 0), max(first + cut, 0)))
        moved[cuts[0], cuts[1]] = 0
        np.testing.assert_allclose(found, moved, atol=1e-5)


def test_diff_augment_cuts_shifts_and_colours_all() -> None:
    given = np.ones([2000, 8, 8, 1], np.float32)
    made = augmentation.diff_augment(tf.constant(given), example(2000)).numpy()
    # A quarter is cut at the middle, and less at the edges.
    share = (made == 0).mean()
    assert 0.15 < share < 0.4
    assert (made == 0).any((1, 2, 3)).mean() > 0.99
    assert made.max() == pytest.approx(1.5, abs=0.01)


# ada.


@pytest.mark.parametrize("shape", [(8, 8), (5, 9)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_ada_without_a_chance_changes_nothing(
    shape: tuple[int, int], channels: int
) -> None:
    given = images(9, *shape, channels)
    made = augmentation.ada(tf.constant(given), example(9), 0.0)
    np.testing.assert_allclose(made, given, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (1, 6)])
def test_resampling_is_bilinear_and_mirrors(shape: tuple[int, int]) -> None:
    given = images(20, *shape, 2)
    chance = np.random.default_rng(0)
    matrices = np.tile(np.eye(3, dtype=np.float32), (20, 1, 1))
    matrices[:, :2, :2] += chance.normal(0, 0.7, (20, 2, 2))
    matrices[:, :2, 2] = chance.normal(0, 4, (20, 2))
    made = augmentation.resampled(tf.constant(given), tf.constant(matrices))
    middle = (np.array(shape) - 1) / 2
    rows, columns = np.indices(shape)
    for image, matrix, found in zip(given, matrices, made, strict=True):
        places = np.stack(
            [columns - middle[1], rows - middle[0], np.ones(shape)]
        )
        x, y = np.einsum("ij,jhw->ihw", matrix[:2].astype(float), places)
        for channel in range(2):
            expected = ndimage.map_coordinates(
                image[..., channel],
                [y + middle[0], x + middle[1]],
                order=1,
                mode="mirror",
            )
            np.testing.assert_allclose(found[..., channel], expected, atol=2e-4)


def test_geometry_is_that_of_the_paper() -> None:
    some = example(40)
    made = augmentation._geometry((40, 8, 6, 1), some, 1.0).numpy()
    for found, *drawn in zip(made, *some.remembered, strict=True):
        flip, _, quarter, _, whole, _, scale, _, before, _ = drawn[:10]
        aspect, _, after, _, part, _ = drawn[10:]
        sides = np.array([6, 8])

        def turn(angle: float) -> np.ndarray:
            cosine, sine = np.cos(angle), np.sin(angle)
            return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])

        def shift(by: np.ndarray) -> np.ndarray:
            return np.array([[1, 0, by[0]], [0, 1, by[1]], [0, 0, 1]])

        expected = (
            np.diag([np.sign(flip - 0.5), 1, 1])
            @ turn(np.floor(4 * quarter) * np.pi / 2)
            @ shift(np.round((2 * whole - 1) * sides / 8))
            @ np.diag([2 ** (0.2 * scale), 2 ** (0.2 * scale), 1])
            @ turn(np.pi * (2 * before - 1))
            @ np.diag([2 ** (0.2 * aspect), 2 ** (-0.2 * aspect), 1])
            @ turn(np.pi * (2 * after - 1))
            @ shift(part * sides / 8)
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_colours_are_those_of_the_paper() -> None:
    some = example(40)
    made = augmentation._colours(some, 1.0).numpy()
    grey = np.append(np.ones(3) / np.sqrt(3), 0)
    along, eye = np.outer(grey, grey), np.eye(4)
    for found, *drawn in zip(made, *some.remembered, strict=True):
        brightness, contrast, flip, hue, saturation = drawn[::2]
        angle = np.pi * (2 * hue - 1)
        light = eye.copy()
        light[:3, 3] = 0.2 * brightness
        factor = 2 ** (0.5 * contrast)
        mirror = eye - 2 * along * np.floor(2 * flip)
        # Rodrigues' formula.
        x, y, z = grey[:3]
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        turn = eye.copy()
        turn[:3, :3] = (
            np.eye(3)
            + np.sin(angle) * cross
            + (1 - np.cos(angle)) * cross @ cross
        )
        last = np.diag([0, 0, 0, 1])
        vivid = along + (eye - along - last) * 2.0**saturation + last
        expected = vivid @ turn @ mirror @ np.diag([factor] * 3 + [1]) @ light
        np.testing.assert_allclose(found, expected[:3], atol=1e-5)


@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_ada_makes_each_change_with_its_chance(chance: float) -> None:
    made = augmentation._geometry((4000, 8, 8, 1), example(4000), chance)
    # Half of the flips are none.
    flipped = (np.linalg.det(made) < 0).mean()
    assert flipped == pytest.approx(chance / 2, abs=0.03)
    colours = augmentation._colours(example(4000), chance).numpy()
    is_lit = np.abs(colours[:, :, 3]).max(1) > 1e-6
    assert is_lit.mean() == pytest.approx(chance, abs=0.03)


def test_the_probability_follows_the_signs() -> None:
    config = Config(augment="ada", augment_ramp_images=1000)

    def moved(probability: float, signs: float) -> float:
        state = {"augment_probability": tf.constant(probability)}
        means = {"real_signs": tf.constant(signs)}
        return float(
            augmentation.steered(config, 20, state, means)[
                "augment_probability"
            ]
        )

    assert moved(0.5, 0.7) == pytest.approx(0.52)
    assert moved(0.5, 0.5) == pytest.approx(0.48)
    assert moved(0.0, 0.5) == 0.0
    assert moved(0.99, 0.7) == 1.0


# Both.

CHANGES = {
    "diff": augmentation.diff_augment,
    "ada": lambda images, example: augmentation.ada(images, example, 0.8),
}


@pytest.mark.parametrize("name", CHANGES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    given = images(3, 6, 6, 3)
    weights = images(3, 6, 6, 3)[::-1]

    def loss(values: Any) -> tf.Tensor:
        return tf.reduce_sum(
            CHANGES[name](tf.convert_to_tensor(values), example(3)) * weights
        )

    variable = tf.Variable(given)
    with tf.GradientTape() as tape:
        value = loss(variable)
    gradient = tape.gradient(value, variable).numpy()
    chance = np.random.default_rng(2)
    for _ in range(20):
        at = tuple(int(chance.integers(0, size)) for size in given.shape)
        step = np.zeros_like(given)
        step[at] = 0.5
        # Linear in the images: any step is a small one.
        away = float(loss(given + step)) - float(loss(given - step))
        assert gradient[at] == pytest.approx(away, abs=2e-4)


@pytest.mark.parametrize("name", CHANGES)
def test_a_penalty_trains_through_it(name: str) -> None:
    kernel = tf.Variable(images(36, 1) * 0.2)

    def penalty() -> tf.Tensor:
        def critic(values: tf.Tensor) -> tf.Tensor:
            changed = CHANGES[name](values, example(4))
            return tf.nn.tanh(tf.reshape(changed, [4, 36]) @ kernel)

        real = tf.constant(images(4, 6, 6, 1))
        return tf.reduce_sum(losses.squared_gradient(critic, real)[1])

    with tf.GradientTape() as tape:
        value = penalty()
    gradient = tape.gradient(value, kernel).numpy()
    for at in (0, 17, 35):
        values = kernel.numpy()
        found = []
        for away in (0.01, -0.01):
            changed = values.copy()
            changed[at] += away
            kernel.assign(changed)
            found.append(float(penalty()))
        kernel.assign(values)
        assert gradient[at, 0] == pytest.approx(
            (found[0] - found[1]) / 0.02, rel=0.02, abs=1e-3
        )


def told(name: str, *more: str) -> list[str]:
    fast = "--augment_target=-0.9", "--augment_ramp_images=100"
    return ["main", *runs.SMALL, f"--augment={name}", *fast, *more]


@pytest.mark.parametrize("name", CHANGES)
def test_any_part_of_a_batch_is_changed_alike(name: str) -> None:
    given = images(8, 6, 6, 3)
    whole = CHANGES[name](tf.constant(given), example(8)).numpy()
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        some = example(stop - start)
        place = some.place._replace(start=tf.constant(start, tf.int64))
        part = tf.constant(given[start:stop])
        made = CHANGES[name](part, some.replace(place=place)).numpy()
        # A cosine of fewer numbers at once has another last bit.
        np.testing.assert_allclose(made, whole[start:stop], atol=1e-5)


def state_after(num_replicas: int) -> dict[str, bytes]:
    ordered = "--reduction=ordered", "--micro_batches=2"
    settings = config_lib.parse(told("ada", *ordered, "--run_dir=nowhere"))
    data = sources.open_data(settings)
    strategy, source = replicas.mirrored(num_replicas), data.source
    gan = gan_lib.GAN(
        settings, strategy, source.image_shape, source.num_classes
    )
    step = Step(gan)
    iterator = pipeline.make_iterator(
        data, settings, strategy, 0, step.num_draws
    )
    step.run(iterator, tf.constant(3))
    live = fit.of_objects(gan.checkpoint).tensors
    return {key: live[key].read().tobytes() for key in live}


# Which takes 20 s to trace.
if programs_test.IS_LONG:

    @pytest.mark.usefixtures("sums_as_written")
    def test_ordered_sums_have_the_same_bits_on_any_replicas() -> None:
        assert state_after(1) == state_after(2)


def test_a_run_goes_on_with_its_probability(tmp_path: pathlib.Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run_dir, num_steps in ((whole, 8), (cut, 3), (cut, 8)):
        code = dtrain_main.run(
            told("ada", f"--run_dir={run_dir}", f"--num_steps={num_steps}")
        )
        assert code == errors.FINISHED
    one, other = (
        tensors.digest(f"{run_dir}/checkpoints/ckpt-8")
        for run_dir in (whole, cut)
    )
    assert one == other
    probabilities = [
        line["augment_probability"] for line in runs.metrics(whole)
    ]
    assert probabilities[-1] > probabilities[0] >= 0.0
    assert probabilities == [
        line["augment_probability"] for line in runs.metrics(cut)
    ]
