"""Adds the parts of a phase: those of micro-batches, then those of replicas.

fast adds the micro-batches of a replica one by one, and leaves the sum over
the replicas to the strategy, which adds in an order of its own. So the last
bits depend on how many replicas there are.

ordered adds in one binary tree over all micro-batches of the batch, whoever
computed them; with 8 of them on 2 replicas:

    replica 0                replica 1
    ((0 + 1) + (2 + 3))  +  ((4 + 5) + (6 + 7))

If every replica has the same power of two of them, its own sum is a node of
that tree, and the bits are those of a single replica. Where the number of
leaves is no power of two, the tree is that of a binary counter: whole subtrees
of 2^k leaves first, then what is left, from the right.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from dtrain.config import DeviceSettings


def parts_at_once(config: DeviceSettings) -> int:
    """Returns how many micro-batches a replica computes at the same time.

    A small one leaves cores of a CPU idle, which a second one fills. A GPU
    computes one operation after another, and what fast cuts into parts it cuts
    for want of memory.

    Args:
        config: `reduction` counts.
    """
    on_gpu = bool(tf.config.get_visible_devices("GPU"))
    return 2 if config.reduction == "ordered" and not on_gpu else 1


def _check_sums_stay() -> None:
    """Refuses a trace whose sums would not stay in the order of the code.

    Raises:
        RuntimeError: Grappler would add in another order.
    """
    options = tf.config.optimizer.get_experimental_options()
    if options.get("arithmetic_optimization", True):
        raise RuntimeError(
            "--reduction=ordered is traced while Grappler's arithmetic "
            "optimizer is on, which adds in an order of its own; make the "
            "strategy by cluster.strategy.make, which switches it off"
        )


def accumulate(
    count: int,
    make_part: Callable[[int, Any], Any],
    *,
    ordered: bool,
    at_once: int = 1,
) -> Any:
    """Computes parts in their order, and adds each as soon as it can.

    Args:
        count: how many parts, at least 1.
        make_part: called with the number of a part and the sum that it is to
            wait for, None if it need not; returns the part, tensors in any
            structure that `tf.nest` knows.
        ordered: whether to add in the tree, which holds at most
            log2(count) + 1 sums at a time; otherwise from left to right.
        at_once: how many parts may be computed at the same time; the sums
            are the same.

    Returns:
        The sum, in the structure of a part.

    Raises:
        RuntimeError: ordered, while a pass of TensorFlow's would add in another
            order; `cluster.strategy.make` switches it off.
    """
    if ordered:
        _check_sums_stay()
    # Like the digits of a binary counter: how many parts are in a sum.
    sums: list[tuple[int, Any]] = []
    newest: collections.deque[Any] = collections.deque([None] * at_once)
    for number in range(count):
        part = make_part(number, newest.popleft())
        size = 1
        while sums and (not ordered or sums[-1][0] == size):
            left_size, left = sums.pop()
            part = tf.nest.map_structure(tf.add, left, part)
            size += left_size
        sums.append((size, part))
        newest.append(part)
    _, total = sums.pop()
    for _, left in reversed(sums):
        total = tf.nest.map_structure(tf.add, left, total)
    return total


def over_replicas(
    values: Sequence[tf.Tensor], *, ordered: bool
) -> list[tf.Tensor]:
    """Adds tensors over all replicas, packed into one exchange.

    To be called in replica context, by every replica.

    Args:
        values: of static shapes; they travel as float32.
        ordered: whether to add in the tree.

    Returns:
        The sums, of the shapes and types of `values`.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return list(values)
    packed = pack(values)
    # Two numbers have one sum, whatever their order.
    if ordered and context.num_replicas_in_sync > 2:
        packed = _add_by_slices(packed, context)
    else:
        packed = context.all_reduce(tf.distribute.ReduceOp.SUM, packed)
    return unpack(packed, values)


def pack(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Joins tensors into one vector, float32 [numbers in all]."""
    flat = [tf.reshape(tf.cast(value, tf.float32), [-1]) for value in values]
    return tf.concat(flat, 0)


def unpack(packed: tf.Tensor, like: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Cuts a vector into tensors again.

    Args:
        packed: float32 [numbers in all], of `pack`.
        like: tensors of the static shapes and the types that are wanted.
    """
    sizes = [value.shape.num_elements() for value in like]
    return [
        tf.cast(tf.reshape(flat, value.shape), value.dtype)
        for flat, value in zip(tf.split(packed, sizes), like, strict=True)
    ]


def _add_by_slices(
    packed: tf.Tensor, context: tf.distribute.ReplicaContext
) -> tf.Tensor:
    """Adds a vector, float32 [n], over the replicas in the order of the tree.

    Replica r receives slice r of everybody's vector and adds these; then all
    receive the sums. Each of R replicas so receives 2 (R - 1) / R vectors, as
    in a ring, which adds in an order of its own; to gather whole vectors would
    be R - 1.
    """
    num_replicas = context.num_replicas_in_sync
    [size] = packed.shape
    padded = tf.pad(packed, [[0, -size % num_replicas]])
    slices = tf.reshape(padded, [num_replicas, -1])
    # TensorFlow's strategies do not offer this exchange: so it is done by
    # their launcher of collectives, which has their groups and keys.
    operations = context.strategy.extended._get_cross_device_ops(packed)
    launcher = operations._launchers[context._replica_id]
    with tf.device(launcher._device):
        theirs = tf.raw_ops.CollectiveAllToAllV2(
            input=slices,
            group_size=launcher._group_size,
            group_key=launcher._group_key,
            instance_key=launcher._next_instance_key(),
            ordering_token=[launcher._get_ordering_token()],
            communication_hint=launcher._options.implementation.value,
            timeout_seconds=launcher._options.timeout_seconds or 0,
        )
    parts = tf.unstack(theirs, num_replicas)
    total = accumulate(
        num_replicas, lambda number, _: parts[number], ordered=True
    )
    return tf.ensure_shape(launcher._all_gather(total, None)[:size], [size])
