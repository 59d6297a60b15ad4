from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain.models import batch_norm
from tests.replicas import mirrored

NUM_REPLICAS = 2
SHAPE = (8, 3, 3, 5)
MOMENTUM = 0.9
EPSILON = 1e-3


def _packed() -> keras.layers.Layer:
    return batch_norm.BatchNorm(momentum=MOMENTUM, epsilon=EPSILON)


def _keras_synchronized() -> keras.layers.Layer:
    return keras.layers.BatchNormalization(
        momentum=MOMENTUM, epsilon=EPSILON, synchronized=True
    )


def _default() -> tf.distribute.Strategy:
    return tf.distribute.get_strategy()


def _one_device() -> tf.distribute.Strategy:
    return tf.distribute.OneDeviceStrategy("CPU:0")


def _mirrored() -> tf.distribute.Strategy:
    return mirrored(NUM_REPLICAS)


class Pass(NamedTuple):
    outputs: np.ndarray
    input_gradients: np.ndarray
    weight_gradients: list[np.ndarray]
    moving: list[list[np.ndarray]]  # by variable, then by replica


def _inputs(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    spread = np.array([0.5, 1.0, 2.0, 3.0, 4.0])
    return (generator.normal(size=SHAPE) * spread + spread).astype(np.float32)


def _local(strategy: tf.distribute.Strategy, value: Any) -> list[Any]:
    return list(strategy.experimental_local_results(value))


def _make_pass(
    strategy: tf.distribute.Strategy, layer: keras.layers.Layer
) -> Callable[..., Any]:
    """Traces a forward and a backward pass over the global batch."""
    size = SHAPE[0] // strategy.num_replicas_in_sync

    def replica(inputs: tf.Tensor, factors: tf.Tensor) -> Any:
        context = tf.distribute.get_replica_context()
        start = size * context.replica_id_in_sync_group
        inputs = inputs[start : start + size]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
            # The cube makes the gradient depend on every example's output.
            loss = tf.reduce_sum(factors[start : start + size] * outputs**3)
        gradients = tape.gradient(
            loss, [inputs, *[w.value for w in layer.trainable_variables]]
        )
        return outputs, gradients[0], gradients[1:]

    @tf.function
    def run(inputs: tf.Tensor, factors: tf.Tensor) -> Any:
        return strategy.run(replica, (inputs, factors))

    return run


def _run_passes(
    make_strategy: Callable[[], tf.distribute.Strategy],
    make_layer: Callable[[], keras.layers.Layer],
) -> list[Pass]:
    strategy = make_strategy()
    with strategy.scope():
        layer = make_layer()
        layer.build((None, *SHAPE[1:]))
    run = _make_pass(strategy, layer)
    passes = []
    for seed in range(3):
        results = run(
            tf.constant(_inputs(seed)), tf.constant(_inputs(seed + 9))
        )
        outputs, input_gradients, weight_gradients = results
        passes.append(
            Pass(
                np.concatenate(_local(strategy, outputs)),
                np.concatenate(_local(strategy, input_gradients)),
                [sum(_local(strategy, g)) for g in weight_gradients],
                [
                    [np.asarray(v) for v in _local(strategy, weight.value)]
                    for weight in layer.non_trainable_variables
                ],
            )
        )
    return passes


def _assert_close(actual: list[Pass], expected: list[Pass]) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one.outputs, other.outputs, **tolerance)
        np.testing.assert_allclose(
            one.input_gradients, other.input_gradients, **tolerance
        )
        for a, b in zip(
            one.weight_gradients, other.weight_gradients, strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2)
        for a, b in zip(one.moving, other.moving, strict=True):
            np.testing.assert_allclose(a[0], b[0], **tolerance)


@pytest.fixture(scope="module")
def keras_on_the_whole_batch() -> list[Pass]:
    return _run_passes(_default, _keras_synchronized)


@pytest.mark.parametrize("make_strategy", [_default, _one_device, _mirrored])
def test_equals_keras_on_the_whole_batch(
    make_strategy: Callable[[], tf.distribute.Strategy],
    keras_on_the_whole_batch: list[Pass],
) -> None:
    passes = _run_passes(make_strategy, _packed)
    _assert_close(passes, keras_on_the_whole_batch)
    for one in passes:
        for replicas in one.moving:
            for value in replicas:
                np.testing.assert_array_equal(value, replicas[0])


def test_equals_keras_synchronized_on_two_replicas() -> None:
    _assert_close(
        _run_passes(_mirrored, _packed),
        _run_passes(_mirrored, _keras_synchronized),
    )


def _num_collectives(make_layer: Callable[[], keras.layers.Layer]) -> float:
    """Counts all-reduces of a forward and backward pass in the graph."""
    strategy = _mirrored()
    with strategy.scope():
        layer = make_layer()
        layer.build((None, *SHAPE[1:]))
    run = _make_pass(strategy, layer)
    graph = run.get_concrete_function(
        tf.constant(_inputs(0)), tf.constant(_inputs(1))
    ).graph.as_graph_def()
    ops = collections.Counter(node.op for node in graph.node)
    for function in graph.library.function:
        ops.update(node.op for node in function.node_def)
    return ops["CollectiveReduceV2"] / NUM_REPLICAS


