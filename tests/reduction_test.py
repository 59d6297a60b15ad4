"""The bits of a sum do not depend on how many replicas share it.

The tree, the exchange and the step, on logical CPUs of one process; runs that
are killed and go on with other replicas are in resume_test.py.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.errors import UserError
from dtrain.gan import loading, reduction
from dtrain.gan import state as gan_lib
from dtrain.gan.replicas import Comparison
from dtrain.gan.step import Step
from dtrain.models import batch_norm, spectral_norm
from tests.replicas import collectives, mirrored

SMALL = Config(
    batch_size=8,
    base_channels=2,
    latent_size=4,
    jit_compile="off",
    num_steps=100,
    reduction="ordered",
    micro_batches=4,
)
IMAGE_SHAPE = (8, 8, 1)


@pytest.fixture(autouse=True, scope="module")
def as_strategies_make_does() -> Iterator[None]:
    options = tf.config.optimizer
    options.set_experimental_options({"arithmetic_optimization": False})
    tf.config.experimental.enable_op_determinism()
    yield
    options.set_experimental_options({"arithmetic_optimization": True})


@pytest.fixture(autouse=True)
def fresh_keras() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def digits() -> sources.Source:
    return sources.open_source(Config())


# The tree.


def tree_sum(values: Sequence[np.ndarray]) -> np.ndarray:
    """The tree by its definition, from the root."""
    if len(values) == 1:
        return values[0]
    left = 1 << (len(values) - 1).bit_length() - 1
    return tree_sum(values[:left]) + tree_sum(values[left:])


def accumulated(values: Sequence[Any], ordered: bool = True) -> np.ndarray:
    total = reduction.accumulate(
        len(values), lambda number, _: values[number], ordered=ordered
    )
    return np.asarray(total)


def random_leaves(seed: int, count: int, size: int = 7) -> list[np.ndarray]:
    """Numbers of all magnitudes, whose sum is rounded at every step."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(count, size))
    values *= 10.0 ** generator.integers(-6, 7, size=values.shape)
    return list(values.astype(np.float32))


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=40)
def test_replicas_hold_subtrees(
    seed: int, num_replicas: int, log_share: int
) -> None:
    share = 2**log_share
    leaves = random_leaves(seed, num_replicas * share)
    whole = accumulated(leaves)
    parts = [
        accumulated(leaves[start : start + share])
        for start in range(0, len(leaves), share)
    ]
    np.testing.assert_array_equal(accumulated(parts), whole)
    np.testing.assert_array_equal(tree_sum(leaves), whole)


def test_fast_adds_from_left_to_right() -> None:
    leaves = random_leaves(0, 7)
    total = leaves[0]
    for leaf in leaves[1:]:
        total = total + leaf
    np.testing.assert_array_equal(accumulated(leaves, ordered=False), total)
    # Shows that these leaves tell one order from another.
    assert not np.array_equal(accumulated(leaves), total)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_parts_wait_for_those_far_enough_before(at_once: int) -> None:
    leaves = random_leaves(0, 7)
    waits = []

    def make_part(number: int, before: Any) -> np.ndarray:
        waits.append(before)
        return leaves[number]

    total = reduction.accumulate(7, make_part, ordered=False, at_once=at_once)
    np.testing.assert_array_equal(total, accumulated(leaves, ordered=False))
    assert waits[:at_once] == [None] * at_once
    for number, before in enumerate(waits[at_once:], 1):
        so_far = accumulated(leaves[:number], ordered=False)
        np.testing.assert_array_equal(before, so_far)


def test_a_tree_holds_few_sums() -> None:
    """By the sizes of what is added: the stack is a binary counter."""
    held, most = 0, 0

    class Sum:
        def __init__(self) -> None:
            nonlocal held, most
            held += 1
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= 1

    def add(left: Sum, right: Sum) -> Sum:
        del left, right
        return Sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf, "add", add)
        reduction.accumulate(64, lambda *_: Sum(), ordered=True)
    assert most <= math.log2(64) + 3


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), max_size=3),
            st.sampled_from([tf.float32, tf.float16, tf.bfloat16]),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=30)
