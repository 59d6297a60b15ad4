"""The full form of a model: many networks, phases, state, random numbers."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import dtrain
from dtrain.bundle import objects
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.errors import UserError
from dtrain.gan import loading
from dtrain.gan import state as gan_lib
from dtrain.gan.example import Example, Place
from dtrain.gan.step import Step
from tests.replicas import mirrored

layers = keras.layers
CONFIG = Config(
    batch_size=8, latent_size=4, ema_half_life_images=1.0, jit_compile="off"
)
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def digits() -> sources.Source:
    return sources.open_source(Config())


# Random numbers.


def example(start: int, size: int) -> Example:
    """Some examples of a batch, from a position on."""
    seed = tf.constant([3, 5], tf.int64)
    return Example(
        real_images=tf.zeros([size, *SHAPE]),
        labels=tf.zeros([size], tf.int32),
        latents=tf.zeros([size, 4]),
        uniforms=tf.zeros([size]),
        step=tf.constant(0, tf.int64),
        place=Place(seed, tf.constant(start, tf.int64)),
    )


def drawn(examples: Example, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Draws of each kind, in one order."""
    return [
        examples.normal(shape).numpy(),
        examples.uniform(shape).numpy(),
        examples.seeds().numpy(),
        examples.normal(shape).numpy(),
    ]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 7),
    st.integers(1, 8),
)
def test_numbers_of_a_part_are_those_of_the_whole(
    shape: list[int], start: int, size: int
) -> None:
    whole = drawn(example(0, 16), tuple(shape))
    part = drawn(example(start, size), tuple(shape))
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_array_equal(one[start : start + size], other)
    assert whole[0].shape == (16, *shape)
    assert whole[2].shape == (16, 2)


def test_numbers_are_what_they_are_called() -> None:
    examples = example(0, 4096)
    normal, uniform = examples.normal((5,)), examples.uniform((5,))
    assert np.std(normal) == pytest.approx(1.0, abs=0.02)
    assert np.mean(normal) == pytest.approx(0.0, abs=0.02)
    assert 0.0 <= np.min(uniform) < 1e-3
    assert 1.0 > np.max(uniform) > 1.0 - 1e-3
    assert len(np.unique(normal)) > 20_000
    # No two draws are alike, of one example nor of several.
    again = examples.replace(labels=examples.labels).normal((5,))
    assert abs(np.corrcoef(np.ravel(normal), np.ravel(again))[0, 1]) < 0.03
    assert len(np.unique(examples.seeds(), axis=0)) == 4096


# What a step does.


def dense(size: int, inputs: int = 64) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.Dense(size, kernel_initializer="glorot_normal"),
        ]
    )


def flat(images: tf.Tensor) -> tf.Tensor:
    return tf.reshape(images, [-1, 64])


def reconstruct(networks: Any, examples: Example) -> Any:
    """Of an encoder and a decoder, from one forward pass."""
    images = flat(examples.real_images)
    codes = tf.cast(networks.encoder(images), tf.float32)
    codes += 0.1 * examples.normal((4,))
    made = tf.cast(networks.decoder(codes), tf.float32)
    distance = tf.reduce_mean(tf.square(made - images), 1)
    codes_seen = tf.stop_gradient(codes)
    judged = (
        networks.judge(codes_seen)[:, 0]
        - networks.judge(examples.latents)[:, 0]
    )
    losses = {"encoder": distance, "decoder": distance, "judge": judged}
    return losses, {"distance": distance}, {"code": codes_seen}


def track(state: Any, means: Any) -> Any:
    return {
        "mean_code": 0.5 * (state["mean_code"] + means["code"]),
        "runs": state["runs"] + 1.0,
    }


def shrink(networks: Any, examples: Example) -> Any:
    """A lazy phase, which sees the state."""
    away = tf.cast(networks.encoder(flat(examples.real_images)), tf.float32)
    away -= examples.state["mean_code"]
    losses = 3.0 * tf.reduce_sum(tf.square(away), 1)
    return losses, {"away": losses}


def count(state: Any, means: Any) -> Any:
    del means
    return {"lazy_runs": state["lazy_runs"] + 1.0}


def draw(networks: Any, examples: Example) -> tf.Tensor:
    codes = networks.encoder(flat(examples.real_images))
    return tf.reshape(networks.decoder(codes), [-1, *SHAPE])


