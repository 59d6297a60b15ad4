"""Programs that know nothing of dtrain, and what they save.

    python -m tests.foreign sequential DIR

Each makes its objects, trains for three steps, and writes DIR/ckpt-3 as
TensorFlow's guide says. Half of them use `Checkpoint.write`, and the other
half a `CheckpointManager`, which counts saves. `multi_worker` has as many
workers as TF_CONFIG says, and the first writes to DIR.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import runs

NUM_STEPS = 3
SEED = 3
GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
layers = keras.layers


def _step() -> tf.Variable:
    return tf.Variable(0, dtype=tf.int64)


def _adam(*networks: keras.Model) -> keras.Optimizer:
    optimizer = keras.optimizers.Adam(1e-2)
    optimizer.build([w for each in networks for w in each.trainable_variables])
    return optimizer


def _learn(
    optimizer: keras.Optimizer, network: Callable, weights: list, step: int
) -> None:
    data = np.random.default_rng(step).normal(size=(4, 3)).astype("float32")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(tf.cast(network(data), tf.float32)))
        # Or what LossScaleOptimizer divides by was never there.
        loss = optimizer.scale_loss(loss)
    optimizer.apply(tape.gradient(loss, weights), weights)


class Program:
    """A state, and how it is trained."""

    def __init__(
        self,
        checkpoint: tf.train.Checkpoint,
        train: Callable[[int], None],
        options: tf.train.CheckpointOptions | None = None,
        grow: Callable[[], None] = lambda: None,
    ) -> None:
        self.checkpoint = checkpoint
        self._train = train
        self._options = options
        self.grow = grow

    def train(self) -> None:
        for number in range(1, NUM_STEPS + 1):
            if number == NUM_STEPS:
                with tempfile.TemporaryDirectory() as directory:
                    self.checkpoint.write(f"{directory}/first")
                self.grow()
            self._train(number)
            if hasattr(self.checkpoint, "step"):
                self.checkpoint.step.assign_add(1)

    def write(self, directory: str, *, is_managed: bool) -> str:
        if not is_managed:
            return self.checkpoint.write(
                f"{directory}/ckpt-{NUM_STEPS}", self._options
            )
        manager = tf.train.CheckpointManager(
            self.checkpoint, directory, max_to_keep=2
        )
        return manager.save(checkpoint_number=NUM_STEPS, options=self._options)


def _single(network: keras.Model) -> Program:
    optimizer = _adam(network)
    state = tf.train.Checkpoint(
        model=network, optimizer=optimizer, step=_step()
    )
    return Program(
        state,
        lambda step: _learn(
            optimizer,
            # Without it the statistics of BatchNormalization stay as made.
            functools.partial(network, training=True),
            network.trainable_variables,
            step,
        ),
    )


def sequential() -> Program:
    return _single(
        keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(4, activation="relu", name="hidden"),
                layers.BatchNormalization(name="norm"),
                layers.Dense(1, name="out"),
            ]
        )
    )


def functional() -> Program:
    inputs = keras.Input((3,))
    left = layers.Dense(2, name="left")(inputs)
    right = layers.Dense(2, name="right")(inputs)
    outputs = layers.Dense(1, name="head")(layers.Add()([left, right]))
    return _single(keras.Model(inputs, outputs))


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="subclassed")
        self.encoder = layers.Dense(4, name="encoder")
        self.decoder = layers.Dense(1, name="decoder")
        self.gain = self.add_weight(shape=(), name="gain")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.gain * self.decoder(self.encoder(inputs))


def subclassed() -> Program:
    network = Subclassed()
    network(tf.zeros([1, 3]))
    return _single(network)


def _networks() -> tuple[keras.Model, keras.Model]:
    generator = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3, name="make")], name="generator"
    )
    discriminator = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(5, name="look"),
            layers.Dense(1, name="judge"),
        ],
        name="discriminator",
    )
    return generator, discriminator


def two_and_one() -> Program:
    generator, discriminator = _networks()
    optimizer = _adam(generator, discriminator)
    weights = [*generator.trainable_variables]
    weights += discriminator.trainable_variables
    return Program(
        tf.train.Checkpoint(g=generator, d=discriminator, optimizer=optimizer),
        lambda step: _learn(
            optimizer, lambda x: discriminator(generator(x)), weights, step
        ),
    )


def two_and_two() -> Program:
    generator, discriminator = _networks()
    of_g, of_d = _adam(generator), keras.optimizers.SGD(1e-2, momentum=0.9)
    of_d.build(discriminator.trainable_variables)

    def train(step: int) -> None:
        _learn(
            of_g,
            lambda x: discriminator(generator(x)),
            generator.trainable_variables,
            step,
        )
        _learn(of_d, discriminator, discriminator.trainable_variables, step)
        for average, weight in zip(
            ema, generator.trainable_variables, strict=True
        ):
            average.assign(0.5 * average + 0.5 * weight)

    ema = [tf.Variable(each) for each in generator.trainable_variables]
    return Program(
        tf.train.Checkpoint(
            generator=generator,
            discriminator=discriminator,
            generator_optimizer=of_g,
            discriminator_optimizer=of_d,
            ema=ema,
            step=_step(),
        ),
        train,
    )


def raw_variables() -> Program:
    small = ("bfloat16", "float16", "float64", "uint8", "float8_e4m3fn")
    held = {name: tf.Variable(tf.cast([0.5, 2.0], name)) for name in small}
    values = [
        *(tf.Variable(1.5), tf.Variable([1, 2], dtype=tf.int64)),
        *(tf.Variable([True, False]), tf.Variable([b"text", b"", b"\x00\xff"])),
        tf.Variable(tf.complex(1.0, 2.0)),
    ]
    scale = tf.Variable(3.0)

    def train(_: int) -> None:
        for each in (values[0], values[-1], scale):
            each.assign_add(tf.ones_like(each))
        for each in (*values[1:3], *held.values()):
            each.assign(each.numpy()[::-1])

    return Program(
        tf.train.Checkpoint(
            values=values,
            held=held,
            empty=tf.Variable(tf.zeros([0, 3])),
            scale=scale,
        ),
        train,
    )


class Affine(tf.Module):
    def __init__(self, size: int, name: str) -> None:
        super().__init__(name=name)
        self.w = tf.Variable(tf.random.stateless_normal([3, size], [1, 2]))
        self.b = tf.Variable(tf.zeros([size]))


class Tower(tf.Module):
    def __init__(self) -> None:
        super().__init__(name="tower")
        self.floors = [Affine(3, "one"), Affine(2, "two")]
        self.named = {"roof": Affine(1, "roof")}


def module() -> Program:
    tower = Tower()

    def train(step: int) -> None:
        for each in tower.trainable_variables:
            each.assign_add(step * tf.ones_like(each))

    return Program(tf.train.Checkpoint(tower=tower, step=_step()), train)


class Noisy(layers.Layer):
    def __init__(self, size: int, **options: object) -> None:
        super().__init__(**options)
        self.size = size
        self.seeds = keras.random.SeedGenerator(7)

    def build(self, shape: tuple[int, ...]) -> None:
        self.mixing = self.add_weight(shape=(shape[-1], self.size), name="mix")
        self.count = self.add_weight(
            shape=(), trainable=False, initializer="zeros", name="count"
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        self.count.assign_add(1.0)
        mixed = inputs @ self.mixing
        return mixed + 0.01 * keras.random.normal((self.size,), seed=self.seeds)


def custom_layer() -> Program:
    inputs = keras.Input((3,))
    outputs = layers.Dense(1, name="out")(Noisy(4, name="noisy")(inputs))
    return _single(keras.Model(inputs, outputs))


def nested() -> Program:
    inner = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3, name="shared")], name="inner"
    )
    inputs = keras.Input((3,))
    outputs = layers.Dense(1, name="out")(inner(inner(inputs)))
    return _single(keras.Model(inputs, outputs, name="outer"))


def mixed_precision() -> Program:
    network = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, name="hidden", dtype="mixed_float16"),
            layers.Dense(1, name="out", dtype="float32"),
        ]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2))
    optimizer.build(network.trainable_variables)
    return Program(
        tf.train.Checkpoint(model=network, optimizer=optimizer),
        lambda step: _learn(
            optimizer, network, network.trainable_variables, step
        ),
    )


def no_slots() -> Program:
    network = keras.Sequential(
        [keras.Input((3,)), layers.Dense(2, name="dense")]
    )
    optimizer = keras.optimizers.SGD(1e-2)
    optimizer.build(network.trainable_variables)
    return Program(
        tf.train.Checkpoint(model=network, optimizer=optimizer),
        lambda step: _learn(
            optimizer, network, network.trainable_variables, step
        ),
    )


def rooted() -> Program:
    """The model itself is the root, as in `tf.train.Checkpoint(model)`."""
    network = Subclassed()
    network(tf.zeros([1, 3]))
    optimizer = _adam(network)
    return Program(
        tf.train.Checkpoint(network),
        lambda step: _learn(
            optimizer, network, network.trainable_variables, step
        ),
    )


def grown() -> Program:
    """It has more after its first save, as a GAN that grows."""
    blocks = [tf.Variable([1.0, 2.0])]
    state = tf.train.Checkpoint(blocks=blocks)

    def grow() -> None:
        state.blocks.append(tf.Variable(tf.ones([2, 2])))
        state.head = tf.Variable([3.0])

    def train(step: int) -> None:
        for each in (*state.blocks, getattr(state, "head", None)):
            if each is not None:
                each.assign_add(step * tf.ones_like(each))

    return Program(state, train, grow=grow)


def sharded() -> Program:
    """A large model, whose values are in several files."""
    program = _single(
        keras.Sequential(
            [keras.Input((3,)), layers.Dense(9, name="a"), layers.Dense(1)]
        )
    )
    policy = tf.train.experimental.MaxShardSizePolicy(max_shard_size=100)
    return Program(
        program.checkpoint,
        program._train,
        tf.train.CheckpointOptions(experimental_sharding_callback=policy),
    )


def multi_worker(strategy: tf.distribute.Strategy | None = None) -> Program:
    """Its checkpoint is as any other, and one process alone can load it."""
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        network = keras.Sequential(
            [keras.Input((3,)), layers.Dense(2, name="dense")]
        )
        program = _single(network)
    optimizer = program.checkpoint.optimizer

    @tf.function
    def train(step: tf.Tensor) -> None:
        def replica() -> None:
            data = tf.ones([2, 3]) * step
            weights = network.trainable_variables
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(network(data)))
            optimizer.apply(tape.gradient(loss, weights), weights)

        strategy.run(replica)

    return Program(
        program.checkpoint, lambda step: train(tf.constant(step, tf.float32))
    )


_MAKERS: tuple[Callable[[], Program], ...] = (
    *(sequential, functional, subclassed, two_and_one, two_and_two),
    *(raw_variables, module, custom_layer, nested, mixed_precision),
    *(no_slots, rooted, grown, sharded),
    multi_worker,
)
PROGRAMS = tuple(maker.__name__ for maker in _MAKERS)
# These count their saves.
MANAGED = PROGRAMS[::2]


def make(name: str) -> Program:
    """Makes the objects of a program; the first weights are always the same."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(SEED)
    return _MAKERS[PROGRAMS.index(name)]()


