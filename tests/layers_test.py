"""Layers and penalties that come with dtrain, beside NumPy.

Forward passes to 1e-5, and gradients beside finite differences.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain.models import (
    attention,
    batch_norm,
    equalized,
    minibatch_deviation,
    modulated,
    resampling,
    spectral_norm,
)
from dtrain.recipes import biggan_small
from tests.finite_differences import check_gradient


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape).astype(np.float32)


def convolved(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves with zeros around the images, whose size stays."""
    size = kernel.shape[0]
    before = (size - 1) // 2
    edges = (before, size - 1 - before)
    padded = np.pad(images, ((0, 0), edges, edges, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (size, size), axis=(1, 2)
    )
    return np.einsum("bhwcij,ijcf->bhwf", windows, kernel)


def largest_singular_value(kernel: np.ndarray) -> float:
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return np.linalg.svd(matrix, compute_uv=False)[0]


def converge(layer: spectral_norm.SpectralNorm) -> None:
    for _ in range(300):
        layer.iterate()


@pytest.mark.parametrize(
    ("make_layer", "inputs", "expected"),
    [
        (
            lambda: spectral_norm.SpectralConv2D(4, 3),
            numbers(2, 5, 5, 3),
            convolved,
        ),
        (
            lambda: spectral_norm.SpectralDense(4),
            numbers(2, 6),
            lambda inputs, kernel: inputs @ kernel,
        ),
        (
            lambda: spectral_norm.SpectralEmbedding(5, 3),
            np.array([4, 0, 4], np.int32),
            lambda labels, kernel: kernel[labels],
        ),
    ],
    ids=["convolution", "dense", "embedding"],
)
def test_spectral_norm_is_the_largest_singular_value(
    make_layer: Any, inputs: np.ndarray, expected: Any
) -> None:
    layer = make_layer()
    layer(inputs)
    kernel = 3.0 * numbers(*layer.kernel.shape, seed=1)
    layer.kernel.assign(kernel)
    converge(layer)
    normalized = kernel / largest_singular_value(kernel)
    made = layer(inputs, training=True)
    np.testing.assert_allclose(made, expected(inputs, normalized), atol=1e-5)
    # A pass changes nothing, neither the kernel nor the vector.
    np.testing.assert_array_equal(layer.kernel.numpy(), kernel)
    np.testing.assert_array_equal(layer(inputs, training=True), made)
    again = type(layer).from_config(layer.get_config())
    again(inputs)
    assert [each.shape for each in again.weights] == [
        each.shape for each in layer.weights
    ]


def test_one_round_is_that_of_algorithm_1() -> None:
    layer = spectral_norm.SpectralDense(4)
    layer(numbers(2, 6))
    kernel, vector = layer.kernel.numpy(), layer.vector.numpy()
    left = kernel @ vector / np.linalg.norm(kernel @ vector)
    right = left @ kernel / np.linalg.norm(left @ kernel)
    np.testing.assert_allclose(
        layer.normalized_kernel(), kernel / (left @ kernel @ right), atol=1e-5
    )
    layer.iterate()
    np.testing.assert_allclose(layer.vector.numpy(), right, atol=1e-5)


def test_spectral_norm_is_differentiated() -> None:
    layer = spectral_norm.SpectralDense(4)
    layer(numbers(2, 6))
    # Where the vectors, which are constants to it, do not move at first order.
    converge(layer)
    factors = numbers(6, 4)
    check_gradient(
        lambda: tf.reduce_sum(factors * layer.normalized_kernel()),
        layer.kernel.value,
    )


def test_conditional_norm_has_a_gain_of_one_and_more() -> None:
    features, gains, biases = (
        tf.Variable(numbers(*shape, seed=seed))
        for seed, shape in enumerate([(4, 3, 3, 2), (4, 2), (4, 2)])
    )
    layer = batch_norm.ConditionalBatchNorm(epsilon=1e-3)
    made = layer([features, gains, biases], training=True)
    mean, variance = (
        features.numpy().mean((0, 1, 2)),
        features.numpy().var((0, 1, 2)),
    )
    normalized = (features.numpy() - mean) / np.sqrt(variance + 1e-3)
    gain, bias = (each.numpy()[:, None, None, :] for each in (gains, biases))
    np.testing.assert_allclose(made, (1 + gain) * normalized + bias, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, 0.1 * mean, atol=1e-6)
    cube = numbers(4, 3, 3, 2, seed=3)
    for at in (features, gains, biases):
        check_gradient(
            lambda: (
                tf.reduce_sum(
                    cube * layer([features, gains, biases], training=True) ** 3
                )
                / 100.0
            ),
            at,
        )


def test_attention_is_that_of_its_equations() -> None:
    layer = attention.SelfAttention()
    features = tf.Variable(numbers(2, 4, 4, 8))
    np.testing.assert_array_equal(layer(features), features)
    layer.gamma.assign(0.5)
    theta, phi, g, o = (
        np.reshape(part.normalized_kernel(), part.kernel.shape[2:])
        for part in (layer.theta, layer.phi, layer.g, layer.o)
    )
    flat = features.numpy().reshape(2, 16, 8)

    def pooled(values: np.ndarray) -> np.ndarray:
        channels = values.shape[-1]
        return (
            values.reshape(2, 2, 2, 2, 2, channels)
            .max((2, 4))
            .reshape(2, 4, channels)
        )

    fits = np.exp(flat @ theta @ pooled(flat @ phi).transpose(0, 2, 1))
    shares = fits / fits.sum(-1, keepdims=True)
    expected = flat + 0.5 * (shares @ pooled(flat @ g)) @ o
    made = layer(features)
    np.testing.assert_allclose(
        made, expected.reshape(made.shape), rtol=1e-5, atol=1e-5
    )
    cube = numbers(2, 4, 4, 8, seed=1)
    check_gradient(
        lambda: tf.reduce_sum(cube * layer(features) ** 3) / 100.0, features
    )


def test_orthogonality_is_that_of_equation_3() -> None:
    network = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            spectral_norm.SpectralConv2D(3, 3),
            keras.layers.Flatten(),
            # More filters than numbers in each.
            spectral_norm.SpectralDense(60),
            keras.layers.Dense(1),
        ]
    )
    expected = 0.0
    for layer in (network.layers[0], network.layers[2]):
        matrix = layer.kernel.numpy().reshape(-1, layer.kernel.shape[-1])
        products = matrix.T @ matrix
        expected += np.sum((products - np.diag(np.diag(products))) ** 2)
    got = biggan_small.orthogonality(network)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for layer in (network.layers[0], network.layers[2]):
        check_gradient(
            lambda: biggan_small.orthogonality(network), layer.kernel.value
        )


