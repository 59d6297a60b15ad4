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
    problems = Problems(set(), set(), {}, {}, others)
    used = set()
    saved = _names_by_node(have)
    for number, attributes in _names_by_node(want).items():
        values = saved.get(matched.get(number, -1), {})
        for attribute, names in attributes.items():
            used.update(values.get(attribute, ()))
            if attribute not in values:
                problems.missing.update(names)
            elif attribute == VALUE:
                name = names[0]
                _check(name, have[values[attribute][0]], want[name], problems)
    # An optimizer may lead to the variables of a network that itself is not
    # found.
    for name, place in want.places.items():
        if place.node not in matched:
            problems.missing.update(want.below(name))
    nodes = set(matched.values())
    for name, place in have.places.items():
        if place.node not in nodes:
            problems.left_over.update(have.below(name))
    problems.left_over.update(set(have) - used)
    # TensorFlow makes one where there is none, and numbers saves by it.
    for names in (problems.missing, problems.left_over):
        names.discard("save_counter")
    return problems


def matched(have: Tree, want: Tree) -> dict[int, int]:
    """Returns which object of a checkpoint goes to which of a program.

    Returns:
        The number in `have` by the number in `want`, from the root down.
    """
    return _matched(have, want)[0]


def _check(name: str, have: Tensor, want: Tensor, problems: Problems) -> None:
    """Notes a tensor that is of another shape or dtype."""
    if "variant" in (have.dtype, want.dtype):
        return
    if have.shape != want.shape:
        problems.shapes[name] = (
            f"{list(have.shape)} in the checkpoint, {list(want.shape)} in the "
            "program"
        )
    elif have.dtype != want.dtype:
        problems.dtypes[name] = want.dtype


def _matched(
    have: Tree, want: Tree
) -> tuple[dict[int, int], dict[str, tuple[str, str]]]:
    """Returns the number of the checkpoint's object by that of the program's.

    And by the name of a program's object, that two ways lead to, both names in
    a checkpoint where they lead to different ones.
    """
    names = {place.node: name for name, place in want.places.items()}
    saved_names = {place.node: name for name, place in have.places.items()}
    matched, taken = {ROOT: ROOT}, {ROOT}
    others: dict[str, tuple[str, str]] = {}
    queue = collections.deque([ROOT])
    while queue:
        number = queue.popleft()
        saved = {
            child.local_name: child.node_id
            for child in have.graph.nodes[matched[number]].children
        }
        for child in want.graph.nodes[number].children:
            other = saved.get(child.local_name)
            if other is None:
                continue
            # Of two objects that are one there, TensorFlow restores the first.
            is_taken = (
                other in taken and want.graph.nodes[child.node_id].attributes
            )
            if child.node_id not in matched and not is_taken:
                matched[child.node_id] = other
                taken.add(other)
                queue.append(child.node_id)
            elif matched.get(child.node_id, other) != other:
                one = saved_names.get(matched[child.node_id])
                two = saved_names.get(other)
                name = names.get(child.node_id)
                if name and one and two:
                    others[name] = one, two
    _match_slots(have, want, matched)
    return matched, others


def _match_slots(have: Tree, want: Tree, matched: dict[int, int]) -> None:
    """Adds what optimizers of TensorFlow 1 keep, which hangs on no edge."""
    for number, other in list(matched.items()):
        saved = {
            (
                slot.original_variable_node_id,
                slot.slot_name,
            ): slot.slot_variable_node_id
            for slot in have.graph.nodes[other].slot_variables
        }
        for slot in want.graph.nodes[number].slot_variables:
            original = matched.get(slot.original_variable_node_id, -1)
            node = saved.get((original, slot.slot_name))
            if node is not None:
                matched[slot.slot_variable_node_id] = node


def _names_by_node(tree: Tree) -> dict[int, dict[str, list[str]]]:
    """Returns names by the number of the object and the attribute."""
    names = {key: name for name, key in tree.keys.items()}
    return {
        number: {
            attribute.name: [
                names[key] for key in keys_of(attribute, tree.tensors)
            ]
            for attribute in node.attributes
        }
        for number, node in enumerate(tree.graph.nodes)
    }


def tops(names: Collection[str], tree: Tree) -> list[str]:
    """Finds the fewest names that stand for exactly these tensors."""
    left = set(names) & set(tree)
    fewest: list[str] = []
    for top in sorted(tree.places, key=lambda name: name.count("/")):
        inside = set(tree.below(top))
        if inside and inside <= left:
            fewest.append(top)
            left -= inside
    return [*fewest, *sorted(left)]
