from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import dtrain
from dtrain import config
from dtrain.errors import UserError
from dtrain.gan import loading, losses
from dtrain.gan import phases as phases_lib
from dtrain.models import dcgan

SETTINGS = config.Config(
    r1_gamma=0.0, base_channels=4, latent_size=8, model="my_models.gan:make"
)
SHAPE = (8, 8, 1)


@pytest.fixture
def directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pathlib.Path]:
    """An empty current directory, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def _write(directory: pathlib.Path, source: str) -> pathlib.Path:
    package = directory / "my_models"
    package.mkdir()
    (package / "__init__.py").touch()
    path = package / "gan.py"
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def _line(spec: str) -> str:
    with pytest.raises(UserError) as error:
        loading.load(spec)
    line = str(error.value)
    assert "\n" not in line
    return line


# Finding a model.


def test_dcgan_is_found_by_its_name() -> None:
    assert loading.load("dcgan") is dcgan.make


def test_a_users_function_is_found(directory: pathlib.Path) -> None:
    _write(directory, "def make(config, image_shape, num_classes): return 7")
    make = loading.load("my_models.gan:make")
    assert make(SETTINGS, SHAPE, 0) == 7


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("my_models.gan", "or package.module:make"),
        ("my_models.gan:", "or package.module:make"),
        (":make", "or package.module:make"),
        ("a:b:c", "or package.module:make"),
        ("my_models/gan.py:make", "must name a module, not a file"),
        ("gan.py:make", "must name a module, not a file"),
        ("..gan:make", "or package.module:make"),
        ("my_models.gann:make", "there is no module my_models.gann in "),
        ("my_mdels.gan:make", "there is no module my_mdels in "),
        ("my_models.gan:mak", "module my_models.gan has no 'mak'"),
        (
            "my_models.gan:NUMBER",
            "NUMBER is of type int; it must be a function",
        ),
    ],
)
def test_what_cannot_be_found_is_told(
    directory: pathlib.Path, spec: str, said: str
) -> None:
    _write(directory, "NUMBER = 1\ndef make(*arguments): pass")
    line = _line(spec)
    assert line.startswith(f"model ({spec})")
    assert said in line


@pytest.mark.parametrize(
    ("source", "said", "line_number"),
    [
        ("\nimport my_missing_library", "ModuleNotFoundError: No module", 2),
        ("import keras\nkeras.layers.Dence", "AttributeError: ", 2),
        ("x = 1\nx = = 2", "SyntaxError: invalid syntax", 2),
        (
            "def check():\n  raise ValueError('two\\nlines')\ncheck()",
            "ValueError: two lines",
            2,
        ),
    ],
)
def test_an_error_in_a_users_module_says_where(
    directory: pathlib.Path, source: str, said: str, line_number: int
) -> None:
    path = _write(directory, source)
    line = _line("my_models.gan:make")
    assert "importing my_models.gan raised" in line
    assert said in line
    assert f"{path}:{line_number}" in line


def test_a_long_error_is_cut(directory: pathlib.Path) -> None:
    _write(directory, "raise ValueError('long ' * 1000)")
    assert len(_line("my_models.gan:make")) < 700


# Making the networks.


def _generator(shape: tuple[int, ...] = SHAPE) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(int(np.prod(shape))),
            keras.layers.Reshape(shape),
        ]
    )


def _discriminator(outputs: int = 1) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Flatten(),
            keras.layers.Dense(outputs),
        ]
    )


def _integer_discriminator() -> keras.Model:
    images = keras.Input(SHAPE)
    logits = _discriminator()(images)
    return keras.Model(images, keras.ops.cast(logits, "int32"))


def _two_headed_discriminator() -> keras.Model:
    images = keras.Input(SHAPE)
    logits = _discriminator()(images)
    return keras.Model(images, {"logits": logits})


@keras.saving.register_keras_serializable(package="tests")
class Raising(keras.Model):
    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        del inputs
        raise RuntimeError("out of ideas")


class Unbuilt(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.head = _discriminator()
        self.only_in_training = keras.layers.Dense(2, name="forgotten")

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        logits = self.head(inputs)
        return logits + self.only_in_training(logits) if training else logits


def _build(made: Any, **settings: Any) -> dtrain.Program:
    return loading.build(
        lambda *_: made,
        dataclasses.replace(SETTINGS, **settings),
        SHAPE,
        10,
    )


def test_what_fits_is_built() -> None:
    generator, discriminator = _generator(), _discriminator()
    optimizer = keras.optimizers.SGD(0.1)
    phase = dtrain.Phase("generator", lambda *_: (None, {}))
    networks = {"generator": generator, "discriminator": discriminator}
    plain = _build((generator, discriminator))
    assert plain.networks == networks
    assert plain.averaged == ("generator",)
    assert not plain.optimizers
    assert plain.trained == ("generator", "discriminator")
    made = _build([generator, discriminator, [phase], optimizer])
    assert made.networks == networks
    assert made.optimizers == {"generator": optimizer}
    assert [phase.names for phase in made.phases] == [("generator",)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: None, "returned None; it must return a tuple"),
        (_generator, "returned of type Sequential; it must return a tuple"),
        (lambda: (_generator(),), "returned 1 values; it must return 2 to 5"),
        (lambda: range(6), "returned of type range; it must return a tuple"),
        (lambda: (1,) * 6, "returned 6 values; it must return 2 to 5"),
        (
            lambda: (_generator, _discriminator()),
            "the generator is of type function; it must be a keras.Model",
        ),
        (
            lambda: (_generator(), None),
            "the discriminator is None; it must be a keras.Model",
        ),
        (lambda: (_generator(),) * 2, "are one model; they must be two"),
        (
            lambda: (_generator((8, 8, 3)), _discriminator()),
            "the generator turned float32 [2, 8] into float32 [2, 8, 8, 3]; "
            "its shape must be [2, 8, 8, 1]",
        ),
        (
            lambda: (_generator(), _discriminator(2)),
            "the discriminator turned float32 [2, 8, 8, 1] into float32 "
            "[2, 2]; its shape must be [2] or [2, 1]",
        ),
        (
            lambda: (
                keras.Sequential(
                    [
                        keras.Input([100]),
                        keras.layers.Dense(64),
                        keras.layers.Reshape(SHAPE),
                    ]
                ),
                _discriminator(),
            ),
            "takes float32 [None, 100], and it is given float32 [2, 8]; give "
            "--latent_size=100",
        ),
        (
            lambda: (_generator(), _integer_discriminator()),
            "int32 [2, 1]; it must return float32",
        ),
        (
            lambda: (_generator(), _two_headed_discriminator()),
            "into a value of type dict; it must return a tensor",
        ),
        (
            lambda: (_generator(), keras.Sequential([keras.layers.Flatten()])),
            "the discriminator turned float32 [2, 8, 8, 1] into",
        ),
        (
            lambda: (
                _generator(),
                keras.Sequential([keras.layers.GlobalMaxPool2D()]),
            ),
            "the discriminator has no variable to train",
        ),
        (
            lambda: (_generator(), Unbuilt()),
            "the discriminator has a layer 'forgotten' that a call does not",
        ),
        (
            lambda: (_generator(), _discriminator(), ()),
            "phases is empty; it must be a tuple of at least one",
        ),
        (
            lambda: (_generator(), _discriminator(), ("generator",)),
            "a phase is of type str; it must be a dtrain.Phase",
        ),
        (
            lambda: (
                _generator(),
                _discriminator(),
                (dtrain.Phase("critic", print),),
            ),
            "a phase trains 'critic'; it must train 'generator' or",
        ),
        (
            lambda: (_generator(), _discriminator(), None, "adam"),
            "the generator_optimizer is of type str; it must be a keras",
        ),
    ],
)
def test_what_does_not_fit_is_told(make: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        _build(make())
    line = str(error.value)
    assert line.startswith("model (my_models.gan:make)")
    assert said in line
    assert "\n" not in line


def test_an_error_in_a_call_says_where() -> None:
    with pytest.raises(UserError) as error:
        _build((Raising(), _discriminator()))
    line = str(error.value)
    assert "the generator, called with float32 [2, 8], raised" in line
    assert "RuntimeError: Exception encountered when calling" in line
    assert "out of ideas" in line
    assert "\x1b" not in line
    assert f"{__file__}:" in line


def test_an_error_in_make_says_where(directory: pathlib.Path) -> None:
    path = _write(
        directory,
        """
        import keras
        def make(config, image_shape, num_classes):
            return keras.layers.Reshape([2])(keras.Input([3]))
        """,
    )
    with pytest.raises(UserError) as error:
        loading.build(loading.load("my_models.gan:make"), SETTINGS, SHAPE, 0)
    assert "raised ValueError" in str(error.value)
    assert f"{path}:4" in str(error.value)


def test_labels_are_needed_to_be_conditional() -> None:
    settings = config.Config(conditional=True, dataset="folder:/cats")
    with pytest.raises(UserError, match="the data set folder:/cats has none"):
        loading.build(dcgan.make, settings, SHAPE, 0)


def test_a_model_without_labels_cannot_be_conditional() -> None:
    with pytest.raises(
        UserError,
        match=re.escape(
            "the generator takes 1 inputs; conditional=True gives it 2: "
            "float32 [2, 8], int32 [2]"
        ),
    ):
        _build((_generator(), _discriminator()), conditional=True)


def test_a_model_with_labels_must_be_conditional() -> None:
    made = dcgan.make(
        dataclasses.replace(SETTINGS, conditional=True), SHAPE, 10
    )
    with pytest.raises(UserError, match="the generator takes 2 inputs"):
        _build(made)


def test_networks_are_mirrored_in_the_scope_of_a_strategy() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        networks = loading.build(
            dcgan.make,
            config.Config(base_channels=4, latent_size=8, batch_norm=True),
            SHAPE,
            0,
        ).networks
    for network in networks.values():
        for variable in network.variables:
            values = strategy.experimental_local_results(variable.value)
            assert len(values) == 2
            np.testing.assert_array_equal(*values)


# The default phases.


class Point(keras.Model):
    """A critic (scale * sum of the pixels) with a known gradient."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = self.add_weight(
            initializer=keras.initializers.Constant(scale)
        )

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        assert training
        return self.scale * tf.reduce_sum(inputs, [1, 2, 3])


