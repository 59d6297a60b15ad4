"""A checkpoint as a tree of readable names.

TensorFlow finds a variable by the way that leads to it: `Checkpoint(g=model)`
holds `g`, which holds `_functional`, and so on down to `_kernel`. The graph of
these ways is saved with the values, and a restore looks at nothing else. A key,
as `g_optimizer/_variables/7/.ATTRIBUTES/VARIABLE_VALUE`, is the shortest way.
Here each tensor has the name that its owner would give it:

    g/conv/kernel                  by its model, not by the optimizer's list
    g_optimizer/velocities/g/conv/kernel      a slot, by the variable it is of
    g_optimizer/learning_rate

What only Keras needs on the way (`_functional`, `_operations`) is left out, and
a layer, which has a number there, has its Keras name. If two names would be the
same, both are as in the graph.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import tensorflow as tf

from dtrain.bundle import graph as graph_lib
from dtrain.bundle.graph import (
    ROOT,
    VALUE,
    Graph,
    Place,
    canonical_keys,
    cut,
    keys_of,
    pruned,
    shifted,
    ways_to_objects,
)
from dtrain.bundle.names import Names
from dtrain.errors import UserError

# What counts the steps: of a dtrain run, and of programs that count as it does.
STEPS = ("step", "global_step")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value that is not read yet.

    Attributes:
        dtype: TensorFlow's name of it, as in `float32` or `string`.
        shape: its dimensions.
        read: returns it; what it reads from has to be open.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __str__(self) -> str:
        """Returns the dtype and the shape, as in `float32[3, 4]`."""
        return f"{self.dtype}{list(self.shape)}"

    @property
    def num_bytes(self) -> int:
        """Bytes of the value; of strings those of their lengths alone."""
        return math.prod(self.shape) * tf.as_dtype(self.dtype).size


class Tree:
    """The graph and the tensors of a checkpoint. A value: edits make another.

    Attributes:
        graph: TensorFlow's; not to be changed.
        tensors: by their keys.
        places: of all objects that hold a tensor, by name; slots have none.
        keys: key of each tensor, by its name, sorted by name.
        slots: names of what optimizers keep for a variable.
        optimizers: number of each optimizer, by its name.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
        """Finds the names.

        Args:
            graph: TensorFlow's.
            tensors: by their keys; one that the graph does not know is named
                by its key.
        """
        self.graph = graph
        self.tensors = dict(tensors)
        names = Names(graph)
        self.places = names.places
        self.optimizers = names.optimizers
        self.slots: set[str] = set()
        keys: dict[str, str] = {}
        for node, name in names.all():
            for attribute in graph.nodes[node].attributes:
                for key in keys_of(attribute, self.tensors):
                    rest = key.removeprefix(attribute.checkpoint_key)
                    full = _with_attribute(name, attribute.name + rest)
                    keys[full] = key
                    if node in names.slots:
                        self.slots.add(full)
        for key in self.tensors.keys() - keys.values():
            keys[key] = key
        self.keys = dict(sorted(keys.items()))

    def __getitem__(self, name: str) -> Tensor:
        """Returns a tensor by its name."""
        return self.tensors[self.keys[name]]

    def __iter__(self) -> Iterator[str]:
        """Goes through the names of the tensors, sorted."""
        return iter(self.keys)

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self.keys)

    @property
    def step(self) -> int | None:
        """How many steps were done; None where nothing says so."""
        for name in STEPS:
            if name in self.keys and not self[name].shape:
                return int(self[name].read())
        return None

    def below(self, name: str) -> list[str]:
        """Lists the tensors that a name stands for: itself and all below."""
        return [tensor for tensor in self if is_below(tensor, name)]

    def part(self, name: str) -> str:
        """Names the network or the optimizer that a tensor is counted to."""
        for optimizer in sorted(self.optimizers, key=len, reverse=True):
            if is_below(name, optimizer):
                return optimizer
        return name.partition("/")[0]

    def with_tensors(self, changes: Mapping[str, Tensor]) -> Tree:
        """Replaces tensors.

        Args:
            changes: by name.
        """
        changed = {self.keys[name]: new for name, new in changes.items()}
        return Tree(self.graph, {**self.tensors, **changed})

    def without(self, names: Collection[str]) -> Tree:
        """Leaves tensors out, and what then holds none.

        Args:
            names: of the tensors.
        """
        names = set(names)
        gone = {self.keys[name] for name in names}
        graph = Graph()
        graph.CopyFrom(self.graph)
        for node in graph.nodes:
            attributes = [
                attribute
                for attribute in node.attributes
                if not gone.issuperset(keys_of(attribute, self.tensors))
            ]
            del node.attributes[:]
            node.attributes.extend(attributes)
        left = [name for name in self if name not in names]
        above = {top for name in left for top in tops(name)}
        for name in self.places.keys() - above:
            # Or an optimizer without tensors would still lead to its variables.
            place = self.places[name]
            cut(graph.nodes[place.parent], place.edge)
        tensors = {self.keys[name]: self[name] for name in left}
        return _rekeyed(pruned(graph), tensors)

    def renamed(self, changes: Mapping[str, str]) -> Tree:
        """Gives objects other names, all at once, so that two can be swapped.

        What an optimizer keeps for a variable follows the variable.

        Args:
            changes: new name by the old one. What a new name says is above
                the object is made where it is not there.

        Raises:
            UserError: there is no such object, the new name is taken, or the
                object is found by its number, and not by a name.
        """
        for old, new in changes.items():
            self._check_rename(old, new)
        graph = Graph()
        graph.CopyFrom(self.graph)
        is_sorted = graph_lib.is_sorted(graph)
        moved = [(self.places[old], new) for old, new in changes.items()]
        for place, _ in moved:
            cut(graph.nodes[place.parent], place.edge)
        # The longest last: what is above it may be renamed, too.
        for place, new in sorted(moved, key=lambda move: len(move[1])):
            _connect(graph, place, new)
        graph = pruned(graph)
        if is_sorted:
            graph_lib.sort(graph)
        return _rekeyed(graph, self.tensors)

    def top(self) -> list[str]:
        """Lists the names without a slash: networks, optimizers, step."""
        return sorted({name.partition("/")[0] for name in self})

    def _check_rename(self, old: str, new: str) -> None:
        place = self.places.get(old)
        if place is None:
            if old in self.slots:
                raise UserError(
                    f"rename ({old}): it is called after its variable; rename "
                    "that one"
                )
            raise UserError(f"rename ({old}): {unknown(self, old)}")
        if place.is_layer:
            raise UserError(
                f"rename ({old}): TensorFlow finds this layer by its number "
                f"{place.edge}, whatever its name; to move its values use copy"
            )
        if not new.strip("/") or "//" in f"/{new}/":
            raise UserError(
                f"rename ({old}={new}): a name has parts of at least one "
                "character, as in generator/conv/kernel"
            )