def fresh(name: str) -> Program:
    """Makes them with all that they have at the end of their training."""
    program = make(name)
    program.grow()
    return program


def write(name: str, directory: str) -> str:
    """Makes and trains a program; returns the prefix of what it writes."""
    program = make(name)
    program.train()
    return program.write(directory, is_managed=name in MANAGED)


def loaded(name: str, prefix: str) -> dict[str, np.ndarray]:
    """Loads a checkpoint with stock TensorFlow.

    Returns:
        What the program holds then, by the keys that it saves it under.
    """
    state = fresh(name).checkpoint
    # What `write` wrote has no counter of saves, which `restore` asks for.
    is_managed = any(
        key.startswith("save_counter/")
        for key, _ in tf.train.list_variables(prefix)
    )
    load = state.restore if is_managed else state.read
    load(prefix).assert_consumed()
    with tempfile.TemporaryDirectory() as directory:
        return saved(state.write(f"{directory}/ckpt"))


def saved(prefix: str) -> dict[str, np.ndarray]:
    """Returns all tensors of a checkpoint by their keys, but for the graph."""
    reader = tf.train.load_checkpoint(prefix)
    return {
        key: np.asarray(reader.get_tensor(key))
        for key, _ in tf.train.list_variables(prefix)
        if key != GRAPH_KEY
    }


