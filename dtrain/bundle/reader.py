"""Opens a checkpoint of any TensorFlow program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from dtrain.bundle import index
from dtrain.bundle import tensors as tensors_lib
from dtrain.bundle.fingerprint import GRAPH_KEY
from dtrain.bundle.literal import literal
from dtrain.bundle.tree import Graph, Tensor, Tree, of_names
from dtrain.errors import UserError
from dtrain.storage import files


def read(prefix: str) -> Tree:
    """Reads the names of a checkpoint, and each value when it is asked for.

    Args:
        prefix: a local path, without `.index`.

    Raises:
        UserError: it is damaged.
    """
    with damage(prefix):
        index.check(prefix)
        with literal(prefix) as plain:
            reader = tf.train.load_checkpoint(plain)
        shapes = reader.get_variable_to_shape_map()
        dtypes = reader.get_variable_to_dtype_map()
        # Of TensorFlow 1 there are names alone.
        graph = None
        if GRAPH_KEY in shapes:
            data = tensors_lib.read(prefix, GRAPH_KEY, tf.string).item()
            graph = Graph.FromString(data)
    tensors = {
        key: Tensor(
            dtypes[key].name, tuple(shape), _Value(prefix, key, dtypes[key])
        )
        for key, shape in shapes.items()
        if key != GRAPH_KEY
    }
    if graph is None:
        return of_names(tensors)
    check(prefix, graph)
    return Tree(graph, tensors)


class _Value:
    """Reads a tensor of a checkpoint."""

    def __init__(self, prefix: str, key: str, dtype: tf.DType) -> None:
        self._prefix, self._key, self._dtype = prefix, key, dtype

    def __call__(self) -> np.ndarray:
        if self._dtype == tf.variant:
            raise UserError(
                f"{self._key} is the state of an iterator, which only the "
                "iterator reads; drop it"
            )
        with damage(self._prefix):
            return tensors_lib.read(self._prefix, self._key, self._dtype)


@contextlib.contextmanager
def damage(prefix: str) -> Iterator[None]:
    """Says in one line what TensorFlow says of a damaged file.

    Raises:
        UserError: it is damaged.
    """
    try:
        yield
    except UserError:
        raise
    except (*tensors_lib.DAMAGED, DecodeError) as error:
        raise UserError(
            f"{prefix} is no readable checkpoint: {files.reason(error)}"
        ) from error


def check(path: str, graph: Graph) -> None:
    """Refuses a graph with an edge to an object that is not there.

    Args:
        path: of its file, for errors.
        graph: of a checkpoint.

    Raises:
        UserError: it has one.
    """
    ends = {
        number
        for node in graph.nodes
        for number in (
            *(child.node_id for child in node.children),
            *(slot.original_variable_node_id for slot in node.slot_variables),
            *(slot.slot_variable_node_id for slot in node.slot_variables),
        )
    }
    if ends and not 0 <= min(ends) <= max(ends) < len(graph.nodes):
        raise UserError(
            f"{path} is no readable checkpoint: its object graph names "
            "objects that it does not have"
        )
