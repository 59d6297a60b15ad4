"""The tf.distribute strategy of a run, and what its workers agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain.cluster.environment import Cluster
from dtrain.config import Config
from dtrain.errors import StorageError, UserError
from dtrain.storage.files import StoreError

# Errors of a collective whose other worker is gone.
_LOST_WORKER = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
)


def is_lost_worker(error: BaseException | None) -> bool:
    """Tells whether an error, or what caused it, is that of a lost worker."""
    while error is not None:
        # A store that does not answer causes them by the same kinds.
        if isinstance(error, (UserError, StorageError, StoreError)):
            return False
        if isinstance(error, _LOST_WORKER):
            return True
        error = error.__cause__ or error.__context__
    return False


def make(config: Config, cluster: Cluster) -> tf.distribute.Strategy:
    """Builds the strategy and sets up TensorFlow for the run.

    To be called once, before anything else touches a device: it splits the
    CPU and sets the precision. Every worker calls this; with `multi_worker`
    it returns when all are there.

    Args:
        config: the run's settings.
        cluster: the workers, and which of them this is.

    Returns:
        The strategy whose scope builds the GAN.

    Raises:
        UserError: the strategy does not fit the cluster, or the machine has
            fewer devices than asked for.
    """
    if cluster.num_workers > 1 and config.strategy != "multi_worker":
        raise UserError(
            f"{cluster.source} names {cluster.num_workers} workers, but "
            f"strategy is {config.strategy}; use --strategy=multi_worker or "
            "unset it"
        )
    devices = _devices(config)
    keras.config.set_dtype_policy(config.precision)
    # In a loop it fails on the gradients of a fused convolution and says so,
    # once for each trace; what it would fuse is a few per cent of inference.
    tf.config.optimizer.set_experimental_options({"remapping": False})
    if config.reduction == "ordered":
        # It takes sums apart and adds them in another order.
        tf.config.optimizer.set_experimental_options(
            {"arithmetic_optimization": False}
        )
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if config.strategy == "mirrored":
        return tf.distribute.MirroredStrategy(devices)
    if config.strategy == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    if config.strategy == "multi_worker":
        if cluster.num_workers > 1:
            # The only place where TensorFlow and Keras both look for it.
            os.environ["TF_CONFIG"] = cluster.to_tf_config()
        # Without a timeout for collectives: TensorFlow 2.21 has a thread sleep
        # for each until then, also when it is done (SchedClosureAfter of
        # xla/tsl/platform/default/env.cc), and a process may have 32,768. The
        # watchdog ends a worker that waits for one that never comes.
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.get_strategy()


def _devices(config: Config) -> list[str]:
    """Chooses this worker's devices and hides the others.

    Raises:
        UserError: there are fewer than the run asks for.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        wanted = config.num_devices or len(gpus)
        if wanted > len(gpus):
            raise UserError(
                f"num_devices ({wanted}) must be at most {len(gpus)}, the "
                "GPUs of this machine"
            )
        tf.config.set_visible_devices(gpus[:wanted], "GPU")
        for gpu in gpus[:wanted]:
            tf.config.experimental.set_memory_growth(gpu, True)
        return [f"GPU:{index}" for index in range(wanted)]
    wanted = config.num_devices or 1
    if wanted > 1 and config.strategy == "multi_worker":
        raise UserError(
            f"num_devices ({wanted}) must be 1 for a worker without GPUs; "
            "start more workers instead"
        )
    if wanted > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * wanted
        )
    return [f"CPU:{index}" for index in range(wanted)]


def check_batch(config: Config, strategy: tf.distribute.Strategy) -> int:
    """Checks that a batch can be cut for the replicas.

    Args:
        config: the run's settings.
        strategy: the strategy built from them.

    Returns:
        The number of micro-batches of each replica, at least 1.

    Raises:
        UserError: the batch or the micro-batches cannot be shared equally.
    """
    replicas = strategy.num_replicas_in_sync
    check_batch_size(config.batch_size, replicas)
    micro_batches = config.micro_batches or replicas
    if config.reduction == "ordered":
        _check_tree(micro_batches, replicas)
    if micro_batches % replicas:
        raise UserError(
            f"micro_batches ({micro_batches}) must be a multiple of the "
            f"{replicas} replicas; try 0, which is one for each"
        )
    return micro_batches // replicas


