"""pix2pix and CycleGAN: their networks, and what they are given."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.errors import UserError
from dtrain.gan import loading
from dtrain.gan.example import Example, Place
from dtrain.gan.pictures import Pictures
from dtrain.gan.program import Named, Program
from dtrain.gan.state import GAN
from dtrain.models import translators
from dtrain.quality.samples import AVERAGE, Samples

SHAPE = (16, 16, 3)
SMALL = Config(base_channels=2)


def build(
    model: str,
    inputs: dict[str, Any],
    *flags: str,
    shape: tuple[int, int, int] = SHAPE,
) -> Program:
    """Builds a program, for data with such inputs."""
    config = dataclasses.replace(SMALL, model=model, model_flag=flags)
    make = loading.load(config.model)
    return loading.build(make, config, shape, 0, inputs)


def example(images: Any, **inputs: Any) -> Example:
    size = len(images)
    return Example(
        real_images=tf.constant(images, tf.float32),
        labels=tf.zeros([size], tf.int32),
        latents=tf.zeros([size, 4]),
        uniforms=tf.zeros([size]),
        step=tf.constant(0, tf.int64),
        inputs=inputs,
        place=Place(tf.constant([3, 7], tf.int64), tf.constant(0, tf.int64)),
    )


def images(shape: tuple[int, ...] = SHAPE, number: int = 4) -> np.ndarray:
    numbers = np.random.default_rng(number)
    return numbers.uniform(-1, 1, (number, *shape)).astype(np.float32)


IMAGE = tf.TensorSpec(SHAPE, tf.float32)
LABELS = tf.TensorSpec(SHAPE[:2], tf.int32)


@pytest.mark.parametrize(
    ("model", "inputs", "flags", "line"),
    [
        ("pix2pix", {}, [], "name them by --paired=given=DATASET, or say"),
        ("pix2pix", {"a": IMAGE, "b": IMAGE}, [], "--paired=given=DATASET"),
        ("pix2pix", {"a": LABELS}, [], "--model_flag=given_channels=N"),
        ("pix2pix", {}, ["target=up"], "must be left or right"),
        (
            "pix2pix",
            {"a": tf.TensorSpec((16, 16, 1), tf.float32)},
            [],
            "--model_flag=given_channels=1 says",
        ),
        ("cyclegan", {}, [], "--unpaired=other=DATASET"),
        (
            "cyclegan",
            {"a": tf.TensorSpec((8, 8, 3), tf.float32)},
            [],
            "--image_size for both",
        ),
    ],
)
def test_what_they_are_not_given_is_one_line(
    model: str, inputs: dict[str, Any], flags: list[str], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        build(model, inputs, *flags)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["pix2pix", "cyclegan"])
@pytest.mark.parametrize("side", [4, 18, 15])
def test_sizes_that_they_do_not_make(model: str, side: int) -> None:
    with pytest.raises(UserError, match=f"{side}x{side} pixels.* try --image"):
        build(model, {}, shape=(side, side, 3))


def test_a_pair_is_cut_and_mirrored_alike() -> None:
    program = build("pix2pix", {"edges": IMAGE})
    assert program.prepare is not None
    photos = images()
    prepared = program.prepare(example(photos, edges=tf.constant(photos)))
    one, two = prepared.real_images.numpy(), prepared.inputs["given"].numpy()
    np.testing.assert_array_equal(one, two)
    assert one.shape == photos.shape
    assert not np.allclose(one, photos)


@pytest.mark.parametrize("target", ["left", "right"])
def test_a_target_is_a_half(target: str) -> None:
    left, right = images(number=2), images(number=3)[:2]
    both = np.concatenate([left, right], axis=2)
    flags = [f"target={target}", "jitter=false"]
    program = build("pix2pix", {}, *flags, shape=(16, 32, 3))
    assert program.prepare is not None
    prepared = program.prepare(example(both))
    wanted, given = (left, right) if target == "left" else (right, left)
    np.testing.assert_array_equal(prepared.real_images, wanted)
    np.testing.assert_array_equal(prepared.inputs["given"], given)


def test_labels_are_given_as_channels() -> None:
    flags = ["given_channels=4", "jitter=false"]
    program = build("pix2pix", {"labels": LABELS}, *flags)
    assert program.prepare is not None
    labels = np.arange(4 * 16 * 16).reshape(4, 16, 16) % 4
    given = tf.constant(labels, tf.int32)
    prepared = program.prepare(example(images(), labels=given))
    np.testing.assert_array_equal(prepared.inputs["given"], np.eye(4)[labels])


def test_the_noise_of_a_unet_drops_half_of_its_features() -> None:
    program = build(
        "pix2pix",
        {"a": tf.TensorSpec((32, 32, 1), tf.float32)},
        "jitter=false",
        shape=(32, 32, 1),
    )
    unet = program.networks["generator"]
    [shape] = translators.dropped_shapes(32, 32, 2)
    assert [tuple(each.shape[1:]) for each in unet.inputs] == [
        (32, 32, 1),
        shape,
    ]
    given = images((32, 32, 1), 1)
    normal = unet.get_layer("up_2x2_norm").output
    joined = unet.get_layer("up_2x2_joined").output
    drawn = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    before, after = (
        np.asarray(each)
        for each in type(unet)(unet.inputs, [normal, joined])([given, drawn])
    )
    expected = np.where(drawn >= 0.5, 2.0 * before, 0.0)
    np.testing.assert_allclose(after[..., : shape[-1]], expected, rtol=1e-6)
    # In training and in drawing: other numbers, another image.
    assert program.draw is not None
    networks = Named(**program.networks)
    told = example(given, a=tf.constant(given)).replace()
    prepared = program.prepare(told) if program.prepare else told
    drawings = [program.draw(networks, prepared).numpy() for _ in range(2)]
    assert drawings[0].shape == (1, 32, 96, 1)
    assert np.abs(drawings[0] - drawings[1]).max() > 0.0


def test_a_patch_has_70_pixels() -> None:
    """Appendix 6.1.2 of pix2pix: a logit sees 70 of the 128 pixels a side."""
    judge = translators.make_patch_gan((128, 128, 1), 1)
    images = tf.Variable(tf.random.stateless_normal([1, 128, 128, 1], [0, 1]))
    before = type(judge)(judge.inputs, judge.get_layer("logits").output)
    # What is normalized sees all of the image: look at the weights alone.
    for layer in judge.layers:
        if layer.name.endswith("_norm"):
            layer.call = lambda inputs: inputs
    with tf.GradientTape() as tape:
        logits = before(images)
        logit = logits[0, 7, 7, 0]
    seen = np.abs(tape.gradient(logit, images).numpy()[0, :, :, 0]) > 0
    assert logits.shape == (1, 14, 14, 1)
    assert [int(seen.any(axis).sum()) for axis in (0, 1)] == [70, 70]


def test_figures_are_of_translations_alone() -> None:
    told = ["--model=pix2pix", "--paired=given=digits", "--base_channels=1"]
    config = config_lib.parse(["main", *told])
    data = sources.open_data(config)
    gan = GAN(config, tf.distribute.get_strategy(), (8, 8, 1), 10, data.specs)
    samples = Samples(gan, data, 0, AVERAGE)
    samples.prepare()
    made, _ = samples.make(tf.range(4, dtype=tf.int64))
    assert made.shape == (4, 8, 8, 1)
    shown = Pictures(gan, lambda n: pipeline.first_batch(data, config, n))
    assert shown(tf.zeros([4, config.latent_size]), None).shape[2] > 8
    # One that shows more, and does not say what is to be measured.
    gan.program = dataclasses.replace(gan.program, generate=None)
    samples = Samples(gan, data, 0, AVERAGE)
    samples.prepare()
    with pytest.raises(
        UserError, match=r"those of the data.* give its Program a generate"
    ):
        samples.make(tf.range(4, dtype=tf.int64))