def keys(prefix: str) -> list[str]:
    """Lists the keys of a checkpoint."""
    return [key for key, _ in tf.train.list_variables(prefix)]


def corpus(factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns what `write_all` wrote, once for all tests of the process."""
    return write_all(factory.getbasetemp() / "foreign")


@functools.cache
def write_all(directory: pathlib.Path) -> dict[str, str]:
    """Writes what all programs save; returns the prefixes by their names."""
    *alone, together = PROGRAMS
    workers = _start_workers(str(directory / together))
    try:
        prefixes = {name: write(name, str(directory / name)) for name in alone}
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        # Where one has failed, the other waits for it.
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return {**prefixes, together: f"{directory}/{together}/ckpt-{NUM_STEPS}"}


def _start_workers(directory: str) -> list[runs.Process]:
    addresses = []
    with_ports = [socket.socket() for _ in range(2)]
    for each in with_ports:
        each.bind(("127.0.0.1", 0))
        addresses.append(f"127.0.0.1:{each.getsockname()[1]}")
    for each in with_ports:
        each.close()
    workers = []
    for index in range(2):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": addresses}, "task": task})
        workers.append(
            runs.start(
                "tests.foreign", PROGRAMS[-1], directory, TF_CONFIG=config
            )
        )
    return workers


def main() -> None:
    """Writes what one program saves, as one of its workers."""
    name, directory = sys.argv[1:]
    if name != "multi_worker":
        write(name, directory)
        return
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(SEED)
    program = multi_worker(strategy)
    program.train()
    # All workers write, as TensorFlow has it, and the first one's is kept.
    index = strategy.cluster_resolver.task_id
    program.write(
        f"{directory}-{index}" if index else directory, is_managed=True
    )
    # Or the first may be gone while the second still asks for it.
    os._exit(0)


if __name__ == "__main__":
    main()