def test_packing_and_unpacking(shapes: list[tuple[list[int], Any]]) -> None:
    values = [
        tf.cast(tf.random.stateless_normal(shape, [number, 7]), dtype)
        for number, (shape, dtype) in enumerate(shapes)
    ]
    for value, got in zip(
        values, reduction.unpack(reduction.pack(values), values), strict=True
    ):
        assert got.dtype == value.dtype
        # NumPy has no bfloat16 of its own.
        assert tf.reduce_all(got == value)


# The exchange.


def exchange(
    num_replicas: int, leaves: np.ndarray, ordered: bool
) -> list[np.ndarray]:
    """Adds a leaf of each replica; returns what each replica then has."""
    strategy = mirrored(num_replicas)

    @tf.function
    def run() -> Any:
        def of_replica() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            leaf = tf.constant(leaves)[context.replica_id_in_sync_group]
            # Two tensors, which travel together.
            cut = leaves.shape[1] // 2
            values = reduction.over_replicas(
                [leaf[:cut], leaf[cut:]], ordered=ordered
            )
            return tf.concat(values, 0)

        return strategy.run(of_replica)

    results = strategy.experimental_local_results(run())
    return [result.numpy() for result in results]


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
def test_exchange_adds_in_the_tree(num_replicas: int) -> None:
    # 1,001 numbers cannot be cut equally for any of these.
    leaves = random_leaves(num_replicas, num_replicas, 1001)
    for got in exchange(num_replicas, np.stack(leaves), ordered=True):
        np.testing.assert_array_equal(got, tree_sum(leaves))


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_exchange_hides_nothing_that_is_not_finite(num_replicas: int) -> None:
    leaves = np.zeros((num_replicas, 11), np.float32)
    leaves[-1, 3], leaves[0, 10] = np.inf, np.nan
    for got in exchange(num_replicas, leaves, ordered=True):
        assert np.isinf(got[3])
        assert np.isnan(got[10])
        np.testing.assert_array_equal(np.delete(got, [3, 10]), 0)


# The step.


def build(
    config: Config, num_replicas: int, source: sources.Source
) -> tuple[gan_lib.GAN, tf.distribute.Strategy]:
    strategy = mirrored(num_replicas)
    gan = gan_lib.GAN(config, strategy, source.image_shape, source.num_classes)
    return gan, strategy


def train(
    config: Config, num_replicas: int, source: sources.Source, steps: int = 3
) -> gan_lib.GAN:
    gan, strategy = build(config, num_replicas, source)
    iterator = pipeline.make_iterator(
        sources.Data(source), config, strategy, 0, config.discriminator_steps
    )
    metrics, _ = Step(gan).run(iterator, tf.constant(steps))
    for column in metrics.values():
        assert np.isfinite(column).all()
    assert Comparison(strategy, gan.variables).differing() == []
    return gan


def digest(gan: gan_lib.GAN) -> str:
    state = hashlib.sha256()
    for variable in gan.variables:
        state.update(variable.numpy().tobytes())
    return state.hexdigest()


