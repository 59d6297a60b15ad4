"""What keeps a checkpoint from fitting, found as a restore would find it."""

from __future__ import annotations

import collections
from collections.abc import Collection
from typing import NamedTuple

from dtrain.bundle.graph import ROOT, VALUE, keys_of
from dtrain.bundle.tree import Tensor, Tree


class Problems(NamedTuple):
    """What does not fit; names of `have` in `left_over` alone."""

    missing: set[str]
    left_over: set[str]
    shapes: dict[str, str]
    dtypes: dict[str, str]
    others: dict[str, tuple[str, str]]

    def __len__(self) -> int:
        return sum(map(len, self[:]))

    def __bool__(self) -> bool:
        return len(self) > 0


def find_problems(have: Tree, want: Tree) -> Problems:
    """Walks both graphs as a restore does."""
    matched, others = _matched(have, want)
    found = Problems(set(), set(), {}, {}, {})
    found.others.update(others)
    used = set()
    here, there = _by_node(have), _by_node(want)
    for number, attributes in there.items():
        ours = here.get(matched.get(number, -1), {})
        for attribute, names in attributes.items():
            used.update(ours.get(attribute, ()))
            if attribute not in ours:
                found.missing.update(names)
            elif attribute == VALUE:
                mine, theirs = ours[attribute][0], names[0]
                _check(theirs, have[mine], want[theirs], found)
    # An optimizer may lead to the variables of a network that itself is not
    # found.
    for name, place in want.places.items():
        if place.node not in matched:
            found.missing.update(want.below(name))
    ours = set(matched.values())
    for name, place in have.places.items():
        if place.node not in ours:
            found.left_over.update(have.below(name))
    # TensorFlow makes one where there is none, and numbers saves by it.
    found.left_over.update(set(have) - used)
    for names in (found.missing, found.left_over):
        names.discard("save_counter")
    return found


def _check(name: str, ours: Tensor, theirs: Tensor, found: Problems) -> None:
    """Notes a tensor that is of another shape or dtype."""
    if "variant" in (ours.dtype, theirs.dtype):
        return
    if ours.shape != theirs.shape:
        found.shapes[name] = (
            f"{list(ours.shape)} in the checkpoint, {list(theirs.shape)} in "
            "the program"
        )
    elif ours.dtype != theirs.dtype:
        found.dtypes[name] = theirs.dtype


def _matched(
    have: Tree, want: Tree
) -> tuple[dict[int, int], dict[str, tuple[str, str]]]:
    """Finds the object of the checkpoint for each of the program.

    Returns:
        Numbers by numbers, and for what two ways lead to different objects,
        both of them by its name.
    """
    names = {place.node: name for name, place in want.places.items()}
    ours = {place.node: name for name, place in have.places.items()}
    matched = {ROOT: ROOT}
    others: dict[str, tuple[str, str]] = {}
    queue = collections.deque([ROOT])
    while queue:
        number = queue.popleft()
        there = {
            child.local_name: child.node_id
            for child in have.graph.nodes[matched[number]].children
        }
        for child in want.graph.nodes[number].children:
            other = there.get(child.local_name)
            if other is None:
                continue
            if child.node_id not in matched:
                matched[child.node_id] = other
                queue.append(child.node_id)
            elif matched[child.node_id] != other:
                one, two = ours.get(matched[child.node_id]), ours.get(other)
                name = names.get(child.node_id)
                if name and one and two:
                    others[name] = one, two
    _match_slots(have, want, matched)
    return matched, others


def _match_slots(have: Tree, want: Tree, matched: dict[int, int]) -> None:
    """Adds what optimizers of TensorFlow 1 keep, which hangs on no edge."""
    for number, other in list(matched.items()):
        there = {
            (slot.original_variable_node_id, slot.slot_name): slot
            for slot in have.graph.nodes[other].slot_variables
        }
        for slot in want.graph.nodes[number].slot_variables:
            original = matched.get(slot.original_variable_node_id, -1)
            found = there.get((original, slot.slot_name))
            if found:
                matched[slot.slot_variable_node_id] = (
                    found.slot_variable_node_id
                )


def _by_node(tree: Tree) -> dict[int, dict[str, list[str]]]:
    """Returns names by the number of the object and the attribute."""
    names = {key: name for name, key in tree.keys.items()}
    found: dict[int, dict[str, list[str]]] = {}
    for number, node in enumerate(tree.graph.nodes):
        for attribute in node.attributes:
            there = [names[key] for key in keys_of(attribute, tree.tensors)]
            found.setdefault(number, {})[attribute.name] = there
    return found


def tops(names: Collection[str], tree: Tree) -> list[str]:
    """Finds the fewest names that stand for exactly these tensors."""
    left = set(names) & set(tree)
    found: list[str] = []
    for place in sorted(tree.places, key=lambda each: each.count("/")):
        inside = set(tree.below(place))
        if inside and inside <= left:
            found.append(place)
            left -= inside
    return [*found, *sorted(left)]