def autoencoder(*_: Any, **changes: Any) -> dtrain.Program:
    names = ("encoder", "decoder")
    both = keras.optimizers.SGD(0.01)
    networks = {"encoder": dense(4), "decoder": dense(64, 4)}
    program = dtrain.Program(
        networks={**networks, "judge": dense(1, 4), "frozen": dense(2)},
        phases=[
            dtrain.Phase((*names, "judge"), reconstruct, update=track),
            dtrain.Phase("encoder", shrink, every_steps=3, update=count),
        ],
        optimizers=dict.fromkeys(names, both),
        averaged=names,
        state={"mean_code": [0.0] * 4, "runs": 0.0, "lazy_runs": 0.0},
        draw=draw,
    )
    return dataclasses.replace(program, **changes)


def make(*_: Any) -> dtrain.Program:
    return autoencoder()


def train(
    source: sources.Source,
    num_steps: int,
    num_replicas: int = 1,
    **changes: Any,
) -> tuple[gan_lib.GAN, Mapping[str, np.ndarray]]:
    config = dataclasses.replace(
        CONFIG, model="tests.program_test:make", **changes
    )
    strategy = mirrored(num_replicas)
    gan = gan_lib.GAN(config, strategy, source.image_shape, 0)
    step = Step(gan)
    iterator = pipeline.make_iterator(
        sources.Data(source), config, strategy, 0, step.num_draws
    )
    metrics, verdict = step.run(iterator, tf.constant(num_steps))
    assert int(verdict) == 0
    return gan, {name: value.numpy() for name, value in metrics.items()}


def test_networks_of_any_names(digits: sources.Source) -> None:
    gan, metrics = train(digits, 7)
    assert set(gan.averages) == {"encoder", "decoder"}
    assert set(gan.optimizers) == {"encoder", "judge"}
    # One for both; the lazy phase is one more application.
    assert int(gan.optimizers["encoder"].iterations.numpy()) == 7 + 3
    names = {"distance", "away", "encoder_gradient_norm"}
    assert names <= set(metrics)
    parts = set(objects.parts_of(gan.checkpoint))
    assert {
        *("encoder", "decoder", "judge", "frozen", "ema_encoder", "state"),
        *("ema_decoder", "encoder_optimizer", "judge_optimizer", "step"),
    } <= parts


def test_a_lazy_phase_is_run_in_each_nth_step(digits: sources.Source) -> None:
    gan, metrics = train(digits, 7)
    np.testing.assert_array_equal(
        np.isfinite(metrics["away"]),
        [step % 3 == 0 for step in range(7)],
    )
    assert np.isfinite(metrics["encoder_gradient_norm"]).all()
    assert float(gan.state["runs"].numpy()) == 7.0
    assert float(gan.state["lazy_runs"].numpy()) == 3.0


def test_replicas_and_micro_batches_change_nothing(
    digits: sources.Source,
) -> None:
    one, expected = train(digits, 7)
    other, metrics = train(digits, 7, num_replicas=2, micro_batches=4)
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, 2e-4, 1e-6)
    for name, variable in one.state.items():
        np.testing.assert_allclose(
            other.state[name].numpy(), variable.numpy(), 2e-4, 1e-6
        )


