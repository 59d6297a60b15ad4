"""The networks that come with dtrain: their weights, and what layers compute.

The shapes are those of the papers or of their code, which the goldens hold;
layers are compared with NumPy, and gradients with finite differences.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain import config
from dtrain.gan import loading
from dtrain.gan.program import Program
from dtrain.models import attention, batch_norm, spectral_norm
from dtrain.recipes import biggan_small
from tests import build_files

GOLDEN = build_files.ROOT / "tests" / "golden" / "networks"
Networks = dict[str, keras.Model]


class Case(NamedTuple):
    """Networks whose weights a golden holds.

    Attributes:
        model: of `--model`.
        image_shape: height, width, channels.
        settings: of the configuration.
        num_classes: 0 is not conditional.
        flags: arguments of `make`, as by `--model_flag`.
    """

    model: str
    image_shape: tuple[int, int, int]
    settings: dict[str, Any]
    num_classes: int = 0
    flags: dict[str, Any] = {}  # noqa: RUF012


GOLDENS = {
    # Of kwotsin/mimicry: cGAN-PD for CIFAR-10, SNGAN for STL-10.
    "sngan_32_conditional": Case(
        "sngan", (32, 32, 3), {"base_channels": 64, "latent_size": 128}, 10
    ),
    "sngan_48": Case(
        "sngan", (48, 48, 3), {"base_channels": 64, "latent_size": 128}
    ),
    # Of ajbrock/BigGAN-PyTorch, with G_shared and hier, and attention.
    "biggan_small_32_conditional": Case(
        "biggan_small",
        (32, 32, 3),
        {"base_channels": 64, "latent_size": 128},
        10,
    ),
    # Of brownvc/R3GAN for CIFAR-10: 20.78 M and 21.28 M in the paper.
    "r3gan_32_conditional": Case(
        "r3gan", (32, 32, 3), {"base_channels": 768, "latent_size": 64}, 10
    ),
    "mlp_points": Case(
        "mlp", (1, 1, 2), {"base_channels": 128, "latent_size": 2}
    ),
}


def make(case: Case) -> Networks:
    """Makes networks as a run does; nothing is trained."""
    settings = config.Config(
        **case.settings, conditional=case.num_classes > 0, model=case.model
    )
    # Of shapes alone: nothing is drawn.
    with keras.StatelessScope():
        made = loading.load(case.model)(
            settings, case.image_shape, case.num_classes, **case.flags
        )
    if isinstance(made, Program):
        return dict(made.networks)
    return {"generator": made[0], "discriminator": made[1]}


def described(networks: Networks) -> str:
    """Writes a line for each weight, and the number of those that are trained.

    Each layer has a name of its own: Keras numbers others by what was made
    before them in a process.
    """
    lines = []
    for name, network in networks.items():
        trained = sum(
            math.prod(weight.shape) for weight in network.trainable_weights
        )
        lines.append(f"{name}: {trained:,} trainable parameters")
        for weight in network.weights:
            shape = " x ".join(str(side) for side in weight.shape)
            kind = "" if weight.trainable else ", not trained"
            lines.append(f"  {weight.path}: {shape or 'a number'}{kind}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", GOLDENS)
def test_weights_are_those_of_the_golden(name: str) -> None:
    """DTRAIN_WRITE_GOLDEN=1 writes the files anew."""
    text = described(make(GOLDENS[name]))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("DTRAIN_WRITE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


SIZES = [
    ("sngan", 28, 10),
    ("sngan", 64, 0),
    ("biggan_small", 28, 0),
]


@pytest.mark.parametrize(("model", "size", "num_classes"), SIZES)
def test_images_have_the_size_of_the_data(
    model: str, size: int, num_classes: int
) -> None:
    shape = (size, size, 1)
    made = loading.build(
        loading.load(model),
        config.Config(
            model=model,
            base_channels=1,
            latent_size=4,
            conditional=num_classes > 0,
        ),
        shape,
        num_classes,
    )
    assert set(made.networks) >= {"generator", "discriminator"}


# Layers, beside NumPy.


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


def check_gradient(loss: Callable[[], tf.Tensor], at: tf.Variable) -> None:
    """Compares a gradient with finite differences, in three directions."""
    with tf.GradientTape() as tape:
        value = loss()
    gradient, here = tape.gradient(value, at), at.numpy()
    for seed in range(3):
        direction = numbers(*at.shape, seed=seed + 100)
        step = 1e-2 * direction / np.linalg.norm(direction)
        at.assign(here + step)
        ahead = loss()
        at.assign(here - step)
        expected = ahead - loss()
        at.assign(here)
        got = 2.0 * tf.reduce_sum(gradient * step)
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-4)


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


@pytest.mark.parametrize("model", ["sngan", "biggan_small"])
def test_a_label_changes_what_is_drawn_and_judged(model: str) -> None:
    settings = config.Config(base_channels=2, latent_size=4, conditional=True)
    generator, discriminator, *_ = loading.load(model)(settings, (8, 8, 1), 3)
    for weight in generator.weights:
        if "gains" in weight.path:
            weight.assign(numbers(*weight.shape))
    latents, labels = tf.ones([3, 4]), tf.range(3)
    images = generator([latents, labels]).numpy()
    assert len(np.unique(images.reshape(3, -1), axis=0)) == 3
    same = tf.repeat(images[:1], 3, axis=0)
    assert len(np.unique(discriminator([same, labels]))) == 3


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


def test_each_block_of_biggan_sees_latents_of_its_own() -> None:
    settings = config.Config(base_channels=1, latent_size=8, conditional=True)
    generator = biggan_small.make(settings, (32, 32, 1), 3).generator
    first = [
        generator.get_layer(f"condition_{number}").output[:, 8:]
        for number in range(3)
    ]
    inside = keras.Model(generator.inputs, first)
    latents = numbers(2, 8)
    parts = inside([latents, np.zeros(2, np.int32)])
    np.testing.assert_array_equal(np.concatenate(parts, 1), latents[:, 2:])
