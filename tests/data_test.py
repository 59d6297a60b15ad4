"""Order, parts and batches of the input."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import pathlib
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.data.sources import arrays, memory, values
from dtrain.errors import UserError
from tests import runs

HUGE_STEP = 10_000_000
SEED_OF_OTHER = 11702657396399700921


def make_source(num_images: int = 37) -> sources.Source:
    """Every image is filled with its own index, and so is its label."""
    index = np.arange(num_images)
    images = np.broadcast_to(
        index.astype(np.uint8)[:, None, None, None], (num_images, 2, 2, 1)
    )
    config = Config(dataset="test")
    return arrays.ArraySource(config, images, index.astype(np.int32))


@functools.cache
def make_data(num_images: int = 37, num_others: int = 23) -> sources.Data:
    """All that stands beside an image says its index, too."""
    index = np.arange(num_images)
    maps = np.broadcast_to(
        (1000 * index).astype(np.uint16)[:, None, None, None],
        (num_images, 3, 4, 1),
    )
    return sources.Data(
        make_source(num_images),
        {
            "twin": memory.load(make_source(num_images)),
            "map": arrays.ArraySource(Config(), maps, None, is_map=True),
            "number": values.ValueSource("test", index.astype(np.int32)),
        },
        {"other": make_source(num_others)},
    )


def read(
    source: sources.Source | sources.Data,
    config: Config,
    step: int,
    num_draws: int,
    strategy: tf.distribute.Strategy | None = None,
) -> list[pipeline.Batch]:
    """Reads draws, the slices of all replicas put together."""
    strategy = strategy or tf.distribute.get_strategy()
    data = source if isinstance(source, sources.Data) else sources.Data(source)
    iterator = pipeline.make_iterator(
        data, config, strategy, step, config.discriminator_steps
    )

    def put_together(value: Any) -> np.ndarray:
        return np.concatenate(strategy.experimental_local_results(value))

    return [
        tf.nest.map_structure(put_together, next(iterator))
        for _ in range(num_draws)
    ]


def assert_equal(
    left: list[pipeline.Batch], right: list[pipeline.Batch]
) -> None:
    assert len(left) == len(right)
    tf.nest.assert_same_structure(left, right)
    pairs = zip(tf.nest.flatten(left), tf.nest.flatten(right), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


@given(
    replica_batch_size=st.integers(1, 9),
    num_workers=st.integers(1, 5),
    local_replicas=st.integers(1, 5),
    first_draw=st.integers(0, 10**9),
    num_draws=st.integers(1, 4),
)
def test_parts_make_up_the_global_batch(
    replica_batch_size: int,
    num_workers: int,
    local_replicas: int,
    first_draw: int,
    num_draws: int,
) -> None:
    num_replicas = num_workers * local_replicas
    batch_size = num_replicas * replica_batch_size
    seen = collections.Counter()
    for worker in range(num_workers):
        part = pipeline.Part(batch_size, num_replicas, num_workers, worker)
        for draw in range(first_draw, first_draw + num_draws):
            for local in range(local_replicas):
                start = part.first_position(draw * local_replicas + local)
                # Replica r of a draw has the r-th slice, whoever hosts it.
                replica = worker * local_replicas + local
                assert start == (
                    draw * batch_size + replica * replica_batch_size
                )
                seen.update(range(start, start + replica_batch_size))
    wanted = range(
        first_draw * batch_size, (first_draw + num_draws) * batch_size
    )
    assert seen == collections.Counter(wanted)


@given(
    num_images=st.integers(1, 300),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 10**12),
)
def test_every_epoch_is_a_permutation(
    num_images: int, seed: int, epoch: int
) -> None:
    start = epoch * num_images
    positions = tf.range(start, start + num_images, dtype=tf.int64)
    indices = pipeline.sample_indices(positions, seed, num_images)
    assert indices.dtype == tf.int64
    assert sorted(indices.numpy().tolist()) == list(range(num_images))


@given(
    start=st.integers(0, 10**15),
    num_images=st.integers(1, 10**7),
    cut=st.integers(1, 63),
)
def test_an_index_does_not_depend_on_its_batch(
    start: int, num_images: int, cut: int
) -> None:
    positions = tf.range(start, start + 64, dtype=tf.int64)
    whole = pipeline.sample_indices(positions, 3, num_images)
    parts = [
        pipeline.sample_indices(part, 3, num_images)
        for part in (positions[:cut], positions[cut:])
    ]
    np.testing.assert_array_equal(whole, tf.concat(parts, 0))


def test_seeds_and_epochs_differ() -> None:
    positions = tf.range(1000, dtype=tf.int64)
    orders = [
        pipeline.sample_indices(positions + 1000 * epoch, seed, 1000).numpy()
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len({order.tobytes() for order in orders}) == 9


@pytest.mark.parametrize("num_images", [1797, 60_000])
def test_orders_look_independent(num_images: int) -> None:
    # Each |z| is below 5 unless something is wrong; with the op's 4 rounds and
    # a plain seed it is above 100.
    positions = tf.range(10 * num_images, dtype=tf.int64)
    indices = pipeline.sample_indices(positions, 0, num_images).numpy()
    epochs = indices.reshape(10, num_images).astype(np.float64)
    root = np.sqrt(num_images)
    between = np.corrcoef(epochs) - np.eye(10)
    assert np.abs(between).max() * root < 5
    for lag in (1, 2, 8, 64):
        for order in epochs:
            within = np.corrcoef(order[:-lag], order[lag:])[0, 1]
            assert abs(within) * root < 5


def test_mix_is_splitmix64() -> None:
    # The first two outputs of the published generator from state 0.
    gamma = pipeline._uint64(pipeline._GOLDEN_GAMMA)
    mixed = pipeline._mix(tf.stack([gamma, gamma + gamma])).numpy()
    assert [hex(value) for value in mixed] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
    ]


def test_order_stays_what_it_is() -> None:
    # A run that is resumed by a newer dtrain must see the same images.
    positions = tf.constant([0, 1, 1796, 1797, 10**12], tf.int64)
    indices = pipeline.sample_indices(positions, 0, 1797)
    assert indices.numpy().tolist() == [818, 502, 672, 1390, 1411]


def test_a_batch_is_what_its_positions_say() -> None:
    source = make_source()
    [batch] = read(source, Config(batch_size=8), 5, 1)
    np.testing.assert_array_equal(batch.positions, np.arange(40, 48))
    indices = pipeline.sample_indices(tf.constant(batch.positions), 0, 37)
    np.testing.assert_array_equal(batch.labels, indices)
    assert batch.labels.dtype == np.int32
    assert batch.images.dtype == np.float32
    assert batch.images.shape == (8, 2, 2, 1)
    np.testing.assert_array_equal(
        batch.images[:, 0, 0, 0], np.float32(indices) / np.float32(127.5) - 1
    )


def test_images_span_minus_one_to_one() -> None:
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    source = arrays.ArraySource(Config(), images, None)
    [batch] = read(source, Config(batch_size=2), 0, 1)
    assert sorted(batch.images.ravel()) == [-1, 1]
    assert batch.labels.tolist() == [0, 0]


@settings(max_examples=10)
@given(
    batch_size=st.integers(1, 16),
    first=st.integers(0, 6),
    jump=st.integers(0, 6),
    discriminator_steps=st.integers(1, 3),
    base=st.sampled_from((0, HUGE_STEP)),
)
def test_a_step_is_the_same_reached_or_jumped_to(
    batch_size: int,
    first: int,
    jump: int,
    discriminator_steps: int,
    base: int,
) -> None:
    source = make_data()
    config = Config(
        batch_size=batch_size, discriminator_steps=discriminator_steps
    )
    first += base
    reached = read(source, config, first, (jump + 1) * discriminator_steps)
    jumped = read(source, config, first + jump, discriminator_steps)
    assert_equal(reached[-discriminator_steps:], jumped)
    start = (first + jump) * discriminator_steps * batch_size
    assert jumped[0].positions[0] == start


@settings(max_examples=5)
@given(
    replica_batch_size=st.integers(1, 4),
    num_workers=st.integers(1, 2),
    local_replicas=st.integers(1, 3),
    first_draw=st.integers(0, 10**9),
)
def test_what_is_paired_stays_paired(
    replica_batch_size: int,
    num_workers: int,
    local_replicas: int,
    first_draw: int,
) -> None:
    data, num_replicas = make_data(), num_workers * local_replicas
    size = replica_batch_size * num_replicas
    for worker in range(num_workers):
        part = pipeline.Part(size, num_replicas, num_workers, worker)
        dataset = pipeline.make_dataset_of_part(
            data, Config(), part, first_draw
        )
        for batch in dataset.take(2 * local_replicas).as_numpy_iterator():
            index, inputs = batch.labels, batch.inputs
            np.testing.assert_array_equal(inputs["number"], index)
            np.testing.assert_array_equal(inputs["twin"], batch.images)
            assert inputs["map"].dtype == np.int32
            of_map = np.broadcast_to(index[:, None, None], (len(index), 3, 4))
            np.testing.assert_array_equal(inputs["map"], 1000 * of_map)
            own = pipeline.sample_indices(
                tf.constant(batch.positions), pipeline.seed_of(0, "other"), 23
            )
            np.testing.assert_array_equal(inputs["other_labels"], own)


def test_what_is_not_paired_has_epochs_of_its_own() -> None:
    draws = read(make_data(), Config(batch_size=10), 0, 23)
    shown = np.concatenate([draw.inputs["other_labels"] for draw in draws])
    images = np.concatenate([draw.inputs["other"] for draw in draws])
    np.testing.assert_array_equal(
        images[:, 0, 0, 0], np.float32(shown) / np.float32(127.5) - 1
    )
    epochs = shown.reshape(10, 23)
    assert (np.sort(epochs) == np.arange(23)).all()
    assert len({epoch.tobytes() for epoch in epochs}) == 10
    # Nor is it the order of a set of this length, or of another name.
    data = make_data(23, 23)
    data = data._replace(unpaired={**data.unpaired, "more": make_source(23)})
    [draw] = read(data, Config(batch_size=23), 0, 1)
    orders = (draw.labels, draw.inputs["other_labels"])
    assert len({each.tobytes() for each in orders}) == 2
    assert draw.inputs["more_labels"].tobytes() != orders[1].tobytes()


def test_orders_of_other_sets_stay_what_they_are() -> None:
    # A run that is resumed by a newer dtrain must see the same examples.
    assert pipeline.seed_of(0, "other") == SEED_OF_OTHER


def make_halves() -> sources.Source:
    """Images that are black at the left."""
    images = np.zeros((37, 2, 2, 1), np.uint8)
    images[:, :, 1] = np.arange(1, 38)[:, np.newaxis, np.newaxis]
    return arrays.ArraySource(Config(), images, None)


def test_mirror_follows_from_seed_and_position() -> None:
    source = make_halves()
    config = Config(batch_size=37, mirror=True)
    draws = read(source, config, 0, 60)
    plain = read(source, Config(batch_size=37), 0, 60)
    is_mirrored = []
    for draw, original in zip(draws, plain, strict=True):
        flipped = original.images[:, :, ::-1]
        turned = draw.images[:, 0, 0, 0] > -1
        wanted = np.where(turned[:, None, None, None], flipped, original.images)
        np.testing.assert_array_equal(draw.images, wanted)
        positions = tf.constant(draw.positions)
        np.testing.assert_array_equal(pipeline.mirrored(positions, 0), turned)
        is_mirrored.append(turned)
    # Each image both ways, half of the time, by no rule of the position.
    of_images = np.concatenate(is_mirrored)
    assert abs(of_images.mean() - 0.5) < 5 * 0.5 / np.sqrt(of_images.size)
    for lag in (1, 2, 37):
        same = (of_images[lag:] == of_images[:-lag]).mean()
        assert abs(same - 0.5) < 5 * 0.5 / np.sqrt(of_images.size)
    other = pipeline.mirrored(tf.range(2220, dtype=tf.int64), 1).numpy()
    assert 0.4 < (other == of_images).mean() < 0.6


def test_a_pair_is_mirrored_together() -> None:
    maps = np.zeros((37, 2, 4, 1), np.uint16)
    maps[:, :, 3] = 7
    data = sources.Data(
        make_halves(),
        {
            "twin": make_halves(),
            "map": arrays.ArraySource(Config(), maps, None, is_map=True),
        },
        {"other": make_halves()},
    )
    draws = read(data, Config(batch_size=37, mirror=True), 0, 5)
    both = [
        (draw.images[:, 0, 0, 0] > -1, draw.inputs["other"][:, 0, 0, 0] > -1)
        for draw in draws
    ]
    for draw, (turned, _) in zip(draws, both, strict=True):
        np.testing.assert_array_equal(draw.inputs["twin"], draw.images)
        row = draw.inputs["map"][:, 0]
        assert (row[turned] == [7, 0, 0, 0]).all()
        assert (row[~turned] == [0, 0, 0, 7]).all()
    same = np.mean([one == other for one, other in both])
    assert 0.3 < same < 0.7


def test_mirrors_stay_where_they_are() -> None:
    # A run that is resumed by a newer dtrain must see the same images.
    positions = tf.constant([0, 1, 2, 3, 4, 5, 6, 7, 10**12], tf.int64)
    mirrored = pipeline.mirrored(positions, 0).numpy().astype(int)
    assert mirrored.tolist() == [1, 0, 1, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("in_memory", [True, False])
def test_replicas_share_the_batch(num_replicas: int, in_memory: bool) -> None:
    source = make_halves()
    if in_memory:
        source = memory.load(source)
    data = sources.Data(source)
    if num_replicas == 2 and not in_memory:
        data = make_data()._replace(source=source)
    config = Config(batch_size=8, mirror=True)
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{index}" for index in range(num_replicas)]
    )
    for step in (0, 3, HUGE_STEP):
        alone = read(data, config, step, 3)
        assert_equal(read(data, config, step, 3, strategy), alone)


def test_replica_sees_its_slice_inside_strategy_run() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    iterator = pipeline.make_iterator(
        sources.Data(make_source()), Config(batch_size=8), strategy, 1, 1
    )

    @tf.function
    def replica_positions() -> tf.Tensor:
        return strategy.run(lambda batch: batch.positions, (next(iterator),))

    first, second = strategy.experimental_local_results(replica_positions())
    assert first.numpy().tolist() == [8, 9, 10, 11]
    assert second.numpy().tolist() == [12, 13, 14, 15]


def test_one_device_strategy() -> None:
    config = Config(batch_size=4)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    assert_equal(
        read(make_source(), config, 2, 2, strategy),
        read(make_source(), config, 2, 2),
    )


def test_workers_share_the_batch() -> None:
    source = make_source()
    draws = []
    for worker in range(2):
        part = pipeline.Part(8, 4, 2, worker)
        dataset = pipeline.make_dataset_of_part(
            sources.Data(source), Config(), part, 5
        )
        draws.append(list(dataset.take(6).as_numpy_iterator()))
    # Two elements a draw: one for each of a worker's replicas.
    positions = [
        np.concatenate(
            [batch.positions for worker in draws for batch in worker[i : i + 2]]
        )
        for i in (0, 2, 4)
    ]
    np.testing.assert_array_equal(np.concatenate(positions), np.arange(40, 64))


@pytest.mark.parametrize("batch_size", [4, 2**20])
def test_the_input_has_no_end(batch_size: int) -> None:
    """Made many at once or one by one: or workers see batches of any size."""
    dataset = pipeline.make_dataset_of_part(
        sources.Data(make_source()),
        Config(),
        pipeline.Part(batch_size, 2, 2, 1),
        5,
    )
    assert dataset.cardinality().numpy() == tf.data.INFINITE_CARDINALITY
    for spec in tf.nest.flatten(dataset.element_spec):
        assert spec.shape[0] == batch_size // 2


@pytest.mark.parametrize(
    ("batch_size", "num_replicas", "line"),
    [
        (
            30,
            4,
            "batch_size (30) must be a multiple of the 4 replicas; "
            "try 28 or 32",
        ),
        (1, 4, "batch_size (1) must be a multiple of the 4 replicas; try 4"),
    ],
)
def test_batch_size_must_be_a_multiple(
    batch_size: int, num_replicas: int, line: str
) -> None:
    with pytest.raises(UserError) as raised:
        strategy_lib.check_batch_size(batch_size, num_replicas)
    assert str(raised.value) == line


TWO_WORKERS = """
import sys
import numpy as np
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
from dtrain import config
from dtrain.data import pipeline, sources
settings = config.Config(dataset=sys.argv[1], batch_size=8, cache_gib=0.0)
source = sources.open_source(settings)
iterator = pipeline.make_iterator(
    sources.Data(source), settings, strategy, 3, draws_per_step=1
)
for _ in range(2):
    batch = next(iterator)
    [positions] = strategy.experimental_local_results(batch.positions)
    [labels] = strategy.experimental_local_results(batch.labels)
    print(*positions.numpy(), *labels.numpy(), flush=True)
