"""R3GAN: as many weights as the paper has, and what its layers compute."""

from __future__ import annotations

import math
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain import config
from dtrain.errors import UserError
from dtrain.models import r3gan
from tests.finite_differences import check_gradient


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape).astype(np.float32)


def small(num_classes: int = 0, size: int = 16) -> tuple[keras.Model, ...]:
    settings = config.Config(
        model="r3gan",
        base_channels=4,
        latent_size=3,
        conditional=num_classes > 0,
    )
    return r3gan.make(settings, (size, size, 3), num_classes, group_width=2)


@pytest.mark.parametrize(
    ("size", "width", "num_classes", "counts"),
    [
        # Table of the paper for CIFAR-10: 20.78 M and 21.28 M.
        (32, 768, 10, (20_781_952, 21_280_512)),
        # Of FFHQ-256: 23 M each.
        (256, 96, 0, (23_057_952, 23_009_568)),
    ],
)
def test_as_many_weights_as_in_the_paper(
    size: int, width: int, num_classes: int, counts: tuple[int, int]
) -> None:
    settings = config.Config(
        base_channels=width, latent_size=64, conditional=num_classes > 0
    )
    # Of shapes alone: nothing is drawn.
    with keras.StatelessScope():
        networks = r3gan.make(settings, (size, size, 3), num_classes)
    found = tuple(
        sum(math.prod(weight.shape) for weight in network.weights)
        for network in networks
    )
    assert found == counts


@pytest.mark.parametrize("size", [8, 28, 64])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_networks_fit_images(size: int, num_classes: int) -> None:
    generator, discriminator = small(num_classes, size)
    labels = tf.constant([0, 2])
    latents = tf.constant(numbers(2, 3))
    given = [latents, labels] if num_classes else latents
    images = generator(given)
    assert images.shape == (2, size, size, 3)
    judged = [images, labels] if num_classes else images
    assert discriminator(judged).shape == (2, 1)


def test_a_network_begins_as_a_chain_of_resamplings() -> None:
    generator, discriminator = small()
    latents = numbers(5, 3)
    values = latents @ weight(generator, "project")
    features = values[:, None, None] * weight(generator, "basis")
    for _ in range(2):
        features = doubled(features)
    images = features @ weight(generator, "to_image")[0, 0]
    np.testing.assert_allclose(generator(latents), images, atol=1e-5)
    features = images @ weight(discriminator, "from_image")[0, 0]
    for _ in range(2):
        features = halved(features)
    values = (features * weight(discriminator, "basis")).sum((1, 2))
    logits = values @ weight(discriminator, "logits")
    np.testing.assert_allclose(discriminator(images), logits, atol=1e-5)


def weight(network: keras.Model, layer: str) -> np.ndarray:
    return network.get_layer(layer).kernel.numpy()


def doubled(features: np.ndarray) -> np.ndarray:
    """Puts zeros between, and convolves with [1, 3, 3, 1] / 4."""
    for axis in (1, 2):
        spread = np.zeros(
            [2 * n if i == axis else n for i, n in enumerate(features.shape)]
        )
        spread[(slice(None),) * axis + (slice(None, None, 2),)] = features
        features = filtered(spread, axis, (2, 1)) * 2
    return features


def halved(features: np.ndarray) -> np.ndarray:
    """Convolves with [1, 3, 3, 1] / 8, and takes every second."""
    for axis in (1, 2):
        features = filtered(features, axis, (1, 2))
        features = features[(slice(None),) * axis + (slice(None, None, 2),)]
    return features


def filtered(
    features: np.ndarray, axis: int, edges: tuple[int, int]
) -> np.ndarray:
    pad = [(0, 0)] * 4
    pad[axis] = edges
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(features, pad), 4, axis
    )
    return windows @ np.array([1, 3, 3, 1]) / 8


