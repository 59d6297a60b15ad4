"""Compares the programs of `tests/programs` with a loop written by hand.

    python -m tests.benchmarks.programs [--rounds=5] [--steps=40] [NAME ...]

Both sides train the same networks by the same objectives with equal optimizers
and moving averages, in one process, and take turns. The loop by hand is that of
TensorFlow's tutorials: one `tf.function` for each step, stateful random
numbers, means of the losses, batches that lie in memory; it has no replicas, no
checkpoint, no verdict and no metrics. The table also has the lines of each
program beyond its networks: objectives, updates, `prepare`, `draw`, and what
`make` returns.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.gan import loading
from dtrain.gan.example import Draw, Example
from dtrain.gan.program import Named, Phase
from dtrain.models import spectral_norm
from tests import programs_test
from tests.benchmarks import command, train

SIZES = ("--batch_size=16", "--base_channels=16", "--latent_size=64")
# Functions that make a part of a network and are not called so.
PARTS = ("spade", "_adain", "_activated", "_sizes")
NUM_BATCHES = 16


class Drawn(Example):
    """Examples whose random numbers are those of a tutorial."""

    def _next(self, draw: Draw) -> tf.Tensor:
        shape = [self.latents.shape[0], *draw.shape]
        if draw.kind == "normal":
            return tf.random.normal(shape)
        return tf.random.uniform(shape)


class Loop:
    """Trains a program as one would by hand."""

    def __init__(self, config: Config, data: sources.Data) -> None:
        """Builds networks and optimizers."""
        source = data.source
        arguments = source.image_shape, source.num_classes, data.specs
        make = loading.load(config.model)
        self._config = config
        self._program = loading.build(make, config, *arguments)
        copy = loading.build(make, config, *arguments)
        self._averages = [
            pair
            for name in copy.averaged or ()
            for pair in zip(
                copy.networks[name].weights,
                self._program.networks[name].weights,
                strict=True,
            )
        ]
        self._networks = Named(**self._program.networks)
        self._optimizers = self._make_optimizers()
        self._state = {
            name: tf.Variable(np.float32(value))
            for name, value in self._program.state.items()
        }
        self.step = tf.Variable(0, dtype=tf.int64)
        self.num_draws = max(self._program.draws) + 1
        self._batches = iter(self.dataset(data))
        self.run_step = tf.function(self._one_step)

    def _make_optimizers(self) -> dict[str, keras.Optimizer]:
        made = {}
        for first, names in self._program.optimized.items():
            optimizer = self._program.optimizers.get(first)
            if optimizer is None:
                optimizer = keras.optimizers.Adam(
                    self._config.generator_learning_rate,
                    self._config.beta_1,
                    self._config.beta_2,
                )
            variables = [
                variable
                for name in names
                for variable in self._program.networks[name].trainable_variables
            ]
            optimizer.build(variables)
            made[first] = optimizer
        return made

    def dataset(self, data: sources.Data) -> tf.data.Dataset:
        """Makes batches that lie in memory."""
        part = pipeline.Part(self._config.batch_size, 1, 1, 0)
        dataset = pipeline.make_dataset_of_part(data, self._config, part, 0)
        return dataset.take(NUM_BATCHES).cache().repeat().prefetch(4)

    def turn(self, num_steps: int) -> None:
        """Trains some steps, and waits for the last."""
        for _ in range(num_steps):
            self.run_step([next(self._batches) for _ in range(self.num_draws)])
        self.step.numpy()

    def turn_at_once(self, num_steps: int) -> None:
        """Trains some steps as loops of 100 in one graph, and waits."""
        for _ in range(num_steps // 100):
            self._run_100(self._batches)
        self.step.numpy()

    @functools.cached_property
    def _run_100(self) -> Callable[[Iterator[pipeline.Batch]], None]:
        @tf.function
        def run(batches: Iterator[pipeline.Batch]) -> None:
            for _ in tf.range(100):
                self.run_step([next(batches) for _ in range(self.num_draws)])

        return run

    def _one_step(self, batches: list[pipeline.Batch]) -> None:
        for phase, draw in zip(
            self._program.phases, self._program.draws, strict=True
        ):
            example = self._example(batches[draw])
            if phase.every_steps == 1 or self.step % phase.every_steps == 0:
                self._train(phase, example)
        for average, weight in self._averages:
            average.assign(weight + 0.999 * (average - weight))
        self.step.assign_add(1)

    def _example(self, batch: pipeline.Batch) -> Example:
        size = self._config.batch_size
        example = Drawn(
            real_images=batch.images,
            labels=batch.labels,
            latents=tf.random.normal([size, self._config.latent_size]),
            uniforms=tf.random.uniform([size]),
            step=self.step.read_value(),
            inputs=batch.inputs,
            state={
                name: each.read_value() for name, each in self._state.items()
            },
        )
        prepare = self._program.prepare
        return prepare(example) if prepare else example

    def _train(self, phase: Phase, example: Example) -> None:
        with tf.GradientTape(persistent=True) as tape:
            losses, *values = phase.objective(self._networks, example)
            if not isinstance(losses, Mapping):
                losses = dict.fromkeys(phase.names, losses)
            same = {id(loss): tf.reduce_mean(loss) for loss in losses.values()}
        gradients = {}
        for key, mean in same.items():
            names = [name for name in losses if id(losses[name]) == key]
            gradients |= tape.gradient(
                mean,
                {
                    name: self._program.networks[name].trainable_variables
                    for name in names
                },
            )
        for first, group in self._program.optimized.items():
            trained = [name for name in group if name in gradients]
            pairs = [
                pair
                for name in trained
                for pair in zip(
                    gradients[name],
                    self._program.networks[name].trainable_variables,
                    strict=True,
                )
                if pair[0] is not None
            ]
            for name in trained:
                for layer in self._program.networks[name]._flatten_layers():
                    if isinstance(layer, spectral_norm.SpectralNorm):
                        layer.iterate()
            if pairs:
                self._optimizers[first].apply_gradients(pairs)
        if phase.update:
            means = {
                name: tf.reduce_mean(value, 0)
                for named in values
                for name, value in named.items()
            }
            state = {
                name: each.read_value() for name, each in self._state.items()
            }
            for name, value in phase.update(state, means).items():
                self._state[name].assign(value)


def lines_beyond_networks(name: str) -> int:
    """Counts lines that are neither empty, nor comment, nor docstring."""
    module = importlib.import_module(f"tests.programs.{name}")
    source = inspect.getsource(module)
    lines = source.splitlines()
    count = 0
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef):
            for part in _beyond_networks(function):
                first = part.lineno - 1
                text = lines[first : part.end_lineno]
                count += len(text) - _num_silent(part, text)
    return count


def _beyond_networks(function: ast.FunctionDef) -> list[ast.stmt]:
    if function.name == "make":
        kinds = (ast.Return, ast.FunctionDef)
        return [part for part in function.body if isinstance(part, kinds)]
    is_network = function.name.startswith("make_") or function.name in PARTS
    return [] if is_network else [function]


def _num_silent(part: ast.stmt, text: list[str]) -> int:
    silent = sum(
        not line.strip() or line.strip().startswith("#") for line in text
    )
    if isinstance(part, ast.FunctionDef) and ast.get_docstring(part):
        end = part.body[0].end_lineno or 0
        silent += end - part.body[0].lineno + 1
    return silent


def compare(name: str, place: pathlib.Path, own: Mapping[str, int]) -> None:
    """Lets both sides train in turns; prints the row of a program."""
    told = programs_test.flags(name, place)
    config = config_lib.parse(
        ["main", *told, *SIZES, "--steps_per_loop=10", "--run_dir=nowhere"]
    )
    strategy = strategy_lib.make(config, environment.ALONE)
    data = sources.open_data(config)
    turns = {
        "dtrain": train.by_dtrain(config, strategy, data),
        "by hand": Loop(config, data).turn,
    }
    for turn in turns.values():
        turn(config.steps_per_loop + 1)
    speeds = [
        [train.measure(turn, own["steps"], config) for turn in turns.values()]
        for _ in range(own["rounds"])
    ]
    medians = [
        statistics.median(column) for column in zip(*speeds, strict=True)
    ]
    ratio = statistics.median(ours / theirs for ours, theirs in speeds)
    print(
        f"{name:<20} {lines_beyond_networks(name):>5}"
        f" {medians[0]:>9.1f} {medians[1]:>9.1f} {ratio:>6.2f}",
        flush=True,
    )


def main() -> None:
    """Measures and prints the table."""
    own, names = command.own_flags(sys.argv[1:], {"rounds": 5, "steps": 40})
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        programs_test.write_data(place)
        print(
            "                            images/s\n"
            "program              lines    dtrain   by hand  ratio"
        )
        for name in names or programs_test.PROGRAMS:
            compare(name, place, own)


if __name__ == "__main__":
    main()
