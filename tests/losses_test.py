from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from dtrain import config
from dtrain.gan import losses

# softplus(a) = log(1 + e^a), worked out by hand to seven digits:
SOFTPLUS_0 = 0.6931472  # log 2
SOFTPLUS_1 = 1.3132617  # log(1 + e)
SOFTPLUS_MINUS_1 = 0.3132617  # softplus(1) - 1
SOFTPLUS_2 = 2.1269280
SOFTPLUS_MINUS_2 = 0.1269280
SOFTPLUS_3 = 3.0485874
SOFTPLUS_MINUS_3 = 0.0485874

# Three examples: sure and right, undecided, wrong.
REAL = [2.0, 0.0, -1.0]
FAKE = [-1.0, 0.0, 2.0]

# name: (losses of the discriminator, losses of the generator)
BY_HAND = {
    # D: softplus(-real) + softplus(fake); G: softplus(-fake)
    "non_saturating": (
        [
            SOFTPLUS_MINUS_2 + SOFTPLUS_MINUS_1,
            2 * SOFTPLUS_0,
            SOFTPLUS_1 + SOFTPLUS_2,
        ],
        [SOFTPLUS_1, SOFTPLUS_0, SOFTPLUS_MINUS_2],
    ),
    # D: max(0, 1 - real) + max(0, 1 + fake); G: -fake
    # (0 + 0), (1 + 1), (2 + 3)
    "hinge": ([0.0, 2.0, 5.0], [1.0, 0.0, -2.0]),
    # D: fake - real; G: -fake
    "wgan_gp": ([-3.0, 0.0, 3.0], [1.0, 0.0, -2.0]),
    # D: ((real - 1)^2 + fake^2) / 2: (1 + 1) / 2, (1 + 0) / 2, (4 + 4) / 2
    # G: (fake - 1)^2 / 2: 4 / 2, 1 / 2, 1 / 2
    "least_squares": ([1.0, 0.5, 4.0], [2.0, 0.5, 0.5]),
    # D: softplus(fake - real); G: softplus(real - fake); differences -3, 0, 3
    "relativistic": (
        [SOFTPLUS_MINUS_3, SOFTPLUS_0, SOFTPLUS_3],
        [SOFTPLUS_3, SOFTPLUS_0, SOFTPLUS_MINUS_3],
    ),
}


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_loss_has_the_value_worked_out_by_hand(name: str) -> None:
    loss = losses.LOSSES[name]
    for_discriminator, for_generator = BY_HAND[name]
    real, fake = tf.constant(REAL), tf.constant(FAKE)
    discriminator_loss = loss.discriminator(real, fake)
    generator_loss = loss.generator(real, fake)
    assert discriminator_loss.dtype == generator_loss.dtype == tf.float32
    np.testing.assert_allclose(discriminator_loss, for_discriminator, 2e-6)
    np.testing.assert_allclose(generator_loss, for_generator, 2e-6)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_only_a_loss_that_says_so_looks_at_reals(name: str) -> None:
    loss = losses.LOSSES[name]
    real, fake = tf.constant(REAL), tf.constant(FAKE)
    with tf.GradientTape() as tape:
        tape.watch(real)
        value = loss.generator(real, fake)
    looked_at = tape.gradient(value, real) is not None
    assert looked_at == loss.uses_real_in_generator
    if not looked_at:
        np.testing.assert_array_equal(loss.generator(None, fake), value)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_loss_is_finite_where_the_discriminator_is_sure(name: str) -> None:
    loss = losses.LOSSES[name]
    logits = tf.constant([1e4, -1e4])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        total = loss.discriminator(logits, -logits) + loss.generator(
            logits, -logits
        )
    assert np.isfinite(total).all()
    assert np.isfinite(tape.gradient(total, logits)).all()


def test_every_loss_is_a_choice_of_the_flag() -> None:
    for name in losses.LOSSES:
        assert config.Config(loss=name).loss == name
    assert sorted(BY_HAND) == sorted(losses.LOSSES)


# Penalties, against critics whose gradients are known.

WEIGHTS = np.array([[3.0, -4.0], [0.0, 12.0]], np.float32)


def _linear(images: tf.Tensor) -> tf.Tensor:
    """w . x, whose gradient is w: |w|^2 = 9 + 16 + 144 = 169 = 13^2."""
    return tf.reduce_sum(images[..., 0] * WEIGHTS, [1, 2])


def _images(seed: int = 0) -> tf.Tensor:
    generator = np.random.default_rng(seed)
    return tf.constant(generator.normal(size=(5, 2, 2, 1)), tf.float32)


def _zero_centered(critic: losses.Critic, images: tf.Tensor) -> tf.Tensor:
    """That of R1 and R2."""
    return losses.squared_gradient(critic, images)[1]


def test_penalties_of_a_linear_critic() -> None:
    logits, squared = losses.squared_gradient(_linear, _images())
    np.testing.assert_allclose(logits, _linear(_images()))
    np.testing.assert_allclose(squared, [169.0] * 5)
    np.testing.assert_allclose(
        losses.one_centered_penalty(_linear, _images()), [144.0] * 5, 1e-6
    )


