"""Carries the tensors of a checkpoint to a file of another kind, and back.

A file that `write` wrote also holds the graph of the objects, so that the same
checkpoint can be read back. Any other file has names alone: a tree is made of
them, or its tensors replace those of the same names in another checkpoint.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from dtrain.bundle import reader
from dtrain.bundle import tree as tree_lib
from dtrain.bundle.tree import Graph, Tensor, Tree
from dtrain.checkpoint import opening
from dtrain.checkpoint.manifest import Manifest
from dtrain.errors import UserError
from dtrain.storage import files
from dtrain.tensorfiles import containers
from dtrain.tensorfiles.entries import Entry
from dtrain.toolbox import parsing

# Keys of a file's metadata: the graph, and TensorFlow's keys by the names.
_GRAPH, _KEYS = "dtrain.object_graph", "dtrain.keys"


class Source(NamedTuple):
    """A file of tensors, or a checkpoint, that is open.

    Attributes:
        prefix: as its user names it.
        tree: its tensors, read as long as it is open.
        labels: names of layers, by the paths of their variables, where a file
            of Keras' weights has them.
        local: prefix that TensorFlow reads from; empty for a file.
        manifest: of a checkpoint that dtrain wrote; None for any other.
    """

    prefix: str
    tree: Tree
    labels: Mapping[str, str] = {}
    local: str = ""
    manifest: Manifest | None = None


def write(
    tree: Tree,
    names: Collection[str],
    path: str,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes tensors to a file, by their names.

    Args:
        tree: of the checkpoint.
        names: of the tensors.
        path: .safetensors or .npz, where nothing is yet.
        progress: called with the bytes of each tensor that is read.

    Raises:
        UserError: the file is there, or a tensor cannot be written.
        StorageError: the disk or the store failed.
    """
    tree = tree.without([name for name in tree if name not in names])
    for name in tree:
        if tree[name].dtype == "variant":
            raise UserError(
                f"{name} is the state of an iterator, which only the iterator "
                "reads; leave it out by --filter, or drop it first"
            )
    metadata = {
        _GRAPH: base64.b64encode(tree.graph.SerializeToString()).decode(),
        _KEYS: json.dumps(tree.keys),
    }

    def value(name: str) -> Any:
        progress(tree[name].num_bytes)
        return tree[name].read()

    entries = {name: Entry(tree[name].dtype, tree[name].shape) for name in tree}
    containers.write(path, entries, value, metadata)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Source]:
    """Opens a file of tensors, or a checkpoint.

    Args:
        path: of a file with one of `containers.SUFFIXES`; anything else is a
            checkpoint.

    Yields:
        What it holds.

    Raises:
        UserError: there is no such file, or it is not sound.
        StorageError: the disk or the store failed.
    """
    if not path.endswith(containers.SUFFIXES) or files.is_directory(path):
        with opening.opened(path) as checkpoint:
            prefix, local, tree, manifest = checkpoint
            yield Source(prefix, tree, {}, local, manifest)
        return
    with containers.open_file(path) as file:
        tensors = {
            name: Tensor(
                entry.dtype, entry.shape, functools.partial(file.read, name)
            )
            for name, entry in file.entries.items()
        }
        if _GRAPH in file.metadata:
            yield Source(path, _with_graph(path, file.metadata, tensors))
        else:
            yield Source(path, tree_lib.of_names(tensors), file.metadata)


def _with_graph(
    path: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> Tree:
    try:
        encoded = base64.b64decode(metadata[_GRAPH], validate=True)
        graph = Graph.FromString(encoded)
        keys = json.loads(metadata.get(_KEYS, ""))
    except (ValueError, RecursionError, DecodeError) as error:
        raise UserError(
            f"{path}: its object graph is damaged; write the file again"
        ) from error
    reader.check(path, graph)
    if isinstance(keys, dict) and keys.keys() == tensors.keys():
        tree = Tree(graph, {str(keys[name]): tensors[name] for name in tensors})
        if tree.keys == keys:
            return tree
    raise UserError(
        f"{path}: its object graph is of other tensors than it holds; write "
        "the file again"
    )


def read_map(data: bytes, path: str) -> dict[str, str]:
    """Reads a file of names in a checkpoint by those in another file.

    Args:
        data: YAML, as in `layers/dense/vars/0: generator/dense/kernel`.
        path: of the file, for errors.

    Raises:
        UserError: it holds anything else.
    """
    content = parsing.yaml_of(data, path)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) for pair in content.items() for name in pair
    ):
        raise UserError(
            f"{path} must hold names by names, as in "
            "layers/dense/vars/0: generator/dense/kernel"
        )
    return content