def grouped(images: np.ndarray, kernel: np.ndarray, groups: int) -> np.ndarray:
    side, _, inputs, outputs = kernel.shape
    edge = ((side - 1) // 2,) * 2
    padded = np.pad(images, ((0, 0), edge, edge, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (side, side), (1, 2)
    )
    each = outputs // groups
    return np.concatenate(
        [
            np.einsum(
                "bhwcij,ijcf->bhwf",
                windows[:, :, :, group * inputs : (group + 1) * inputs],
                kernel[..., group * each : (group + 1) * each],
            )
            for group in range(groups)
        ],
        -1,
    )


def test_grouped_convolutions_with_their_derivatives() -> None:
    layer = r3gan.Convolution(6, 3, groups=3, gain=2.0)
    images = tf.Variable(numbers(2, 5, 5, 6))
    factors = numbers(2, 5, 5, 6, seed=1)
    layer(images)
    kernel = layer.kernel.value

    def penalty() -> tf.Tensor:
        """The square of a gradient, as that of R1."""
        with tf.GradientTape() as tape:
            made = tf.reduce_sum(factors * layer(images) ** 2)
        return tf.reduce_sum(tape.gradient(made, images) ** 2) / 1000.0

    np.testing.assert_allclose(
        layer(images), grouped(images.numpy(), kernel.numpy(), 3), atol=1e-5
    )
    check_gradient(penalty, kernel)
    check_gradient(penalty, images)


def test_an_activation_has_a_bias_and_no_gain() -> None:
    layer = r3gan.BiasedActivation()
    features = numbers(2, 3, 3, 4)
    layer(features)
    layer.bias.assign([0.0, 1.0, -1.0, 2.0])
    biased = features + layer.bias.numpy()
    wanted = np.where(biased > 0, biased, 0.2 * biased)
    np.testing.assert_allclose(layer(features), wanted, atol=1e-6)


def test_initial_weights_have_the_scale_of_their_depth() -> None:
    settings = config.Config(base_channels=64, latent_size=64)
    generator, _ = r3gan.make(settings, (16, 16, 3), 0)
    # Three sizes of two blocks; a leaky ReLU of slope 0.2.
    gain = math.sqrt(2 / 1.04) * 6**-0.25
    for name, inputs in (("expand", 64), ("grouped", 9 * 16), ("back", 0)):
        kernel = weight(generator, f"block_8x8_1_{name}")
        wanted = gain / math.sqrt(inputs) if inputs else 0.0
        assert kernel.std() == pytest.approx(wanted, rel=0.05)


def test_a_label_changes_what_is_drawn_and_judged(
    tmp_path: pathlib.Path,
) -> None:
    generator, discriminator = small(3)
    latents, labels = tf.ones([3, 3]), tf.range(3)
    images = generator([latents, labels])
    same = tf.repeat(images[:1], 3, axis=0)
    judged = discriminator([same, labels])
    assert len(np.unique(judged)) == 3
    assert len(np.unique(np.reshape(images, (3, -1)), axis=0)) == 3
    generator.save(tmp_path / "g.keras")
    again = keras.saving.load_model(tmp_path / "g.keras")
    np.testing.assert_array_equal(again([latents, labels]), images)


@pytest.mark.parametrize(
    ("size", "channels", "flags", "words"),
    [
        (9, 8, {}, "makes no images of 9x9"),
        (32, 20, {}, "try --base_channels=16, or --model_flag=group_width=2"),
        (32, 8, {"blocks": 0}, "blocks (0) must be at least 1"),
        (32, 8, {"group_width": 0}, "multiple of group_width (0)"),
    ],
)
def test_what_cannot_be_made(
    size: int, channels: int, flags: dict[str, int], words: str
) -> None:
    settings = config.Config(base_channels=channels)
    with pytest.raises(UserError) as error:
        r3gan.make(settings, (size, size, 1), 0, **flags)
    assert words in str(error.value)


def test_float16_is_refused_and_bfloat16_ends_in_float32() -> None:
    narrow = config.Config(base_channels=8, precision="mixed_float16")
    with pytest.raises(UserError, match="too narrow for r3gan"):
        r3gan.make(narrow, (8, 8, 1), 0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        generator, discriminator = small()
    finally:
        keras.config.set_dtype_policy("float32")
    blocks = generator.get_layer("block_8x8_0_grouped")
    assert blocks.compute_dtype == "bfloat16"
    images = generator(numbers(2, 3))
    assert images.dtype == discriminator(images).dtype == tf.float32