# What StyleGAN2 is made of.

FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64.0


def filtered(images: np.ndarray, before: int, after: int) -> np.ndarray:
    """Filters each channel by itself, with zeros around the images."""
    edges = (before, after)
    padded = np.pad(images, ((0, 0), edges, edges, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (4, 4), axis=(1, 2)
    )
    return np.einsum("bhwcij,ij->bhwc", windows, FILTER)


def spread(images: np.ndarray) -> np.ndarray:
    """Puts zeros between pixels, and behind the last ones."""
    count, height, width, channels = images.shape
    made = np.zeros((count, 2 * height, 2 * width, channels), np.float32)
    made[:, ::2, ::2] = images
    return made


@pytest.mark.parametrize(
    ("resample", "expected"),
    [
        (
            resampling.upsample,
            lambda images: 4.0 * filtered(spread(images), 2, 1),
        ),
        (
            resampling.downsample,
            lambda images: filtered(images, 1, 1)[:, ::2, ::2],
        ),
        (
            lambda images: resampling.blur(images, 2),
            lambda images: filtered(images, 2, 2),
        ),
    ],
    ids=["upsample", "downsample", "blur"],
)
def test_resampling_is_that_of_its_filter(resample: Any, expected: Any) -> None:
    images = tf.Variable(numbers(2, 4, 6, 3))
    made = resample(images)
    np.testing.assert_allclose(made, expected(images.numpy()), atol=1e-5)
    cube = numbers(*made.shape, seed=1)
    check_gradient(
        lambda: tf.reduce_sum(cube * resample(images) ** 3) / 10.0, images
    )


def leaky(values: np.ndarray) -> np.ndarray:
    return np.sqrt(2.0) * np.where(values > 0, values, 0.2 * values)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_convolution_that_halves_filters_before(kernel_size: int) -> None:
    layer = equalized.EqualizedConv2D(4, kernel_size, halves=True, gain=0.5)
    images = numbers(2, 6, 6, 3)
    made = layer(images)
    layer.bias.assign(numbers(4, seed=1))
    kernel = layer.kernel.numpy() / np.sqrt(3 * kernel_size**2)
    edge = kernel_size // 2
    blurred = filtered(images, edge + 1, edge + 1)
    whole = np.einsum(
        "bhwcij,ijcf->bhwf",
        np.lib.stride_tricks.sliding_window_view(
            blurred, (kernel_size, kernel_size), axis=(1, 2)
        ),
        kernel,
    )
    expected = 0.5 * leaky(whole[:, ::2, ::2] + layer.bias.numpy())
    assert made.shape == (2, 3, 3, 4)
    np.testing.assert_allclose(layer(images), expected, atol=1e-5)


def modulated_kernel(
    layer: modulated.ModulatedConv2D, style: np.ndarray
) -> np.ndarray:
    """Equations (1) and (3) of StyleGAN2, of one example."""
    affine = layer.affine
    scales = style @ affine.kernel.numpy() / np.sqrt(len(style))
    scales += affine.bias.numpy()
    kernel = layer.kernel.numpy()
    kernel = kernel / np.sqrt(kernel[..., 0].size) * scales[:, None]
    return kernel / np.sqrt((kernel**2).sum((0, 1, 2)) + 1e-8)


@pytest.mark.parametrize("doubles", [False, True])
def test_modulated_convolution_is_that_of_its_equations(doubles: bool) -> None:
    layer = modulated.ModulatedConv2D(4, doubles)
    side = 10 if doubles else 5
    features, styles, noise = (
        tf.Variable(numbers(*shape, seed=seed))
        for seed, shape in enumerate([(2, 5, 5, 3), (2, 6), (2, side, side, 1)])
    )
    layer([features, styles, noise])
    layer.noise_strength.assign(0.3)
    layer.bias.assign(numbers(4, seed=4))
    expected = []
    for image, style in zip(features.numpy(), styles.numpy(), strict=True):
        kernel = modulated_kernel(layer, style)
        if doubles:
            # A transposed convolution is one of what is spread, turned round.
            wide = np.pad(spread(image[None]), ((0, 0), (1, 1), (1, 1), (0, 0)))
            whole = convolved(wide, kernel[::-1, ::-1])[:, :-1, :-1]
            expected.append(4.0 * filtered(whole, 1, 1)[0])
        else:
            expected.append(convolved(image[None], kernel)[0])
    values = np.stack(expected) + 0.3 * noise.numpy() + layer.bias.numpy()
    made = layer([features, styles, noise])
    np.testing.assert_allclose(made, leaky(values), atol=1e-5)
    cube = numbers(*made.shape, seed=5)
    for at in (features, styles, noise, layer.kernel.value):
        check_gradient(
            lambda: (
                tf.reduce_sum(cube * layer([features, styles, noise]) ** 2)
                / 10.0
            ),
            at,
        )


def test_an_image_is_modulated_and_not_demodulated() -> None:
    layer = modulated.ToImage(3)
    features, styles = numbers(2, 4, 4, 5), numbers(2, 6, seed=1)
    made = layer([features, styles])
    scales = styles @ layer.affine.kernel.numpy() / np.sqrt(6) + 1.0
    kernel = layer.kernel.numpy()[0, 0] / np.sqrt(5)
    expected = (features * scales[:, None, None]) @ kernel
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_deviations_are_those_of_groups_of_neighbours() -> None:
    layer = minibatch_deviation.MinibatchDeviation(4)
    features = tf.Variable(numbers(8, 2, 3, 5))
    made = layer(features)
    groups = features.numpy().reshape(2, 4, 2, 3, 5)
    deviations = np.sqrt(groups.var(1) + 1e-8).mean((1, 2, 3))
    np.testing.assert_array_equal(made[..., :5], features)
    np.testing.assert_allclose(
        made[..., 5],
        np.broadcast_to(deviations.repeat(4)[:, None, None], (8, 2, 3)),
        atol=1e-5,
    )
    # A part of a batch has the groups that it has in the whole.
    np.testing.assert_array_equal(layer(features[4:]), made[4:])
    # Of six, three.
    assert len(np.unique(layer(features[:6])[:, 0, 0, 5])) == 2
    check_gradient(lambda: tf.reduce_sum(layer(features) ** 2), features)


def test_a_mapping_learns_more_slowly_and_is_as_large() -> None:
    layer = equalized.EqualizedDense(200, multiplier=0.01)
    made = layer(numbers(100, 300))
    kernel = layer.kernel.numpy()
    assert 95.0 < kernel.std() < 105.0
    assert 0.9 < np.std(made) < 1.1
    expected = numbers(100, 300) @ kernel * 0.01 / np.sqrt(300)
    np.testing.assert_allclose(made, expected, atol=1e-5)