def of_names(tensors: Mapping[str, Tensor]) -> Tree:
    """Makes a tree of names alone, as those in a file of tensors.

    Args:
        tensors: by names whose parts are joined by slashes.

    Raises:
        UserError: a name has an empty part.
    """
    graph = Graph()
    graph.nodes.add().has_checkpoint_values.value = True
    numbers: dict[str, int] = {"": ROOT}
    for name in sorted(tensors):
        above = ""
        for part in name.split("/"):
            if not part:
                raise UserError(
                    f"{name!r} is no name of a checkpoint: between slashes "
                    "there is at least one character"
                )
            full = f"{above}/{part}" if above else part
            if full not in numbers:
                numbers[full] = len(graph.nodes)
                graph.nodes.add().has_checkpoint_values.value = True
                graph.nodes[numbers[above]].children.add(
                    node_id=numbers[full], local_name=part
                )
            above = full
        graph.nodes[numbers[name]].attributes.add(
            name=VALUE, full_name=name, checkpoint_key=name
        )
    graph_lib.sort(graph)
    return _rekeyed(graph, tensors)


def joined(sources: Mapping[str, Tree]) -> Tree:
    """Makes one checkpoint of the parts of several.

    Args:
        sources: the tree that each top name is taken from.

    Raises:
        UserError: a part is not there, or is of a variable of another part
            that comes from elsewhere, as an optimizer is.
    """
    graph = Graph()
    graph.nodes.add().has_checkpoint_values.value = True
    tensors: dict[str, Tensor] = {}
    for number, tree in enumerate(dict.fromkeys(sources.values())):
        names = [name for name, source in sources.items() if source is tree]
        _check_whole(tree, names)
        kept = tree.without(
            [name for name in tree if name.partition("/")[0] not in names]
        )
        start = len(graph.nodes)
        graph.nodes.extend(shifted(kept.graph, start, f"{number}:"))
        graph.nodes[ROOT].children.extend(graph.nodes[start].children)
        for key, tensor in kept.tensors.items():
            tensors[f"{number}:{key}"] = tensor
    graph = pruned(graph)
    graph_lib.sort(graph)
    return _rekeyed(graph, tensors)