"""


def test_two_processes_share_the_batch(tmp_path: pathlib.Path) -> None:
    labels = np.arange(37)
    images = np.zeros((37, 2, 2), np.uint8)
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_WORKERS, f"npz:{tmp_path}/a.npz"],
            env=runs.environment(
                TF_CONFIG=json.dumps(
                    {
                        "cluster": {"worker": addresses},
                        "task": {"type": "worker", "index": index},
                    }
                )
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for draw in (3, 4):
        lines = [output.splitlines()[draw - 3].split() for output in outputs]
        positions = [int(word) for line in lines for word in line[:4]]
        shown = [int(word) for line in lines for word in line[4:]]
        assert positions == list(range(8 * draw, 8 * draw + 8))
        indices = pipeline.sample_indices(
            tf.constant(positions, tf.int64), 0, 37
        )
        assert shown == indices.numpy().tolist()


def test_make_iterator_checks_the_batch_size() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with pytest.raises(UserError, match="multiple of the 2 replicas"):
        pipeline.make_iterator(
            sources.Data(make_source()), Config(batch_size=3), strategy, 0, 1
        )


def test_explain_names_the_file(tmp_path: pathlib.Path) -> None:
    png = tf.io.encode_png(np.zeros((4, 4, 1), np.uint8)).numpy()
    for index in range(10):
        (tmp_path / f"{index}.png").write_bytes(png)
    bad = tmp_path / "7.png"
    bad.write_bytes(png[: len(png) // 2])
    config = Config(dataset=f"folder:{tmp_path}", cache_gib=0.0, batch_size=2)
    source = sources.open_source(config)
    with pytest.raises(tf.errors.OpError) as raised:
        read(source, config, 100, 6)
    data = sources.Data(source)
    fault = pipeline.explain(raised.value, data, config, 100, 1)
    assert str(bad) in str(fault)
    assert "\n" not in str(fault)


def test_what_stands_beside_is_named_too(tmp_path: pathlib.Path) -> None:
    png = tf.io.encode_png(np.zeros((4, 4, 1), np.uint8)).numpy()
    for index in range(10):
        (tmp_path / f"{index}.png").write_bytes(png)
    bad = tmp_path / "7.png"
    bad.write_bytes(png[: len(png) // 2])
    config = Config(
        cache_gib=1e-9,
        batch_size=2,
        unpaired=(f"mask=folder:{tmp_path}",),
    )
    data = sources.open_data(config)
    with pytest.raises(tf.errors.OpError) as raised:
        read(data, config, 100, 6)
    fault = pipeline.explain(raised.value, data, config, 100, 1)
    assert str(bad) in str(fault)
    assert "\n" not in str(fault)


def test_explain_leaves_other_errors_alone() -> None:
    data = sources.Data(make_source())
    error = tf.errors.InvalidArgumentError(None, None, "a model's mistake")
    config = Config(steps_per_loop=2)
    assert pipeline.explain(error, data, config, 0, 1) is None
    assert pipeline.explain(ValueError(), data, config, 0, 1) is None
