"""Carries the tensors of a checkpoint to a file of another kind, and back.

A file that was written here also holds the graph of the objects, so that what
is read back is the checkpoint that it was. In any other there are names alone:
the tree is made of them, or they find their place in a tree that is there.
"""

from __future__ import annotations

import base64
import contextlib
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
from dtrain.tensorfiles.entries import Container, Entry
from dtrain.toolbox import parsing

# Of the metadata of a file: the graph, and TensorFlow's keys by the names.
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
    whole = tree.without([name for name in tree if name not in names])
    for name in whole:
        if whole[name].dtype == "variant":
            raise UserError(
                f"{name} is the state of an iterator, which only the iterator "
                "reads; leave it out by --filter, or drop it first"
            )
    metadata = {
        _GRAPH: base64.b64encode(whole.graph.SerializeToString()).decode(),
        _KEYS: json.dumps(whole.keys),
    }

    def value(name: str) -> Any:
        progress(whole[name].num_bytes)
        return whole[name].read()

    entries = {
        name: Entry(whole[name].dtype, whole[name].shape) for name in whole
    }
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
        with opening.opened(path) as found:
            yield found.tree
        return
    with containers.open_file(path) as file:
        tensors = {
            name: Tensor(entry.dtype, entry.shape, _Value(file, name))
            for name, entry in file.entries.items()
        }
        yield (
            _with_graph(path, file.metadata, tensors)
            if _GRAPH in file.metadata
            else tree_lib.of_names(tensors)
        )


class _Value:
    """Reads a tensor of a file."""

    def __init__(self, file: Container, name: str) -> None:
        self._file, self._name = file, name

    def __call__(self) -> Any:
        return self._file.read(self._name)


def _with_graph(
    path: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> Tree:
    """Makes the tree that was written.

    Raises:
        UserError: the graph is not that of the tensors.
    """
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
    """Puts tensors where a tree has places of their names.

    Args:
        source: what is taken.
        target: where it is put.
        names: name in the target by that in the source, where they are not
            the same; each for itself and all below it.
        is_partial: leaves out what has no place, and keeps what is not in the
            source.

    Returns:
        The target with other values.

    Raises:
        UserError: a name, a shape or a dtype does not fit.
    """
    for old in names:
        if not source.below(old):
            raise UserError(f"map ({old}): {tree_lib.unknown(source, old)}")
    changes = _new_names(source, names)
    missing = [name for name in target if name not in changes]
    extra = [name for name in changes if name not in target.keys]
    if (missing or extra) and not is_partial:
        raise UserError(_misfit(missing, [changes[name] for name in extra]))
    fitting = {new: old for new, old in changes.items() if new in target.keys}
    if not fitting:
        raise UserError(_misfit(missing, [changes[name] for name in extra]))
    for new, old in fitting.items():
        have, want = source[old], target[new]
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            raise UserError(
                f"{old} is {have.dtype}{list(have.shape)}, and {new} is "
                f"{want.dtype}{list(want.shape)}; name another with --map"
            )
    return target.with_tensors(
        {new: source[old] for new, old in fitting.items()}
    )


def _new_names(source: Tree, names: Mapping[str, str]) -> dict[str, str]:
    """Returns the name in the source by that in the target.

    Raises:
        UserError: two would have one name.
    """
    changes: dict[str, str] = {}
    for name in source:
        new = _mapped(name, names)
        if new in changes:
            raise UserError(
                f"map: {name} and {changes[new]} would both be {new}"
            )
        changes[new] = name
    return changes


def _mapped(name: str, names: Mapping[str, str]) -> str:
    """Returns the name in the target; the longest that is mapped counts."""
    for old in sorted(names, key=len, reverse=True):
        if tree_lib.is_below(name, old):
            return names[old] + name[len(old) :]
    return name


def _misfit(missing: list[str], extra: list[str]) -> str:
    told = []
    if missing:
        told.append(f"the file has no {_some(missing)}")
    if extra:
        told.append(f"the checkpoint has no place for {_some(extra)}")
    return f"{'; '.join(told)}; name them with --map, or use --partial"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def read_map(data: bytes, path: str) -> dict[str, str]:
    """Reads a file of names.

    Args:
        data: YAML, as in `layers/dense/vars/0: generator/dense/kernel`.
        path: of the file, for errors.

    Raises:
        UserError: it is none.
    """
    content = parsing.yaml_of(data, path)
    if not isinstance(content, dict) or not all(
        isinstance(each, str) for pair in content.items() for each in pair
    ):
        raise UserError(
            f"{path} must hold names by names, as in "
            "layers/dense/vars/0: generator/dense/kernel"
        )
    return content
