"""About how much memory a step takes, before one is run.

The state is counted. What the layers compute is taken from a trace of both
networks, and how much of it is there at once from measurements of `dcgan` on a
CPU (`tests/benchmarks/memory.py`): within a factor of two.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import NamedTuple

import keras
import tensorflow as tf

from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data import sources
from dtrain.errors import UserError
from dtrain.gan import reduction, trial
from dtrain.gan.state import GAN
from dtrain.storage import host_memory

# What is there anyway, and counted as the state.
_OF_STATE = ("ReadVariableOp", "Const")
# Of what all layers of both networks compute, which share is there at once: of
# the images of a micro-batch, and of all of a replica, which the allocator does
# not give back between two micro-batches.
_OF_MICRO_BATCH = 1.15
_OF_REPLICA = 0.35
# Of what the objective of a phase computes, where a discriminator is mostly
# called twice, what both networks compute once.
_OF_PHASE = 0.7
# Batches of images that are read ahead, converted or in use.
_BATCHES = 8
# Of a GPU's memory, what TensorFlow and the driver leave for tensors.
_OF_GPU = 0.9


class Need(NamedTuple):
    """The memory of a step, on the devices of this worker that share one.

    Attributes:
        num_bytes: about so many.
        free_bytes: as many are free; None where that cannot be told.
        where: the device, in the words of an error.
    """

    num_bytes: float
    free_bytes: int | None
    where: str

    def __str__(self) -> str:
        """Says it in two figures, as in `1.3 of 22 GiB`."""
        most = (
            ""
            if self.free_bytes is None
            else f" of {self.free_bytes / 2**30:.2g}"
        )
        return f"{self.num_bytes / 2**30:.2g}{most} GiB"


class Estimate:
    """What steps of a GAN take, for any batch."""

    def __init__(self, gan: GAN, data: sources.Data, num_workers: int) -> None:
        """Traces the networks once, as they are called without training.

        Args:
            gan: the state; nothing in it is changed.
            data: all that its batches hold.
            num_workers: of the run.

        Raises:
            UserError: the replicas cannot share a batch.
        """
        self._config = gan.config
        self._num_replicas = gan.strategy.num_replicas_in_sync
        self._num_local = self._num_replicas // num_workers
        self._micro_batches = strategy_lib.check_batch(gan.config, gan.strategy)
        self._at_once = reduction.parts_at_once(gan.config)
        self._on_gpu = bool(tf.config.get_visible_devices("GPU"))
        trainable = [
            variable
            for name in gan.program.trained
            for variable in gan.program.networks[name].trainable_variables
        ]
        # The gradients, and once more packed for the replicas to add.
        self._state_bytes = sum(map(_bytes_of, gan.variables))
        self._state_bytes += 2 * sum(map(_bytes_of, trainable))
        # All that there is of one image; four bytes a number.
        self._image_bytes = 4 * math.prod(data.source.image_shape) + sum(
            4 * (spec.shape.num_elements() or 0) for spec in data.specs.values()
        )
        images = gan.config.batch_size // self._num_replicas
        size = images // self._micro_batches
        self._layer_bytes = _layer_bytes(gan, data.source.image_shape, size)

    def need(self) -> Need:
        """Estimates the step of the settings."""
        return self._need(self._config.batch_size, self._micro_batches)

    def _need(self, batch_size: int, micro_batches: int) -> Need:
        """Estimates a step; `micro_batches` are those of each replica."""
        images = batch_size / self._num_replicas
        at_once = min(self._at_once, micro_batches)
        replica_bytes = self._state_bytes + images * self._layer_bytes * (
            _OF_MICRO_BATCH * at_once / micro_batches + _OF_REPLICA
        )
        if self._on_gpu:
            return Need(
                replica_bytes + 2 * images * self._image_bytes,
                _gpu_bytes(),
                "a GPU",
            )
        data_bytes = _BATCHES * images * self._image_bytes
        return Need(
            self._num_local * (replica_bytes + data_bytes),
            host_memory.available_bytes(),
            "this machine",
        )

    def check(self) -> None:
        """Estimates the step of the settings, and refuses what cannot fit.

        Raises:
            UserError: it takes more than there is.
        """
        need = self.need()
        if need.free_bytes is not None and need.num_bytes > need.free_bytes:
            raise UserError(
                f"a step with batch_size ({self._config.batch_size}) takes "
                f"about {host_memory.gib(need.num_bytes)} of memory, and "
                f"{need.where} has {host_memory.gib(need.free_bytes)}; "
                f"{self._remedy()}"
            )

    def _remedy(self) -> str:
        """Proposes flags with which a step fits."""
        replicas, batch_size = self._num_replicas, self._config.batch_size
        while batch_size > replicas:
            images = batch_size // replicas
            for number in _divisors(images):
                if self._fits(batch_size, number):
                    return _proposal(self._config, replicas, batch_size, number)
            # A part of it that can be halved again.
            batch_size = replicas * 2 ** ((images // 2).bit_length() - 1)
        return "try a smaller --image_size, or a smaller model"

    def after_failure(self) -> str:
        """Proposes flags for a step that has failed, and should have fitted."""
        images = self._config.batch_size // self._num_replicas
        for number in _divisors(images):
            if number > self._micro_batches:
                return _proposal(
                    self._config,
                    self._num_replicas,
                    self._config.batch_size,
                    number,
                )
        return "try a smaller --image_size, or a smaller model"

    def _fits(self, batch_size: int, micro_batches: int) -> bool:
        need = self._need(batch_size, micro_batches)
        return need.free_bytes is None or need.num_bytes <= need.free_bytes


def out_of_memory(
    error: tf.errors.OpError, estimate: Estimate
) -> UserError | None:
    """Says what to do where a step has failed for want of memory.

    Args:
        error: that the step raised.
        estimate: of its run.

    Returns:
        None if it failed for something else.
    """
    # TensorFlow's hint about OOM is behind all that is exhausted, as disks.
    text = " ".join(error.message.partition("\nHint:")[0].split())
    if not isinstance(error, tf.errors.ResourceExhaustedError) or not any(
        word in text.lower() for word in ("oom", "memory", "alloc")
    ):
        return None
    return UserError(
        f"a step takes more memory than there is ({text[:120]}); "
        + estimate.after_failure()
    )


def _divisors(number: int) -> list[int]:
    """Lists what divides a number, ascending."""
    small = [
        each for each in range(1, math.isqrt(number) + 1) if number % each == 0
    ]
    return sorted({*small, *(number // each for each in small)})


def _proposal(
    config: Config, num_replicas: int, batch_size: int, micro_batches: int
) -> str:
    """Names the flags; `micro_batches` are those of each replica."""
    flags = [f"--micro_batches={micro_batches * num_replicas}"]
    if batch_size != config.batch_size:
        flags.insert(0, f"--batch_size={batch_size}")
    size = batch_size // num_replicas // micro_batches
    return f"try {' '.join(flags)}, {size:,} images at a time"


def _bytes_of(variable: keras.Variable) -> int:
    tensor = tf.TensorSpec(variable.shape, variable.dtype)
    return int(tensor.shape.num_elements() or 0) * tensor.dtype.size


def _layer_bytes(
    gan: GAN, image_shape: tuple[int, int, int], size: int
) -> float:
    """Adds up what the layers compute of one example of a micro-batch."""
    config, program = gan.config, gan.program
    if program.is_simple:
        return sum(
            _computed_bytes(_call_graph(network, config, (size, *shape)), size)
            for network, shape in (
                (gan.networks.generator, (config.latent_size,)),
                (gan.networks.discriminator, image_shape),
            )
        )
    given = trial.specs(config, program, image_shape, gan.inputs, size)
    with gan.strategy.scope():
        graphs = trial.trace(f"model ({config.model})", program, given)
    return _OF_PHASE * max(_computed_bytes(graph, size) for graph in graphs)


def _call_graph(
    network: keras.Model, config: Config, shape: tuple[int, ...]
) -> tf.Graph:
    """Traces the call of a network; `shape` is that of its input."""
    specs = [tf.TensorSpec(shape, tf.float32)]
    if config.conditional:
        specs.append(tf.TensorSpec(shape[:1], tf.int32))

    def call(*inputs: tf.Tensor) -> tf.Tensor:
        # Without training: nothing is drawn, and no replica is met.
        given = list(inputs) if config.conditional else inputs[0]
        return network(given, training=False)

    function = tf.function(call, autograph=False)
    return function.get_concrete_function(*specs).graph


def _computed_bytes(graph: tf.Graph, size: int) -> float:
    """Adds up what a graph computes of each of its examples."""
    return sum(
        tensor.shape.num_elements() * tensor.dtype.size / size
        for operation in graph.get_operations()
        if operation.type not in _OF_STATE
        for tensor in operation.outputs
        if tensor.shape.rank
        and tensor.shape.is_fully_defined()
        and tensor.shape[0] % size == 0
    )


def _gpu_bytes() -> int | None:
    """Returns what the first GPU leaves for tensors; None if unknown."""
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        device, total = ctypes.c_int(), ctypes.c_size_t()
        if (
            driver.cuInit(0) == 0
            and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
            and driver.cuDeviceTotalMem_v2(ctypes.byref(total), device) == 0
        ):
            return int(_OF_GPU * total.value)
    return None
