"""The networks that come with dtrain: their weights, labels and latents.

The weights are those of the papers or of their code, which the goldens hold.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from typing import Any, NamedTuple
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain import config
from dtrain.errors import UserError
from dtrain.gan import example, loading
from dtrain.gan.program import Program
from dtrain.recipes import biggan_small
from dtrain.recipes import stylegan2 as recipe
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
    # Configuration F: 30,370,060 and 29,012,513 by the authors' code.
    "stylegan2_1024": Case(
        "stylegan2", (1024, 1024, 3), {"base_channels": 32, "latent_size": 512}
    ),
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
    # Of junyanz/pytorch-CycleGAN-and-pix2pix: 54.414 M and 2.769 M, twice
    # 11.378 M and 2.765 M.
    "pix2pix_256": Case("pix2pix", (256, 256, 3), {"base_channels": 64}),
    "cyclegan_256": Case("cyclegan", (256, 256, 3), {"base_channels": 64}),
    "mlp_points": Case(
        "mlp", (1, 1, 2), {"base_channels": 128, "latent_size": 2}
    ),
}


def make(case: Case) -> Networks:
    """Makes networks as a run does; nothing is trained."""
    settings = config.Config(
        **case.settings, conditional=case.num_classes > 0, model=case.model
    )
    # Of shapes alone: nothing is drawn, and an optimizer is a variable at once.
    without = mock.patch.object(recipe, "_optimizers", return_value={})
    with keras.StatelessScope(), without:
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
    assert "discriminator" in made.networks


# What they do.


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape).astype(np.float32)


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


def test_labels_change_styles_and_what_is_judged() -> None:
    settings = config.Config(base_channels=2, latent_size=4, conditional=True)
    made = loading.load("stylegan2")(settings, (14, 14, 1), 3)
    mapping, _, discriminator = made.networks.values()
    latents, labels = tf.ones([4, 4]), tf.constant([0, 1, 2, 2])
    styles = mapping([latents, labels]).numpy()
    assert [len(np.unique(column)) for column in styles.T] == [3] * 4
    images = tf.ones([4, 14, 14, 1])
    logits = discriminator([images, labels])
    assert logits.shape == (4, 1)
    assert len(np.unique(logits)) == 3


def _example(size: int, image_shape: tuple[int, ...], latents: int) -> Any:
    place = example.Place(
        tf.constant([1, 2], tf.int64), tf.constant(0, tf.int64)
    )
    return example.Example(
        real_images=tf.zeros([size, *image_shape]),
        labels=tf.zeros([size], tf.int32),
        latents=tf.constant(numbers(size, latents)),
        uniforms=tf.linspace(0.0, 0.99, size),
        step=tf.constant(0, tf.int64),
        state={"mean_path_length": tf.constant(0.5)},
        place=place,
    )


def test_mixing_and_truncation_of_styles() -> None:
    settings = config.Config(base_channels=2, latent_size=4, r1_gamma=0.1)
    made = loading.load("stylegan2")(settings, (16, 16, 1), 0)
    networks = types.SimpleNamespace(**made.networks)
    style, styles, noises = recipe._synthesize(
        settings, 0.9, networks, _example(64, (16, 16, 1), 4)
    )
    own = (styles.numpy() == style.numpy()[:, None]).all(2)
    assert own[:, 0].all()
    assert (np.diff(own.astype(int), axis=1) <= 0).all()
    # A tenth is not mixed; the others are from all places on.
    assert own.all(1).sum() == 6
    assert set(own.sum(1)) == {1, 2, 3, 4, 5, 6}
    assert [noise.shape[1] for noise in noises] == [4, 8, 8, 16, 16]
    mean = tf.constant(numbers(4, seed=9))
    given = _example(2, (16, 16, 1), 4).replace(
        state={"mean_style": mean}, truncation=1e-6
    )
    near = made.draw(networks, given)
    same = networks.synthesis(
        [tf.broadcast_to(mean, (2, 6, 4)), *recipe._noises(networks, given)]
    )
    # Noise is nothing at first.
    np.testing.assert_allclose(near, same, atol=1e-4)


def test_path_lengths_of_a_linear_synthesis() -> None:
    """They are |J^T y| there, whatever the styles: equation (4)."""
    styles = keras.Input((2, 3))
    flat = keras.layers.Flatten()(styles)
    pixels = keras.layers.Dense(16)(flat)
    synthesis = keras.Model([styles], keras.layers.Reshape((4, 4, 1))(pixels))
    networks = types.SimpleNamespace(synthesis=synthesis)
    given = _example(4, (4, 4, 1), 3)

    def synthesize(*_: Any) -> Any:
        return None, tf.constant(numbers(4, 2, 3)), []

    loss, metrics = recipe._lengthen(synthesize, 3.0, networks, given)
    directions = _example(4, (4, 4, 1), 3).normal((4, 4, 1)).numpy()
    kernel = synthesis.weights[0].numpy()
    gradients = directions[::2].reshape(2, 16) @ kernel.T / 4.0
    lengths = np.sqrt(
        (gradients.reshape(2, 2, 3) ** 2).sum(2).mean(1) + 1e-8
    ).repeat(2)
    np.testing.assert_allclose(metrics["path_length"], lengths, rtol=1e-5)
    np.testing.assert_allclose(loss, 3.0 * (lengths - 0.5) ** 2, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"model_flag": ("group_size=0",)},
            "model_flag (group_size=0) must be at least 1",
        ),
        (
            {"warmup_steps": 3},
            "model (stylegan2) needs warmup_steps 0, and it is 3; give "
            "--warmup_steps=0",
        ),
    ],
)
def test_what_stylegan2_refuses(settings: dict[str, Any], line: str) -> None:
    told = config.Config(
        model="stylegan2", base_channels=1, latent_size=2, **settings
    )
    with pytest.raises(UserError) as error:
        loading.build(loading.load("stylegan2"), told, (8, 8, 1), 0)
    assert str(error.value) == line


def test_lazy_phases_take_their_share_of_an_optimizer() -> None:
    """Section 3.1 of StyleGAN2: c = k / (k + 1)."""
    settings = config.Config(
        base_channels=2, latent_size=4, r1_gamma=0.1, beta_1=0.5, beta_2=0.99
    )
    made = loading.load("stylegan2")(settings, (8, 8, 1), 0)
    phases = [(each.names[-1], each.every_steps) for each in made.phases]
    assert phases == [
        ("discriminator", 1),
        ("discriminator", 16),
        ("synthesis", 1),
        ("synthesis", 4),
    ]
    assert made.optimizers["mapping"] is made.optimizers["synthesis"]
    for name, power in (("mapping", 4 / 5), ("discriminator", 16 / 17)):
        adam = made.optimizers[name]
        assert adam.beta_1 == 0.5**power
        assert adam.beta_2 == 0.99**power
        np.testing.assert_allclose(adam.learning_rate, 1e-3 * power, rtol=1e-6)
    plain = loading.load("stylegan2")(
        dataclasses.replace(settings, r1_gamma=0.0),
        (8, 8, 1),
        0,
        path_length_weight=0.0,
    )
    assert [each.every_steps for each in plain.phases] == [1, 1]
    assert plain.optimizers["discriminator"].beta_2 == 0.99
