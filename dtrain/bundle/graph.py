"""TensorFlow's graph of objects: what leads to what, and under which keys.

It is saved with the values of a checkpoint, and is all that a restore looks at.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterator

from tensorflow.core.protobuf import trackable_object_graph_pb2

Graph = trackable_object_graph_pb2.TrackableObjectGraph
GraphNode = Graph.TrackableObject
Attribute = GraphNode.SerializedTensor
ROOT = 0
VALUE = "VARIABLE_VALUE"
# What a Keras model holds its layers in, and readable names leave out.
CONTAINERS = ("_functional", "_operations", "_layers")
# What a model of Keras 2 calls a layer, by two numbers.
KERAS_2_LAYER = re.compile(r"layer(_with_weights)?-(\d{1,9})")
# What a Keras optimizer holds that belongs to a model, or has a better name.
OPTIMIZER_LISTS = ("_variables", "_trainable_variables")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a name is in the graph.

    Attributes:
        node: the number of the object.
        parent: the number of the one that holds it.
        edge: what that one calls it.
        is_layer: whether it is found by its number among the layers of a
            model, whatever it is called.
    """

    node: int
    parent: int
    edge: str
    is_layer: bool = False


def is_optimizer(node: GraphNode) -> bool:
    """Tells by what it holds whether an object is an optimizer."""
    edges = {child.local_name for child in node.children}
    return (
        bool(node.slot_variables)
        or "_trainable_variables" in edges
        # Of Keras 2.
        or {"_variables", "_iterations"} <= edges
    )


def holding_tensors(graph: Graph) -> set[int]:
    """Returns the objects that have a tensor, or lead to one."""
    above: dict[int, list[int]] = collections.defaultdict(list)
    for number, node in enumerate(graph.nodes):
        for child in node.children:
            above[child.node_id].append(number)
    holding = {
        number for number, node in enumerate(graph.nodes) if node.attributes
    }
    queue = list(holding)
    while queue:
        for number in above[queue.pop()]:
            if number not in holding:
                holding.add(number)
                queue.append(number)
    return holding


def cut(node: GraphNode, edge: str) -> None:
    """Removes what leads from an object to another."""
    for position, child in enumerate(node.children):
        if child.local_name == edge:
            del node.children[position]
            break


def ways_to_objects(
    graph: Graph, start: int = ROOT
) -> dict[int, tuple[str, ...]]:
    """Finds the way to each object, in the order in which TensorFlow does."""
    ways: dict[int, tuple[str, ...]] = {start: ()} if graph.nodes else {}
    queue = collections.deque(ways)
    while queue:
        node = queue.popleft()
        for child in graph.nodes[node].children:
            if child.node_id not in ways:
                ways[child.node_id] = (*ways[node], child.local_name)
                queue.append(child.node_id)
    return ways


def pruned(graph: Graph) -> Graph:
    """Leaves out what leads to no tensor any more, and numbers the rest."""
    holding = holding_tensors(graph) | {
        number
        for number, node in enumerate(graph.nodes)
        # Objects that never held one stay: a restore may ask for them.
        if not node.has_checkpoint_values.value
    }
    for node in graph.nodes:
        children = [
            child for child in node.children if child.node_id in holding
        ]
        del node.children[:]
        node.children.extend(children)
    kept = list(ways_to_objects(graph))
    for number in list(kept):
        kept += [
            slot.slot_variable_node_id
            for slot in graph.nodes[number].slot_variables
            if slot.original_variable_node_id in kept
            and slot.slot_variable_node_id in holding
            and slot.slot_variable_node_id not in kept
        ]
    numbers = {old: new for new, old in enumerate(kept)}
    pruned = Graph()
    for old in kept:
        node = pruned.nodes.add()
        node.CopyFrom(graph.nodes[old])
        for child in node.children:
            child.node_id = numbers[child.node_id]
        slots = list(node.slot_variables)
        del node.slot_variables[:]
        for slot in slots:
            ends = slot.original_variable_node_id, slot.slot_variable_node_id
            if numbers.keys() >= set(ends):
                node.slot_variables.add(
                    original_variable_node_id=numbers[ends[0]],
                    slot_variable_node_id=numbers[ends[1]],
                    slot_name=slot.slot_name,
                )
    return pruned


def is_sorted(graph: Graph) -> bool:
    """Tells whether the root names what it holds in order, as Checkpoint does.

    A model that is the root of what it saves does not.
    """
    edges = [child.local_name for child in graph.nodes[ROOT].children]
    return edges == sorted(edges)


def sort(graph: Graph) -> None:
    """Brings what the root holds into the order of the names."""
    root = graph.nodes[ROOT]
    children = sorted(root.children, key=lambda child: child.local_name)
    del root.children[:]
    root.children.extend(children)


def canonical_keys(graph: Graph) -> Iterator[tuple[Attribute, str]]:
    """Yields the key of each attribute, as TensorFlow makes it."""
    prefixes = {
        number: "/".join(map(_escaped, way))
        for number, way in ways_to_objects(graph).items()
    }
    for number in list(prefixes):
        for slot in graph.nodes[number].slot_variables:
            variable = prefixes[slot.original_variable_node_id]
            prefixes[slot.slot_variable_node_id] = (
                f"{variable}/.OPTIMIZER_SLOT/{prefixes[number]}/"
                f"{_escaped(slot.slot_name)}"
            )
    for number, prefix in prefixes.items():
        for attribute in graph.nodes[number].attributes:
            own = f".ATTRIBUTES/{_escaped(attribute.name)}"
            yield attribute, f"{prefix}/{own}" if prefix else own


def _escaped(name: str) -> str:
    """Returns a name as it is in a key, where a slash has a meaning."""
    return name.replace(".", "..").replace("/", ".S")


def keys_of(attribute: Attribute, keys: Collection[str]) -> list[str]:
    """Lists the keys of an attribute: a table or an iterator has several.

    Args:
        attribute: of an object of a graph.
        keys: of all tensors.
    """
    if attribute.checkpoint_key in keys:
        return [attribute.checkpoint_key]
    return [key for key in keys if key.startswith(attribute.checkpoint_key)]


def shifted(graph: Graph, by: int, prefix: str) -> Iterator[GraphNode]:
    """Yields the objects of a graph with other numbers and keys."""
    copy = Graph()
    copy.CopyFrom(graph)
    for node in copy.nodes:
        for child in node.children:
            child.node_id += by
        for slot in node.slot_variables:
            slot.original_variable_node_id += by
            slot.slot_variable_node_id += by
        for attribute in node.attributes:
            attribute.checkpoint_key = prefix + attribute.checkpoint_key
        yield node
