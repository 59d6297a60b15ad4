"""The tf.distribute strategy of a run, and how its replicas share a batch."""

from __future__ import annotations

import os

import keras
import tensorflow as tf

from dtrain.cluster import deadline
from dtrain.cluster.environment import Cluster
from dtrain.config import Config, DeviceSettings
from dtrain.errors import LOST_WORKER, UserError


def make(config: Config, cluster: Cluster) -> tf.distribute.Strategy:
    """Builds the strategy and sets up TensorFlow for the run.

    It is called once, before anything else touches a device, since it splits
    the CPU and sets the precision. Every worker calls this; with `multi_worker`
    it returns when all are connected.

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
    # The only place where TensorFlow and Keras both look for it. What stands
    # there may say more than was checked, as another protocol.
    os.environ.pop("TF_CONFIG", None)
    if cluster.num_workers > 1:
        os.environ["TF_CONFIG"] = cluster.to_tf_config()
    devices = _devices(config)
    keras.config.set_dtype_policy(config.precision)
    # In a loop this pass fails on the gradients of a fused convolution, and
    # logs it at each trace; what it would gain is a few per cent of inference.
    tf.config.optimizer.set_experimental_options({"remapping": False})
    if config.reduction == "ordered":
        # This pass takes sums apart and adds them in another order.
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
        return _connect(config, cluster)
    return tf.distribute.get_strategy()


def _connect(
    config: Config, cluster: Cluster
) -> tf.distribute.MultiWorkerMirroredStrategy:
    """Connects the workers, or ends the process."""
    # Without a timeout for collectives: TensorFlow 2.21 has a thread sleep
    # for each until then, also when it is done (SchedClosureAfter of
    # xla/tsl/platform/default/env.cc), and a process may have 32,768. The
    # watchdog ends a worker that waits for one that never comes, once
    # TensorFlow lets it run again.
    if cluster.num_workers == 1:
        return tf.distribute.MultiWorkerMirroredStrategy()
    secs = config.start_timeout_secs
    words = (
        f"error: the workers met, and did not all connect within {secs:g} s "
        "(--start_timeout_secs): one has died, or the address of one cannot "
        "be reached from here; see their last lines"
    )
    with deadline.ends_with(LOST_WORKER, words, secs):
        return tf.distribute.MultiWorkerMirroredStrategy()


def _devices(config: DeviceSettings) -> list[str]:
    """Chooses this worker's devices and hides the others.

    Raises:
        UserError: there are not as many as `num_devices`.
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
    """Checks that the replicas can share a batch and its micro-batches.

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
    """Checks that each replica's micro-batches are a subtree of the sum.

    Raises:
        UserError: they are not; see `gan/reduction`.
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