@pytest.mark.usefixtures("sums_as_written")
def test_ordered_reduction_gives_the_same_bits(
    digits: sources.Source,
) -> None:
    (one, first), (other, second) = (
        train(digits, 5, number, reduction="ordered") for number in (1, 4)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    for mine, yours in zip(one.variables, other.variables, strict=True):
        np.testing.assert_array_equal(mine.numpy(), yours.numpy())
    np.testing.assert_array_equal(
        one.state["mean_code"].numpy(), other.state["mean_code"].numpy()
    )


def test_float16_skips_by_optimizer(digits: sources.Source) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        gan, _ = train(digits, 3, precision="mixed_float16")
        assert set(gan.loss_scales) == {"encoder", "judge"}
    finally:
        keras.config.set_dtype_policy("float32")


# What cannot be.


def losses_of(names: str) -> Callable[..., Any]:
    """An objective whose losses are of these networks."""

    def objective(networks: Any, examples: Example) -> Any:
        images = flat(examples.real_images)
        made = networks.decoder(networks.encoder(images))
        losses = tf.reduce_mean(tf.square(made), 1)
        return dict.fromkeys(names.split(), losses), {}

    return objective


def only(objective: Any, *names: str, **more: Any) -> dict[str, Any]:
    """The changes for one phase alone, of the encoder if none is named."""
    return {
        "phases": [dtrain.Phase(names or "encoder", objective, **more)],
        "optimizers": {},
    }


REFUSED: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    (
        "networks is of type list; it must be a dict",
        lambda: {"networks": [dense(1)]},
    ),
    (
        "no network can be called 'step'",
        lambda: {"networks": {"step": dense(1)}},
    ),
    ("no network can be called 'a b'", lambda: {"networks": {"a b": dense(1)}}),
    (
        "no network can be called 'ema_a'",
        lambda: {"networks": {"ema_a": dense(1)}},
    ),
    (
        "the network a is of type str; it must be",
        lambda: {"networks": {"a": "b"}},
    ),
    (
        "a and b are one network",
        lambda: {"networks": dict.fromkeys(("a", "b"), dense(1))},
    ),
    ("phases is empty; it must be", lambda: {"phases": ()}),
    ("a phase trains 'critic'; it must train", lambda: only(shrink, "critic")),
    (
        "has every_steps=0; it must be a whole",
        lambda: only(shrink, every_steps=0),
    ),
    ("no phase is run in every step", lambda: only(shrink, every_steps=2)),
    ("the update of a phase of encoder is", lambda: only(shrink, update=3)),
    ("averaged names 'x'; the networks are", lambda: {"averaged": ("x",)}),
    ("does not say which networks are averaged", lambda: {"averaged": None}),
    ("the state 'p' is 'high'; it must be", lambda: {"state": {"p": "high"}}),
    (
        "the state 'p' is nan; it must be",
        lambda: {"state": {"p": float("nan")}},
    ),
    (
        "an optimizer of 'frozen', which no phase trains",
        lambda: {"optimizers": {"frozen": keras.optimizers.SGD()}},
    ),
    (
        "the optimizer of judge is of type str",
        lambda: {"optimizers": {"judge": "adam"}},
    ),
    (
        "prepare made real_images [1, 8, 8, 1] of 2 examples; it must keep",
        lambda: {
            "prepare": lambda each: each.replace(
                real_images=each.real_images[:1]
            )
        },
    ),
    (
        "of the encoder, holds other numbers each time it is traced",
        lambda: only(
            lambda networks, each: (
                shrink(networks, each)[0] * np.random.default_rng().random(),
                {},
            )
        ),
    ),
    (
        "the update of phase 1, of the encoder, raised KeyError: 'nope' (",
        lambda: only(shrink, update=lambda _, means: {"runs": means["nope"]}),
    ),
    (
        "returned a value of other; it must return a dict of new values of",
        lambda: only(shrink, update=lambda *_: {"other": 1.0}),
    ),
    (
        "gives runs the shape [2], and it has []",
        lambda: only(shrink, update=lambda *_: {"runs": [1.0, 2.0]}),
    ),
    (
        "of the encoder, raised TypeError: ",
        lambda: only(lambda networks: networks),
    ),
    (
        "its draw returned float32 [1, 8, 8, 1]; it must return pictures",
        lambda: {"draw": lambda _, each: each.real_images[:1]},
    ),
    (
        "RandomStandardNormal in line",
        lambda: {
            "draw": lambda _, each: (
                each.real_images + tf.random.normal(each.real_images.shape)
            )
        },
    ),
    ("optimizers is of type SGD; it must", lambda: {"optimizers": _sgd()}),
    (
        "a phase trains frozen, which has no variable to train",
        lambda: {"networks": _with_frozen(), **only(shrink, "frozen")},
    ),
    ("needs is of type list; it must be a", lambda: {"needs": ["a"]}),
    ("averaged is of type int; it must name", lambda: {"averaged": 3}),
    (
        "reads example.inputs['map'], and the data has nothing beside the",
        lambda: only(lambda _, each: (each.inputs["map"], {})),
    ),
    (
        "raised ValueError: no (",
        lambda: {"prepare": lambda _: _raise()},
    ),
    ("draw is of type int; it must be a function", lambda: {"draw": 3}),
    ("has no network that is called generator", lambda: {"draw": None}),
    (
        "needs latent_size 512, and it is 4",
        lambda: {"needs": {"latent_size": 512}},
    ),
    (
        "needs image_shape (64, 64, 3), and it is (8, 8, 1); choose other",
        lambda: {"needs": {"image_shape": (64, 64, 3)}},
    ),
    ("needs 'size', which is no flag", lambda: {"needs": {"size": 1}}),
    (
        "its objective returned losses of judge; it must return one for each",
        lambda: only(losses_of("judge")),
    ),
    (
        "its objective returned a dict",
        lambda: only(lambda *_: {}),
    ),
    (
        "its loss has the shape [] and must have [2]",
        lambda: only(lambda *_: (tf.constant(0.0), {})),
    ),
    (
        "its value far has the shape [3] and must have [2]",
        lambda: only(
            lambda _, each: (each.uniforms, {}, {"far": tf.zeros([3])}),
            update=track,
        ),
    ),
    (
        "returned far beside losses and metrics, and the phase has no update",
        lambda: only(
            lambda _, each: (each.uniforms, {}, {"far": each.uniforms})
        ),
    ),
    (
        "raised AttributeError: there is no network coder; there are encoder",
        lambda: only(lambda networks, _: networks.coder),
    ),
    (
        "no metric can be called step, which dtrain writes itself",
        lambda: only(lambda _, each: (each.uniforms, {"step": each.uniforms})),
    ),
    (
        "its loss of encoder is int32; it must be float32",
        lambda: only(lambda _, each: (each.labels, {})),
    ),
    (
        "its draw returned float32 [2, 64]; it must return pictures",
        lambda: {"draw": lambda _, each: flat(each.real_images)},
    ),
    ("its draw raised ValueError: no", lambda: {"draw": lambda *_: _raise()}),
    (
        "prepare returned None; it must return the example",
        lambda: {"prepare": lambda _: None},
    ),
]


