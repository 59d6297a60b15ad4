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
from typing import Any

from google.protobuf.message import DecodeError

from dtrain.bundle import reader
from dtrain.bundle import tree as tree_lib
from dtrain.bundle.tree import Graph, Tensor, Tree
from dtrain.checkpoint import opening
from dtrain.errors import UserError
from dtrain.tensorfiles import containers
from dtrain.tensorfiles.entries import Entry
from dtrain.toolbox import parsing

# Keys of a file's metadata: the graph, and TensorFlow's keys by the names.
_GRAPH, _KEYS = "dtrain.object_graph", "dtrain.keys"
_FILES = (".safetensors", ".npz", ".h5")


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
def opened(path: str) -> Iterator[Tree]:
    """Opens a file of tensors, or a checkpoint.

    Args:
        path: .safetensors, .npz or .h5; anything else is a checkpoint.

    Yields:
        The tensors, which are read as long as it is open.

    Raises:
        UserError: there is no such file, or it is not sound.
        StorageError: the disk or the store failed.
    """
    if not path.endswith(_FILES):
        with opening.opened(path) as checkpoint:
            yield checkpoint.tree
        return
    with containers.open_file(path) as file:
        tensors = {
            name: Tensor(
                entry.dtype, entry.shape, functools.partial(file.read, name)
            )
            for name, entry in file.entries.items()
        }
        yield (
            _with_graph(path, file.metadata, tensors)
            if _GRAPH in file.metadata
            else tree_lib.of_names(tensors)
        )


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


def place(
    source: Tree,
    target: Tree,
    names: Mapping[str, str],
    *,
    is_partial: bool = False,
) -> Tree:
    """Returns a tree whose tensors are those of another, by their names.

    Args:
        source: whose tensors are taken.
        target: whose names, shapes and dtypes are kept.
        names: name in the target by that in the source, where they are not
            the same; each stands for itself and all below it.
        is_partial: leaves out what the target has no place for, and keeps
            what the source does not have; else both are errors.

    Raises:
        UserError: a name, a shape or a dtype does not fit.
    """
    for old in names:
        if not source.below(old):
            raise UserError(f"map ({old}): {tree_lib.unknown(source, old)}")
    changes = _new_names(source, names)
    fitting = {new: old for new, old in changes.items() if new in target.keys}
    missing = [name for name in target if name not in fitting]
    extra = [old for new, old in changes.items() if new not in fitting]
    if not fitting or ((missing or extra) and not is_partial):
        raise UserError(_misfit(missing, extra))
    for new, old in fitting.items():
        have, want = source[old], target[new]
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            raise UserError(
                f"{old} is {have}, and {new} is {want}; name another with --map"
            )
    return target.with_tensors(
        {new: source[old] for new, old in fitting.items()}
    )


def _new_names(source: Tree, names: Mapping[str, str]) -> dict[str, str]:
    # Names in the source by those in the target.
    changes: dict[str, str] = {}
    for name in source:
        # The longest name that is mapped counts.
        old = max(
            (old for old in names if tree_lib.is_below(name, old)),
            key=len,
            default="",
        )
        new = names[old] + name[len(old) :] if old else name
        if new in changes:
            raise UserError(
                f"map: {name} and {changes[new]} would both be {new}"
            )
        changes[new] = name
    return changes


def _misfit(missing: list[str], extra: list[str]) -> str:
    problems = []
    if missing:
        problems.append(f"the file has no {_some(missing)}")
    if extra:
        problems.append(f"the checkpoint has no place for {_some(extra)}")
    return f"{'; '.join(problems)}; name them with --map, or use --partial"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


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