def test_one_all_reduce_forward_and_one_backward() -> None:
    assert _num_collectives(_packed) == 2
    # Shows that the count sees them.
    assert _num_collectives(_keras_synchronized) > 2


def test_large_mean_does_not_drown_the_variance() -> None:
    # float32 holds 7 digits; the square of 10,000 takes 8.
    layer = batch_norm.BatchNorm(momentum=0.5)
    generator = np.random.default_rng(0)
    inputs = (generator.normal(size=(4096, 2)) + 1e4).astype(np.float32)
    for _ in range(20):
        outputs = layer(inputs, training=True)
    np.testing.assert_allclose(np.std(outputs, axis=0), 1.0, rtol=1e-3)
    np.testing.assert_allclose(np.mean(outputs, axis=0), 0.0, atol=1e-3)


def test_a_ghost_batch_is_alone_and_moves_nothing() -> None:
    strategy = _mirrored()
    with strategy.scope():
        layer = batch_norm.BatchNorm(momentum=0.5, epsilon=0.0)
        layer.build((None, 1))
    inputs = tf.constant([[0.0], [2.0], [10.0], [30.0]])

    @tf.function
    def run() -> Any:
        def of_replica() -> Any:
            context = tf.distribute.get_replica_context()
            start = 2 * context.replica_id_in_sync_group
            mine = inputs[start : start + 2]
            with batch_norm.ghost_batch() as passes:
                outputs = layer(mine, training=True)
                layer(-mine, training=True)
                layer(mine, training=False)
            assert [each for each, _ in passes] == [layer, layer]
            return outputs, [statistics for _, statistics in passes]

        return strategy.run(of_replica)

    outputs, passes = run()
    for replica in _local(strategy, outputs):
        np.testing.assert_allclose(replica, [[-1.0], [1.0]], rtol=1e-5)
    for (first, second), mean, variance in zip(
        zip(*(_local(strategy, value) for value in passes), strict=True),
        (1.0, 20.0),
        (1.0, 100.0),
        strict=True,
    ):
        np.testing.assert_allclose(first, [[mean], [variance]], rtol=1e-5)
        np.testing.assert_allclose(second, [[-mean], [variance]], rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean, [0.0])
    layer.move(tf.constant([4.0]), tf.constant([3.0]))
    np.testing.assert_array_equal(layer.moving_mean, [2.0])
    np.testing.assert_array_equal(layer.moving_variance, [2.0])
    with pytest.raises(ZeroDivisionError), batch_norm.ghost_batch():
        raise ZeroDivisionError
    layer(inputs, training=True)
    assert layer.moving_mean.numpy() != [2.0]


def test_outside_training_the_moving_statistics_normalize() -> None:
    strategy = _mirrored()
    with strategy.scope():
        layer = batch_norm.BatchNorm(epsilon=0.0)
        layer.build((None, 2))
        layer.gamma.assign([2.0, 1.0])
        layer.beta.assign([0.0, 5.0])
        layer.moving_mean.assign([1.0, 10.0])
        layer.moving_variance.assign([4.0, 25.0])
        # (3 - 1) / 2 * 2 + 0 and (20 - 10) / 5 * 1 + 5
        np.testing.assert_allclose(layer(tf.constant([[3.0, 20.0]])), [[2, 7]])
        np.testing.assert_array_equal(layer.moving_mean, [1.0, 10.0])


def test_half_precision_has_float32_statistics() -> None:
    layer = batch_norm.BatchNorm(dtype="mixed_float16", epsilon=0.0)
    # 300^2 is beyond the 65,504 of float16.
    outputs = layer(tf.constant([[-300.0], [300.0]], tf.float16), training=True)
    assert outputs.dtype == tf.float16
    np.testing.assert_allclose(outputs, [[-1.0], [1.0]], rtol=1e-3)
    assert {variable.dtype for variable in layer.variables} == {"float32"}
    # 0.9 * 1 + 0.1 * 90,000
    np.testing.assert_allclose(layer.moving_variance, [9000.9], rtol=1e-5)


def test_survives_saving_by_keras(tmp_path: pathlib.Path) -> None:
    model = keras.Sequential(
        [
            keras.Input((4,)),
            batch_norm.BatchNorm(momentum=0.7, epsilon=0.1, name="norm"),
        ]
    )
    model(tf.random.stateless_normal([16, 4], [1, 2]) * 3, training=True)
    path = tmp_path / "model.keras"
    model.save(path)
    read = keras.models.load_model(path)
    layer = read.get_layer("norm")
    assert (layer.momentum, layer.epsilon) == (0.7, 0.1)
    inputs = tf.random.stateless_normal([3, 4], [3, 4])
    np.testing.assert_array_equal(read(inputs), model(inputs))