@pytest.mark.parametrize(
    ("changes", "replicas"),
    [
        ({"batch_norm": True}, (1, 4)),
        # Three leaves: no power of two, on as many replicas or on one.
        ({"micro_batches": 3, "batch_size": 6}, (1, 3)),
        (
            {
                "loss": "wgan_gp",
                "jit_compile": "on",
                "batch_norm": True,
                "conditional": True,
            },
            (1, 2),
        ),
        ({"precision": "mixed_float16", "micro_batches": 2}, (1, 2)),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_replicas(
    changes: dict, replicas: tuple[int, ...], digits: sources.Source
) -> None:
    config = dataclasses.replace(SMALL, **changes)
    keras.config.set_dtype_policy(config.precision)
    digests = {
        count: digest(train(config, count, digits)) for count in replicas
    }
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize(
    ("num_replicas", "expected"),
    [
        (2, {"CollectiveReduceV2": 2}),
        (4, {"CollectiveAllToAllV2": 2, "CollectiveGatherV2": 2}),
    ],
)
def test_collectives_in_a_step(
    num_replicas: int, expected: dict, digits: sources.Source
) -> None:
    """One exchange a phase; BatchNorm, which rides along, needs none."""
    config = dataclasses.replace(SMALL, batch_norm=True)
    gan, strategy = build(config, num_replicas, digits)
    iterator = pipeline.make_iterator(
        sources.Data(digits), config, strategy, 0, config.discriminator_steps
    )
    traced = Step(gan)._run.get_concrete_function(iterator, tf.constant(1))
    assert collectives(traced.graph, num_replicas) == expected


def test_sums_that_would_be_taken_apart_are_refused(
    digits: sources.Source,
) -> None:
    """Two parts at a time have nothing between them that would keep them so."""
    options = tf.config.optimizer
    options.set_experimental_options({"arithmetic_optimization": True})
    try:
        with pytest.raises(RuntimeError, match="order of its own"):
            train(SMALL, 1, digits, steps=1)
        train(dataclasses.replace(SMALL, reduction="fast"), 1, digits, steps=1)
    finally:
        options.set_experimental_options({"arithmetic_optimization": False})


@pytest.mark.parametrize("mode", ["ordered", "fast"])
def test_parts_at_once_in_a_step(
    mode: str,
    digits: sources.Source,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accumulate, seen = reduction.accumulate, []

    def spy(*arguments: Any, at_once: int, **named: Any) -> Any:
        seen.append(at_once)
        return accumulate(*arguments, at_once=at_once, **named)

    monkeypatch.setattr(reduction, "accumulate", spy)
    train(dataclasses.replace(SMALL, reduction=mode), 1, digits, steps=1)
    on_cpu = not tf.config.get_visible_devices("GPU")
    assert {*seen} == {2 if mode == "ordered" and on_cpu else 1}


def test_averages_move_once_a_phase_by_the_mean(digits: sources.Source) -> None:
    """The generator's, in both phases, as in fast mode on a whole batch."""
    config = dataclasses.replace(SMALL, batch_norm=True)
    gan, strategy = build(config, 2, digits)
    norms = [
        layer
        for layer in gan.networks.generator._flatten_layers()
        if isinstance(layer, batch_norm.BatchNorm)
    ]
    moved: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        move = batch_norm.BatchNorm.move

        def count(self: batch_norm.BatchNorm, *statistics: tf.Tensor) -> None:
            moved.append(self.name)
            move(self, *statistics)

        patch.setattr(batch_norm.BatchNorm, "move", count)
        iterator = pipeline.make_iterator(
            sources.Data(digits),
            config,
            strategy,
            0,
            config.discriminator_steps,
        )
        Step(gan).run(iterator, tf.constant(1))
    # Two phases, on two replicas.
    assert collections.Counter(moved) == {norm.name: 4 for norm in norms}


# What it refuses.


def make_with(make_layers: Callable[[], list[keras.layers.Layer]]) -> Any:
    """A user's model whose discriminator has some more layers."""

    def make(config: Config, image_shape: tuple, num_classes: int) -> tuple:
        del config, num_classes
        return (
            keras.Sequential(
                [
                    keras.Input([SMALL.latent_size]),
                    keras.layers.Dense(64),
                    keras.layers.Reshape(image_shape),
                ]
            ),
            keras.Sequential(
                [
                    keras.Input(image_shape),
                    keras.layers.Flatten(),
                    *make_layers(),
                    keras.layers.Dense(1),
                ]
            ),
        )

    return make


@pytest.mark.parametrize(
    ("make_layer", "remedy"),
    [
        (
            lambda: keras.layers.BatchNormalization(synchronized=True),
            r"is a BatchNormalization, .* use dtrain\.models\.batch_norm",
        ),
        (lambda: keras.layers.Dropout(0.5), "dropout.* use a layer without"),
        (
            lambda: keras.layers.SpectralNormalization(keras.layers.Dense(3)),
            "is a SpectralNormalization, .* use those of dtrain.models",
        ),
    ],
)
def test_other_state_is_refused(
    make_layer: Any, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_with(lambda: [make_layer()])
    monkeypatch.setattr(loading, "load", lambda _: model)
    with pytest.raises(UserError, match=remedy):
        gan_lib.GAN(SMALL, mirrored(1), IMAGE_SHAPE, 0)
    fast = dataclasses.replace(SMALL, reduction="fast")
    gan_lib.GAN(fast, mirrored(1), IMAGE_SHAPE, 0)


def test_a_users_own_layers_train_in_order(
    digits: sources.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discriminator's norms are called for real and for fake images."""
    model = make_with(
        lambda: [
            keras.layers.Dense(3, trainable=False),
            spectral_norm.SpectralDense(3),
            batch_norm.BatchNorm(),
        ]
    )
    monkeypatch.setattr(loading, "load", lambda _: model)
    moved = []
    iterate = spectral_norm.SpectralNorm.iterate

    def count(self: spectral_norm.SpectralNorm) -> None:
        moved.append(self)
        iterate(self)

    monkeypatch.setattr(spectral_norm.SpectralNorm, "iterate", count)
    digests = {digest(train(SMALL, count, digits, 2)) for count in (1, 2)}
    assert len(digests) == 1
    # In the phase of the discriminator alone, once on each replica.
    assert len(moved) == 1 + 2


def test_replicas_that_would_cut_the_tree_are_refused() -> None:
    config = dataclasses.replace(SMALL, micro_batches=12, batch_size=12)
    gan = gan_lib.GAN(config, mirrored(2), IMAGE_SHAPE, 0)
    with pytest.raises(UserError) as caught:
        Step(gan)
    assert "2 replicas cannot share 12 micro_batches" in str(caught.value)
    assert "use 1 or 3 or 6 or 12 replicas" in str(caught.value)


# The data, and fast mode, on replicas that change.


def numbered_images(path: pathlib.Path, count: int) -> sources.Source:
    """Images that say which they are."""
    images = np.zeros((count, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    np.savez(path, images=images)
    return sources.open_source(Config(dataset=f"npz:{path}"))


def test_each_image_once_an_epoch_over_changing_replicas(
    tmp_path: pathlib.Path,
) -> None:
    count, per_epoch = 64, 8
    source = numbered_images(tmp_path / "numbered.npz", count)
    orders = {}
    for name, replicas in {"changing": (1, 2, 4, 1), "four": (4,) * 4}.items():
        shown: list[int] = []
        for segment, num_replicas in enumerate(replicas):
            strategy = mirrored(num_replicas)
            # Changes within an epoch: twelve steps are one and a half.
            iterator = pipeline.make_iterator(
                sources.Data(source),
                SMALL,
                strategy,
                12 * segment,
                SMALL.discriminator_steps,
            )
            for _ in range(12):
                batch = next(iterator).images
                parts = strategy.experimental_local_results(batch)
                pixels = np.concatenate([part[:, 0, 0, 0] for part in parts])
                shown += np.rint((pixels + 1) * 127.5).astype(int).tolist()
        orders[name] = shown
    assert orders["changing"] == orders["four"]
    epochs = np.reshape(orders["four"], (-1, count))
    assert len(epochs) == 4 * 12 // per_epoch
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))


def test_fast_losses_agree_over_changing_replicas(
    digits: sources.Source, tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(SMALL, reduction="fast")
    losses = {}
    for name, replicas in {"changing": (1, 2, 4, 1), "four": (4,)}.items():
        parts: list[list[np.ndarray]] = []
        for segment, num_replicas in enumerate(replicas):
            gan, strategy = build(config, num_replicas, digits)
            if segment:
                gan.checkpoint.read(str(tmp_path / "ckpt")).assert_consumed()
            steps = 20 // len(replicas)
            iterator = pipeline.make_iterator(
                sources.Data(digits),
                config,
                strategy,
                segment * steps,
                config.discriminator_steps,
            )
            metrics, _ = Step(gan).run(iterator, tf.constant(steps))
            parts.append(
                [
                    metrics[f"{name}_loss"].numpy()
                    for name in ("generator", "discriminator")
                ]
            )
            gan.checkpoint.write(str(tmp_path / "ckpt"))
        losses[name] = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(losses["changing"], losses["four"], rtol=1e-3)