def _check_tree(micro_batches: int, num_replicas: int) -> None:
    """Checks that each replica's micro-batches are a subtree of all.

    Raises:
        UserError: they are not.
    """
    possible = {1, micro_batches}
    shared = micro_batches
    while shared % 2 == 0:
        shared //= 2
        possible.add(shared)
    if num_replicas not in possible:
        raise UserError(
            f"{num_replicas} replicas cannot share {micro_batches} "
            "micro_batches with --reduction=ordered: on several, each must "
            "have the same power of two; use "
            f"{' or '.join(map(str, sorted(possible)))} replicas"
        )


def check_batch_size(batch_size: int, num_replicas: int) -> None:
    """Checks that every replica gets equally many images.

    Args:
        batch_size: over all replicas.
        num_replicas: over all workers.

    Raises:
        UserError: batch_size is not a multiple of num_replicas.
    """
    if batch_size % num_replicas == 0:
        return
    below = batch_size // num_replicas * num_replicas
    choices = [size for size in (below, below + num_replicas) if size]
    raise UserError(
        f"batch_size ({batch_size}) must be a multiple of the {num_replicas} "
        f"replicas; try {' or '.join(map(str, choices))}"
    )


def agree(
    strategy: tf.distribute.Strategy, cluster: Cluster, flags: Sequence[bool]
) -> list[bool]:
    """Tells every worker which flags are up on at least one of them.

    Every worker calls this, with as many flags. A worker that is alone gets
    its own flags back and pays nothing; among several it is one all-reduce.

    Args:
        strategy: the run's strategy.
        cluster: the workers.
        flags: this worker's.

    Returns:
        For each flag, whether any worker's is up.
    """
    if cluster.num_workers == 1:
        return list(flags)
    mine = tf.constant([int(flag) for flag in flags], tf.int32)
    values = strategy.experimental_distribute_values_from_function(
        lambda _: mine
    )
    total = strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None)
    return [bool(count) for count in total.numpy()]


def gather(
    strategy: tf.distribute.Strategy, cluster: Cluster, number: int
) -> list[int]:
    """Tells every worker a number of each worker.

    Every worker calls this.

    Args:
        strategy: the run's strategy.
        cluster: the workers.
        number: this worker's, of 63 bits.

    Returns:
        The numbers, in the order of the replicas.
    """
    if cluster.num_workers == 1:
        return [number]
    mine = tf.constant([number], tf.int64)
    values = strategy.experimental_distribute_values_from_function(
        lambda _: mine
    )
    return strategy.gather(values, axis=0).numpy().tolist()


def broadcast(
    strategy: tf.distribute.Strategy, data: bytes, size: int, source: int
) -> bytes:
    """Sends bytes from one worker to all.

    Every worker calls this, with the same `size` and `source`.

    Args:
        strategy: the run's strategy.
        data: what is sent; what the others pass is not looked at.
        size: its length.
        source: a replica of the worker that sends, as numbered by `gather`.

    Returns:
        The bytes, on every worker.
    """
    # The sum of one worker's words and the zeros of all others: a collective
    # that every backend has, for a type that each of them adds exactly.
    words = -(-size // 8)
    padded = np.frombuffer(data.ljust(words * 8, b"\0")[: words * 8], np.int64)

    def of_replica(context: tf.distribute.ValueContext) -> tf.Tensor:
        mine = context.replica_id_in_sync_group == source
        return tf.constant(padded if mine else np.zeros_like(padded))

    values = strategy.experimental_distribute_values_from_function(of_replica)
    total = strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None)
    return total.numpy().tobytes()[:size]


def together(
    strategy: tf.distribute.Strategy,
    cluster: Cluster,
    action: Callable[[], Any],
) -> Any:
    """Does something on every worker, and fails on all if it fails on one.

    Without it the others would wait, in the next collective, for the one that
    has left. Every worker calls this.

    Args:
        strategy: the run's strategy.
        cluster: the workers.
        action: what this worker does; takes part in the same collectives on
            all of them, or in none.

    Returns:
        What `action` returns.

    Raises:
        UserError: this worker's action raised it, or another worker's did.
        StorageError: this worker's action raised it.
    """
    mistake: UserError | StorageError | None = None
    result = None
    try:
        result = action()
    except (UserError, StorageError) as error:
        mistake = error
    flags = (
        isinstance(mistake, UserError),
        isinstance(mistake, StorageError),
    )
    mistaken, failed = agree(strategy, cluster, flags)
    if mistake:
        raise mistake
    if mistaken:
        raise UserError("another worker has a mistake to report; see its line")
    if failed:
        raise StorageError("a disk of another worker failed; see its line")
    return result
