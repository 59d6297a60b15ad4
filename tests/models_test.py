from __future__ import annotations

import dataclasses
import math
import pathlib
import types
from typing import Any

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from dtrain import config
from dtrain.errors import UserError
from dtrain.gan import loading
from dtrain.models import batch_norm, dcgan, mlp, sizes

SMALL = config.Config(base_channels=4, latent_size=8)
DIGITS = (8, 8, 1)


def _make(
    image_shape: tuple[int, int, int] = DIGITS,
    num_classes: int = 0,
    **settings: Any,
) -> Any:
    made = loading.build(
        dcgan.make,
        dataclasses.replace(SMALL, **settings),
        image_shape,
        num_classes,
    )
    return types.SimpleNamespace(**made.networks)


def _latents(number: int, seed: int = 0) -> tf.Tensor:
    return tf.random.stateless_normal([number, 8], [seed, 0])


@hypothesis.given(st.integers(1, 300))
def test_base_size_is_the_halved_size(image_size: int) -> None:
    base = sizes.base_size(image_size)
    if base is None:
        halvings = [image_size / 2**k for k in range(1, 6)]
        assert not (
            8 <= image_size <= 128 and {4.0, 5.0, 6.0, 7.0} & set(halvings)
        )
    else:
        assert 4 <= base <= 7
        assert (image_size // base).bit_count() == 1
        assert image_size % base == 0


def test_sizes_of_common_data_sets() -> None:
    bases = {8: 4, 28: 7, 32: 4, 48: 6, 64: 4, 96: 6, 112: 7, 128: 4}
    assert {size: sizes.base_size(size) for size in bases} == bases


@pytest.mark.parametrize("image_size", [8, 12, 20, 28, 32, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_size_of_the_data(
    image_size: int, channels: int
) -> None:
    networks = _make((image_size, image_size, channels))
    images = networks.generator(_latents(3))
    assert images.shape == (3, image_size, image_size, channels)
    assert images.dtype == tf.float32
    assert np.abs(images).max() <= 1.0
    assert networks.discriminator(images).shape == (3, 1)


def test_channels_double_to_a_cap() -> None:
    networks = _make((128, 128, 3))
    widths = {
        layer.name: layer.filters
        for layer in networks.discriminator.layers
        if isinstance(layer, keras.layers.Conv2D)
    }
    assert widths == {
        "from_image_128x128": 4,
        "downsample_64x64": 8,
        "downsample_32x32": 16,
        "downsample_16x16": 32,
        "downsample_8x8": 32,
        "downsample_4x4": 32,
    }


@pytest.mark.parametrize(
    ("image_shape", "line"),
    [
        (
            (9, 9, 1),
            "dcgan makes no images of 9 pixels a side: a size from 8 to 128 "
            "must halve to 4, 5, 6 or 7; try --image_size=8 or 10",
        ),
        (
            (7, 7, 1),
            "dcgan makes no images of 7 pixels a side: a size from 8 to 128 "
            "must halve to 4, 5, 6 or 7; try --image_size=8",
        ),
        (
            (256, 256, 3),
            "dcgan makes no images of 256 pixels a side: a size from 8 to 128 "
            "must halve to 4, 5, 6 or 7; try --image_size=128",
        ),
        (
            (48, 64, 3),
            "images of 48x64 pixels are not square, as dcgan wants them; try "
            "--image_size=48",
        ),
        (
            (5, 9, 1),
            "images of 5x9 pixels are not square, as dcgan wants them; try "
            "--image_size=8",
        ),
    ],
)
def test_other_shapes_are_refused(
    image_shape: tuple[int, int, int], line: str
) -> None:
    with pytest.raises(UserError) as error:
        _make(image_shape)
    assert str(error.value) == line


def test_conditional_networks_look_at_the_labels() -> None:
    networks = _make(num_classes=10, conditional=True)
    latents = tf.repeat(_latents(1), 10, axis=0)
    labels = tf.range(10)
    images = networks.generator([latents, labels]).numpy()
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    same = tf.repeat(images[:1], 10, axis=0)
    logits = networks.discriminator([same, labels])
    assert len(np.unique(logits)) == 10


def test_unconditional_networks_ignore_that_there_are_labels() -> None:
    assert len(_make(num_classes=10).generator.inputs) == 1


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_every_layer_has_a_name_of_its_own(
    conditional: bool, norm: bool
) -> None:
    # Keras numbers the layers of a process: a name left to it changes with
    # what was made before.
    first = _make(num_classes=10, conditional=conditional, batch_norm=norm)
    second = _make(num_classes=10, conditional=conditional, batch_norm=norm)
    for one, other in zip(
        vars(first).values(), vars(second).values(), strict=True
    ):
        assert one.name == other.name
        assert [layer.name for layer in one.layers] == [
            layer.name for layer in other.layers
        ]
        assert [v.path for v in one.variables] == [
            v.path for v in other.variables
        ]
    assert first.generator.name == "generator"
    assert first.discriminator.name == "discriminator"


def test_batch_norm_is_the_generators_and_packed() -> None:
    networks = _make(batch_norm=True)
    kinds = [type(layer) for layer in networks.generator.layers]
    assert kinds.count(batch_norm.BatchNorm) == 2
    assert keras.layers.BatchNormalization not in kinds
    assert batch_norm.BatchNorm not in [
        type(layer) for layer in networks.discriminator.layers
    ]
    assert not _make().generator.non_trainable_variables


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_ends_in_float32(precision: str) -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        networks = _make(num_classes=10, conditional=True, batch_norm=True)
    finally:
        keras.config.set_dtype_policy(before)
    labels = tf.constant([1, 2, 3])
    images = networks.generator([_latents(3), labels], training=True)
    logits = networks.discriminator([images, labels], training=True)
    assert images.dtype == logits.dtype == tf.float32
    inner = networks.discriminator.get_layer("downsample_4x4")
    assert inner.compute_dtype == precision.removeprefix("mixed_")
    assert {
        v.dtype
        for network in vars(networks).values()
        for v in network.variables
    } == {"float32"}


def test_generator_survives_saving_by_keras(tmp_path: pathlib.Path) -> None:
    generator = _make(
        num_classes=3, conditional=True, batch_norm=True
    ).generator
    path = tmp_path / "generator.keras"
    generator.save(path)
    inputs = [_latents(4), tf.constant([0, 1, 2, 2])]
    np.testing.assert_array_equal(
        keras.models.load_model(path)(inputs), generator(inputs)
    )


def test_discriminator_learns_to_tell_two_images_apart() -> None:
    keras.utils.set_random_seed(0)
    networks = _make()
    bright = tf.fill([4, *DIGITS], 0.5)
    batch = tf.concat([bright, -bright], 0)
    targets = tf.constant([[1.0]] * 4 + [[-1.0]] * 4)
    optimizer = keras.optimizers.Adam(1e-2)
    for _ in range(30):
        with tf.GradientTape() as tape:
            error = tf.reduce_mean(
                (networks.discriminator(batch) - targets) ** 2
            )
        weights = networks.discriminator.trainable_variables
        optimizer.apply(tape.gradient(error, weights), weights)
    assert error < 0.1


@pytest.mark.parametrize("image_shape", [(1, 1, 2), (4, 6, 3)])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_mlp_is_dense_layers_of_a_width_and_a_depth(
    image_shape: tuple[int, int, int], num_classes: int
) -> None:
    settings = config.Config(
        latent_size=5, base_channels=7, conditional=bool(num_classes)
    )
    networks = mlp.make(settings, image_shape, num_classes, depth=3)
    for network, given, made in zip(
        networks, ((5,), image_shape), (image_shape, (1,)), strict=True
    ):
        into, out = math.prod(given), math.prod(made)
        embedding = [(num_classes, 7)] if num_classes else []
        assert sorted(tuple(each.shape) for each in network.weights) == sorted(
            [(into, 7), (7,), *[(7, 7), (7,)] * 2, (7, out), (out,), *embedding]
        )
        inputs = tf.random.stateless_normal([4, *given], [0, 0])
        labels = tf.constant([0, 1, 2, 0])
        returned = network([inputs, labels] if num_classes else inputs)
        assert returned.shape == (4, *made)
        # What is drawn is bounded by nothing.
        more = network([1e3 * inputs, labels] if num_classes else 1e3 * inputs)
        assert np.abs(more).max() > 2.0


def test_mlp_with_labels_is_that_of_one_hot_ones() -> None:
    settings = config.Config(latent_size=2, base_channels=4, conditional=True)
    generator, _ = mlp.make(settings, (1, 1, 2), 3, depth=1)
    latents, labels = tf.constant([[0.5, -2.0]]), tf.constant([2])
    weights = {each.path: each.numpy() for each in generator.weights}
    first, bias = (weights[f"hidden_0/{name}"] for name in ("kernel", "bias"))
    table = weights["label_embedding/embeddings"]
    last = weights["made/kernel"]
    hidden = np.concatenate([latents, [[0, 0, 1]]], 1) @ np.concatenate(
        [first, table]
    )
    hidden = np.where(hidden + bias > 0, hidden + bias, 0.2 * (hidden + bias))
    np.testing.assert_allclose(
        generator([latents, labels])[:, 0, 0], hidden @ last, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("image_shape", "depth", "words"),
    [((64, 64, 3), 2, "have 12288; give another"), ((1, 1, 2), 0, "depth (0)")],
)
def test_mlp_refuses(
    image_shape: tuple[int, int, int], depth: int, words: str
) -> None:
    with pytest.raises(UserError) as error:
        mlp.make(config.Config(), image_shape, 0, depth=depth)
    assert words in str(error.value)