def test_penalties_of_a_quadratic_critic() -> None:
    # |x|^2 / 2 has the gradient x.
    images = _images()
    norm = np.linalg.norm(np.reshape(images, [5, 4]), axis=1)

    def critic(x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(x**2, [1, 2, 3])[:, None] / 2

    np.testing.assert_allclose(_zero_centered(critic, images), norm**2, 1e-5)
    np.testing.assert_allclose(
        losses.one_centered_penalty(critic, images), (norm - 1) ** 2, 1e-4
    )


def test_penalties_train_the_critic() -> None:
    # For scale * (w . x): |grad|^2 = 169 scale^2, its derivative 338 scale;
    # (13 scale - 1)^2 has the derivative 26 (13 scale - 1).
    scale = tf.Variable(0.5)
    for penalty, derivative in (
        (_zero_centered, 338 * 0.5),
        (losses.one_centered_penalty, 26 * (13 * 0.5 - 1)),
    ):
        with tf.GradientTape() as tape:
            value = penalty(lambda x: scale * _linear(x), _images())
            mean = tf.reduce_mean(value)
        np.testing.assert_allclose(tape.gradient(mean, scale), derivative, 1e-5)


def test_penalties_of_a_flat_critic_are_finite() -> None:
    scale = tf.Variable(0.0)
    with tf.GradientTape(persistent=True) as tape:
        zero = _zero_centered(lambda x: scale * _linear(x), _images())
        one = losses.one_centered_penalty(
            lambda x: scale * _linear(x), _images()
        )
    np.testing.assert_allclose(zero, [0.0] * 5)
    np.testing.assert_allclose(one, [1.0] * 5, 1e-5)
    assert np.isfinite(tape.gradient(zero, scale))
    assert np.isfinite(tape.gradient(one, scale))


def test_penalty_of_a_constant_critic_is_zero() -> None:
    penalty = _zero_centered(lambda x: tf.zeros(len(x)), _images())
    np.testing.assert_array_equal(penalty, [0.0] * 5)


def test_penalty_is_float32_for_a_half_precision_critic() -> None:
    # 40^2 * 100 pixels = 160,000 is beyond the 65,504 of float16.
    def critic(x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(x, tf.float16) * 40, [1, 2, 3])

    images = tf.zeros([2, 10, 10, 1], tf.float16)
    penalty = _zero_centered(critic, images)
    assert penalty.dtype == tf.float32
    np.testing.assert_allclose(penalty, [160_000.0] * 2)


# Two examples, a PatchGAN's four logits each: log(1 + e^a) by hand above.
PATCHES = [[2.0, -1.0, 0.0, 1.0], [3.0, -3.0, 0.0, -2.0]]


@pytest.mark.parametrize("shape", [[2, 4], [2, 2, 2], [2, 2, 2, 1]])
def test_errors_of_patches_are_a_mean_for_each_example(
    shape: list[int],
) -> None:
    logits = tf.reshape(tf.constant(PATCHES), shape)
    np.testing.assert_allclose(
        losses.cross_entropy(logits, 1.0),
        [
            (SOFTPLUS_MINUS_2 + SOFTPLUS_1 + SOFTPLUS_0 + SOFTPLUS_MINUS_1) / 4,
            (SOFTPLUS_MINUS_3 + SOFTPLUS_3 + SOFTPLUS_0 + SOFTPLUS_2) / 4,
        ],
        2e-6,
    )
    # (1 + 4 + 1 + 0) / 4 and (4 + 16 + 1 + 9) / 4; (1 + 2 + 1 + 0) / 4 ...
    np.testing.assert_allclose(losses.squared_error(logits, 1.0), [1.5, 7.5])
    np.testing.assert_allclose(losses.absolute_error(logits, 1.0), [1.0, 2.5])
    np.testing.assert_allclose(losses.squared_error(logits, logits), [0, 0])
    np.testing.assert_allclose(losses.per_example(logits), [0.5, -0.5])


@pytest.mark.parametrize("shape", [[2], [2, 1], [2, 1, 1, 1]])
def test_a_target_of_each_example_stands_beside_its_own_logits(
    shape: list[int],
) -> None:
    logits = tf.reshape(tf.constant([2.0, -1.0]), shape)
    targets = tf.constant([1.0, 0.25])
    np.testing.assert_allclose(
        losses.cross_entropy(logits, targets),
        # -log sigma(2), and (1 - t) softplus(-1) + t softplus(1)
        [SOFTPLUS_MINUS_2, 0.75 * SOFTPLUS_MINUS_1 + 0.25 * SOFTPLUS_1],
        2e-6,
    )
    np.testing.assert_allclose(
        losses.squared_error(logits, targets), [1.0, 1.5625]
    )
    np.testing.assert_allclose(
        losses.absolute_error(logits, targets), [1.0, 1.25]
    )


def test_errors_of_sixteen_bits_are_computed_in_thirty_two() -> None:
    values = tf.constant([[300.0, 300.0]], tf.float16)
    # 300 ** 2 is none of float16.
    error = losses.squared_error(values, 0.0)
    assert error.dtype == tf.float32
    np.testing.assert_allclose(error, [90000.0])