class Shift(keras.Model):
    """A generator: the latents as one pixel each, plus `shift`."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = self.add_weight(initializer="zeros")

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        assert training
        return inputs[:, None, :, None] + self.shift


# Two pixels an image: sums 3 and -1 for the reals, 1 and 0 for the fakes; so
# logits 6 and -2, 2 and 0; the squared gradient is 2 * 2^2 = 8.
def _networks() -> dtrain.Networks:
    return dtrain.Networks(Shift(), Point(2.0))


def _example() -> dtrain.Example:
    return dtrain.Example(
        real_images=tf.reshape([1.0, 2.0, -1.0, 0.0], [2, 1, 2, 1]),
        labels=tf.zeros([2], tf.int32),
        latents=tf.constant([[1.0, 0.0], [1.0, -1.0]]),
        uniforms=tf.constant([0.25, 0.75]),
        step=tf.constant(0, tf.int64),
    )


REAL_LOGITS = [6.0, -2.0]
FAKE_LOGITS = [2.0, 0.0]


def _objectives(**settings: Any) -> list[Any]:
    phases = phases_lib.adversarial_phases(
        dataclasses.replace(SETTINGS, **settings)
    )
    networks, example = _networks(), _example()
    return [phase.objective(networks, example) for phase in phases]


def test_a_step_is_discriminator_phases_and_one_generators() -> None:
    phases = phases_lib.adversarial_phases(
        dataclasses.replace(SETTINGS, discriminator_steps=3)
    )
    assert [phase.networks for phase in phases] == [
        *["discriminator"] * 3,
        "generator",
    ]


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_phases_compute_the_loss_of_the_flag(name: str) -> None:
    settings = {"loss": name}
    if name == "wgan_gp":
        settings["gradient_penalty"] = 0.0
    (for_discriminator, seen), (for_generator, rest) = _objectives(**settings)
    loss = losses.LOSSES[name]
    real, fake = tf.constant(REAL_LOGITS), tf.constant(FAKE_LOGITS)
    expected = loss.discriminator(real, fake)
    np.testing.assert_allclose(for_discriminator, expected)
    np.testing.assert_allclose(for_generator, loss.generator(real, fake))
    assert seen.keys() == {"discriminator_loss", "real_logits", "fake_logits"}
    np.testing.assert_allclose(seen["discriminator_loss"], expected)
    np.testing.assert_allclose(seen["real_logits"], REAL_LOGITS)
    np.testing.assert_allclose(seen["fake_logits"], FAKE_LOGITS)
    np.testing.assert_allclose(rest["generator_loss"], for_generator)


def test_penalties_are_added_at_half_their_weight() -> None:
    (plain, _), _ = _objectives()
    (loss, seen), _ = _objectives(r1_gamma=3.0, r2_gamma=5.0)
    # 3 / 2 * 8 + 5 / 2 * 8
    np.testing.assert_allclose(loss, plain + 32.0, rtol=1e-6)
    np.testing.assert_allclose(seen["r1_penalty"], [8.0, 8.0])
    np.testing.assert_allclose(seen["r2_penalty"], [8.0, 8.0])
    np.testing.assert_allclose(seen["discriminator_loss"], plain)


def test_wgan_gp_adds_its_penalty_in_full() -> None:
    (loss, seen), _ = _objectives(loss="wgan_gp", gradient_penalty=10.0)
    # (sqrt(8) - 1)^2 = 3.3431458; fake - real = -4 and 2
    np.testing.assert_allclose(seen["gradient_penalty"], [3.3431458] * 2, 1e-6)
    np.testing.assert_allclose(loss, [29.431458, 35.431458], 1e-6)


def test_wgan_gp_looks_between_real_and_fake() -> None:
    seen = []

    class Watching(Point):
        def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
            seen.append(np.ravel(inputs))
            return super().call(inputs, training)

    watching = _networks()._replace(discriminator=Watching(1.0))
    phase = phases_lib.adversarial_phases(
        dataclasses.replace(SETTINGS, loss="wgan_gp")
    )[0]
    phase.objective(watching, _example())
    # A quarter real: 0.75 * (1, 0) + 0.25 * (1, 2); then three quarters:
    # 0.25 * (1, -1) + 0.75 * (-1, 0).
    np.testing.assert_allclose(seen[-1], [1.0, 0.5, -0.5, -0.25])


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_the_discriminators_phase_does_not_reach_the_generator(
    loss: str,
) -> None:
    settings = dataclasses.replace(
        SETTINGS, loss=loss, r1_gamma=1.0, r2_gamma=1.0
    )
    networks = _networks()
    for phase, trained, reached in zip(
        phases_lib.adversarial_phases(settings),
        [networks.discriminator, networks.generator],
        (False, True),
        strict=True,
    ):
        with tf.GradientTape(persistent=True) as tape:
            value, _ = phase.objective(networks, _example())
        weights = [v.value for v in trained.trainable_variables]
        assert all(g is not None for g in tape.gradient(value, weights))
        shift = networks.generator.shift.value
        assert (tape.gradient(value, shift) is not None) == reached


def test_penalty_trains_the_discriminator() -> None:
    phase = phases_lib.adversarial_phases(
        dataclasses.replace(SETTINGS, loss="hinge", r1_gamma=3.0)
    )[0]
    networks = _networks()
    scale = networks.discriminator.scale.value
    with tf.GradientTape() as tape:
        value, seen = phase.objective(networks, _example())
        penalty = tf.reduce_sum(value - seen["discriminator_loss"])
    # Two examples of 3 / 2 * 2 s^2, whose derivative is 6 s each.
    np.testing.assert_allclose(tape.gradient(penalty, scale), 24.0, 1e-5)


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_phases_of_conditional_dcgan(loss: str) -> None:
    settings = dataclasses.replace(
        SETTINGS, loss=loss, conditional=True, r1_gamma=1.0
    )
    built = loading.build(dcgan.make, settings, SHAPE, 10)
    networks = types.SimpleNamespace(**built.networks)
    example = dtrain.Example(
        real_images=tf.zeros([4, *SHAPE]),
        labels=tf.constant([0, 3, 9, 9]),
        latents=tf.random.stateless_normal([4, 8], [0, 0]),
        uniforms=tf.constant([0.0, 0.1, 0.5, 0.9]),
        step=tf.constant(0, tf.int64),
    )
    for phase in phases_lib.adversarial_phases(settings):
        [name] = phase.names
        network = built.networks[name]
        with tf.GradientTape() as tape:
            objective = functools.partial(phase.objective, networks, example)
            value, metrics = tf.function(objective)()
        assert value.shape == (4,)
        assert {metric.shape for metric in metrics.values()} == {(4,)}
        gradients = tape.gradient(
            value, [v.value for v in network.trainable_variables]
        )
        for gradient in gradients:
            assert np.isfinite(tf.convert_to_tensor(gradient)).all()


# Settings of a model.


def _sized(
    config: Any,
    image_shape: Any,
    num_classes: int,
    width: int = 4,
    scale: float = 1.0,
    *,
    deep: bool = False,
    name: str = "plain",
) -> Any:
    del config, image_shape, num_classes
    _SEEN.append((width, scale, deep, name))
    return _generator(), _discriminator()


_SEEN: list[Any] = []


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((), (4, 1.0, False, "plain")),
        (("width=8", "deep=True"), (8, 1.0, True, "plain")),
        (("scale=2", "name=a=b", "deep=false"), (4, 2.0, False, "a=b")),
    ],
)
def test_settings_of_a_model(told: tuple[str, ...], expected: Any) -> None:
    settings = dataclasses.replace(SETTINGS, model_flag=told)
    loading.build(_sized, settings, SHAPE, 10)
    assert _SEEN[-1] == expected
    assert config.from_dict(json.loads(json.dumps(settings.to_dict())))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("width", "must be NAME=VALUE, each name once"),
        ("width=a", "must be a whole number"),
        ("scale=a", "must be a number"),
        ("deep=2", "must be true or false"),
        ("depth=2", "has no argument depth with a default; it has width, sc"),
        ("num_classes=2", "has no argument num_classes with a default"),
    ],
)
def test_settings_that_a_model_does_not_have(told: str, said: str) -> None:
    settings = dataclasses.replace(SETTINGS, model_flag=(told,))
    with pytest.raises(UserError, match=re.escape(said)) as error:
        loading.build(_sized, settings, SHAPE, 10)
    assert f"model_flag ({told})" in str(error.value)
