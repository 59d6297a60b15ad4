"""A readable name for each object of a checkpoint's graph; see `tree`."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator

from dtrain.bundle.graph import (
    CONTAINERS,
    KERAS_2_LAYER,
    OPTIMIZER_LISTS,
    ROOT,
    Graph,
    Place,
    holding_tensors,
    is_optimizer,
)


class Names:
    """Finds a name for each object of a graph.

    Attributes:
        places: see `Tree`.
        optimizers: see `Tree`.
        slots: numbers of the objects that optimizers keep for a variable.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._stems: dict[int, str | None] = {}
        self._by_node: dict[int, str] = {}
        self.places: dict[str, Place] = {}
        self.optimizers: dict[str, int] = {}
        self.slots: set[int] = set()
        if not graph.nodes:
            return
        holding = holding_tensors(graph)
        self._walk(holding)
        # Slots are named after their variables, which have their names by now.
        for name, optimizer in self.optimizers.items():
            self._name_slots(name, optimizer)
        self.places = {
            name: place
            for name, place in self.places.items()
            if place.node in holding and place.node not in self.slots
        }

    def all(self) -> Iterator[tuple[int, str]]:
        """Yields the number and the name of each object that has one."""
        yield ROOT, ""
        yield from self._by_node.items()

    def _walk(self, holding: Collection[int]) -> None:
        """Names what is reached, the shortest way first."""
        queue = collections.deque([(ROOT, "")])
        seen = {ROOT}
        while queue:
            node, name = queue.popleft()
            for part, place in self._parts(node):
                if place.node in seen or place.node not in holding:
                    continue
                seen.add(place.node)
                full = f"{name}/{part}" if name else part
                self.places[full] = place
                self._by_node[place.node] = full
                if is_optimizer(self._graph.nodes[place.node]):
                    self.optimizers[full] = place.node
                queue.append((place.node, full))

    def _parts(self, node: int) -> Iterator[tuple[str, Place]]:
        """Yields the last part of the names of what an object holds."""
        places = list(self._children(node, is_inside=False))
        labels = [self._label(place) for place in places]
        counts = collections.Counter(labels)
        for place, label in zip(places, labels, strict=True):
            yield (label if counts[label] == 1 else place.edge), place

    def _children(self, node: int, *, is_inside: bool) -> Iterator[Place]:
        """Yields what an object holds, the containers of Keras opened."""
        lists: Collection[str] = ()
        if is_optimizer(self._graph.nodes[node]):
            lists = OPTIMIZER_LISTS
        for child in self._graph.nodes[node].children:
            if child.local_name in lists:
                continue
            if child.local_name in CONTAINERS:
                yield from self._children(child.node_id, is_inside=True)
            else:
                yield Place(
                    child.node_id,
                    node,
                    child.local_name,
                    is_inside
                    or bool(KERAS_2_LAYER.fullmatch(child.local_name)),
                )

    def _label(self, place: Place) -> str:
        """Returns how a person would call the edge that leads to an object."""
        if place.is_layer:
            stem = self._stem(place.node, frozenset())
            return stem.rpartition("/")[2] if stem else place.edge
        return place.edge.lstrip("_") or place.edge

    def _stem(self, node: int, above: frozenset[int]) -> str | None:
        """Guesses Keras' path of a layer from those of its variables."""
        if node not in self._stems and node not in above:
            self._stems[node] = None
            for attribute in self._graph.nodes[node].attributes:
                self._stems[node] = attribute.full_name
            for place in self._children(node, is_inside=False):
                stem = self._stem(place.node, above | {node})
                if stem:
                    self._stems[node] = stem.rpartition("/")[0]
                    break
        return self._stems.get(node)

    def _name_slots(self, name: str, optimizer: int) -> None:
        """Names what an optimizer keeps for each variable."""
        node = self._graph.nodes[optimizer]
        for slot in node.slot_variables:
            variable = self._by_node.get(slot.original_variable_node_id)
            if variable:
                self._by_node[slot.slot_variable_node_id] = (
                    f"{name}/{slot.slot_name}/{variable}"
                )
                self.slots.add(slot.slot_variable_node_id)
        lists = {
            child.local_name: [
                item.node_id
                for item in self._graph.nodes[child.node_id].children
            ]
            for child in node.children
        }
        own = set(lists.get("_variables", ()))
        variables = lists.get("_trainable_variables", [])
        # If an optimizer is saved without its model, nothing else names them.
        for position, number in enumerate(variables):
            self._by_node.setdefault(
                number, f"{name}/trainable_variables/{position}"
            )
        for edge, nodes in lists.items():
            if edge in OPTIMIZER_LISTS or not own.issuperset(nodes):
                continue
            self.slots.update(nodes)
            if len(nodes) != len(variables):
                continue
            for number, owner in zip(nodes, variables, strict=True):
                variable = self._by_node.get(owner)
                if variable:
                    self._by_node[number] = (
                        f"{name}/{edge.lstrip('_')}/{variable}"
                    )
        # What a user's own optimizer keeps in no list.
        for position, number in enumerate(lists.get("_variables", ())):
            if number not in self._by_node:
                self._by_node[number] = f"{name}/variables/{position}"
                self.slots.add(number)