def _check_whole(tree: Tree, names: Collection[str]) -> None:
    owners = {key: name.partition("/")[0] for name, key in tree.keys.items()}
    for name in names:
        if name not in tree.places:
            raise UserError(f"{name}: {unknown(tree, name)}")
        for number in ways_to_objects(tree.graph, tree.places[name].node):
            for attribute in tree.graph.nodes[number].attributes:
                for key in keys_of(attribute, tree.tensors):
                    if owners[key] not in names:
                        raise UserError(
                            f"{name} is of the variables of {owners[key]}: "
                            "take both from the same checkpoint"
                        )


def is_below(name: str, top: str) -> bool:
    """Tells whether a name is another one, or below it."""
    return name == top or name.startswith(f"{top}/")


def tops(name: str) -> Iterator[str]:
    """Yields a name, and all that it is below."""
    while name:
        yield name
        name = name.rpartition("/")[0]


def unknown(tree: Tree, name: str) -> str:
    """Says in some words that there is no such name, and which come close."""
    top, _, rest = name.partition("/")
    for child in tree.graph.nodes[ROOT].children if len(tree) else ():
        for other, place in tree.places.items():
            if child.local_name == top and place.node == child.node_id:
                full = f"{other}/{rest}" if rest else other
                return f"the object has another name here, {full}; use that"
    known = [*tree.places, *tree.slots]
    close = difflib.get_close_matches(name, known, 3, 0.5)
    hint = ", ".join(close) or ", ".join(sorted(tree.top())[:8])
    return f"the checkpoint holds nothing of this name; try {hint}"


def _with_attribute(name: str, attribute: str) -> str:
    """Names one of the tensors of an object; most have a single one."""
    return name if attribute == VALUE else f"{name}/{attribute}"


def _connect(graph: Graph, place: Place, name: str) -> None:
    """Puts an object where a name says; what is missing above is made.

    Raises:
        UserError: there is something of that name already.
    """
    places = Names(graph).places
    if name in places:
        raise UserError(f"rename (to {name}): there is one of that name")
    above = name.split("/")
    last = above.pop()
    parent, known = ROOT, 0
    for length in range(len(above), 0, -1):
        if "/".join(above[:length]) in places:
            parent, known = places["/".join(above[:length])].node, length
            break
    for part in above[known:]:
        graph.nodes.add().has_checkpoint_values.value = True
        graph.nodes[parent].children.add(
            node_id=len(graph.nodes) - 1, local_name=part
        )
        parent = len(graph.nodes) - 1
    # If only what is above it changes, its owner calls it as before.
    edge = place.edge if place.edge.lstrip("_") == last else last
    graph.nodes[parent].children.add(node_id=place.node, local_name=edge)


def _rekeyed(graph: Graph, tensors: Mapping[str, Tensor]) -> Tree:
    """Gives each tensor the key that TensorFlow would save it under."""
    new = {}
    for attribute, canonical in list(canonical_keys(graph)):
        old = attribute.checkpoint_key
        for key in keys_of(attribute, tensors):
            new[key] = canonical + key.removeprefix(old)
        attribute.checkpoint_key = canonical
    return Tree(
        graph, {new.get(key, key): value for key, value in tensors.items()}
    )
