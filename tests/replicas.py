"""Several replicas in one process, on the logical CPUs that conftest makes."""

from __future__ import annotations

import collections
import itertools
from unittest import mock

import tensorflow as tf

from dtrain.cluster import environment
from dtrain.cluster.workers import Workers

# Each strategy numbers its collectives from the same key, and TensorFlow
# remembers as long as the process lives which shape and group a number had.
_KEY_BASES = itertools.count(1_000_000, 100_000)


def mirrored(num_replicas: int) -> tf.distribute.Strategy:
    """Makes a MirroredStrategy over the first logical CPUs."""
    with mock.patch.object(
        tf.distribute.MirroredStrategy, "_collective_key_base", next(_KEY_BASES)
    ):
        return tf.distribute.MirroredStrategy(
            [f"CPU:{index}" for index in range(num_replicas)]
        )


def collectives(graph: tf.Graph, num_replicas: int) -> dict[str, int]:
    """Counts the collectives of a traced graph, by their kind."""
    definition = graph.as_graph_def()
    functions = [each.node_def for each in definition.library.function]
    counts = collections.Counter(
        node.op
        for nodes in (definition.node, *functions)
        for node in nodes
        if node.op.startswith("Collective")
    )
    # Each replica has a node of its own for the same collective.
    return {op: number // num_replicas for op, number in counts.items()}


def alone() -> Workers:
    """Makes the workers of a run that has one, without any distribution."""
    return Workers(tf.distribute.get_strategy(), environment.ALONE)