def _with_frozen() -> dict[str, keras.Model]:
    networks = {"encoder": dense(4), "frozen": dense(2)}
    networks["frozen"].trainable = False
    return {**networks, "decoder": dense(64, 4), "judge": dense(1, 4)}


def _sgd() -> keras.Optimizer:
    return keras.optimizers.SGD()


def _raise() -> None:
    raise ValueError("no")


@pytest.mark.parametrize(("said", "changes"), REFUSED)
def test_what_cannot_be_is_told_before_the_first_step(
    said: str, changes: Callable[[], dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        loading.build(
            functools.partial(autoencoder, **changes()), CONFIG, SHAPE, 0
        )
    assert "\n" not in str(caught.value)
    assert "in user code" not in str(caught.value)


def test_an_optimizer_that_scales_losses(
    digits: sources.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = keras.optimizers.LossScaleOptimizer(_sgd())
    monkeypatch.setattr(
        "tests.program_test.make",
        lambda *_: autoencoder(optimizers={"judge": optimizer}),
    )
    with pytest.raises(UserError, match="of judge scales losses, which --prec"):
        train(digits, 1)


def test_a_program_that_is_whole_is_taken() -> None:
    program = loading.build(autoencoder, CONFIG, SHAPE, 0)
    assert program.trained == ("encoder", "decoder", "judge")
    assert program.optimized == {
        "encoder": ("encoder", "decoder"),
        "judge": ("judge",),
    }
    assert program.draws == (0, 0)
    critics = [dtrain.Phase("encoder", shrink)] * 5
    program = autoencoder(phases=[*critics, dtrain.Phase("judge", shrink)])
    assert program.draws == (0, 1, 2, 3, 4, 4)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_xla_is_given_the_same_numbers(
    micro_batches: int, digits: sources.Source
) -> None:
    """It would draw others by itself."""
    _, expected = train(digits, 2, micro_batches=micro_batches)
    _, metrics = train(digits, 2, micro_batches=micro_batches, jit_compile="on")
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, 1e-4, 1e-6)


def test_two_metrics_of_one_name(
    digits: sources.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(networks: Any, examples: Example) -> Any:
        return shrink(networks, examples)

    phases = [dtrain.Phase("encoder", each) for each in (shrink, other)]
    monkeypatch.setattr(
        "tests.program_test.make",
        lambda *_: autoencoder(phases=phases, optimizers={}),
    )
    with pytest.raises(UserError, match="an earlier phase has a metric away"):
        train(digits, 1)
