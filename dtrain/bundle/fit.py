"""Whether a checkpoint fits the objects it is to be restored into.

TensorFlow restores as it goes: it has written to half of the variables when it
finds that one does not fit, and says of a name that leads nowhere nothing at
all unless it is asked. Here both graphs are walked first, in the way a restore
would, and what does not fit is told with what would repair it.
"""

from __future__ import annotations

import collections
import difflib
import itertools
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

# Not public; see `snapshot`.
from tensorflow.python.checkpoint import graph_view, save_util

from dtrain.bundle import fingerprint
from dtrain.bundle.tree import ROOT, VALUE, Tensor, Tree, keys_of
from dtrain.errors import UserError

_EDIT = "python -m dtrain.checkpoint_tool edit"
# With the head, and without a screen to scroll.
_MAX_LINES = 25
# Each is tried, which takes milliseconds, and a tenth of a second in a large
# network; the best of a round is kept.
_MAX_TRIES = 60
_MAX_ROUNDS = 5


def of_objects(checkpoint: tf.train.Checkpoint) -> Tree:
    """Makes the tree that a save would write.

    Args:
        checkpoint: its variables exist.
    """
    # TensorFlow makes it at the first save, or when it restores.
    assert checkpoint.save_counter is not None
    view = graph_view.ObjectGraphView(checkpoint)
    owners, _ = view.breadth_first_traversal()
    graph = save_util.serialize_graph_view(view)[-1]
    tensors = {}
    for owner, node in zip(owners, graph.nodes, strict=True):
        for attribute in node.attributes:
            tensors[attribute.checkpoint_key] = _tensor(owner)
    return Tree(graph, tensors)


def _tensor(owner: Any) -> Tensor:
    """Describes the value of an object; of a table only that there is one."""
    variable = owner.value if isinstance(owner, keras.Variable) else owner
    dtype = getattr(variable, "dtype", None)
    shape = getattr(variable, "shape", None)
    if dtype is None or shape is None:
        return Tensor("variant", (), lambda: np.zeros(()))
    return Tensor(
        tf.as_dtype(dtype).name,
        tuple(shape),
        lambda: fingerprint.values_of(tf.convert_to_tensor(variable)),
    )


class Misfit(NamedTuple):
    """Why a checkpoint does not fit.

    Attributes:
        missing: names, as the program has them, that are not in it.
        left_over: names, as in the checkpoint, that have no place.
        differing: what is of another shape or dtype, or of another variable,
            by the program's name.
        renames: old names and new ones that repair it, or a part of it.
        casts: dtypes by names, after the renaming.
        drops: names without a place that can be left out.
        is_repaired: whether these repair all of it.
        summary: a line for what is missing and so on, with names that stand
            for all below them.
    """

    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    differing: Mapping[str, str]
    renames: Mapping[str, str]
    casts: Mapping[str, str]
    drops: tuple[str, ...]
    is_repaired: bool
    summary: tuple[str, ...]

    def counts(self) -> str:
        """Says how much of it there is."""
        return ", ".join(
            f"{len(found)} {what}"
            for found, what in (
                (self.missing, "missing"),
                (self.left_over, "left over"),
                (self.differing, "differing"),
            )
            if found
        )

    def lines(self, prefix: str) -> list[str]:
        """Says all of it in at most 24 lines.

        Args:
            prefix: of the checkpoint.
        """
        told = list(self.summary)
        command = self.command(prefix)
        if command:
            much = "it" if self.is_repaired else "a part of it"
            told += [f"this would repair {much}:", f"  {command}"]
        return told

    def command(self, prefix: str) -> str:
        """Returns the edit that repairs it; empty if none is known.

        Args:
            prefix: of the checkpoint.
        """
        flags = [f"--rename={old}={new}" for old, new in self.renames.items()]
        flags += [f"--cast={name}={to}" for name, to in self.casts.items()]
        flags += [f"--drop={name}" for name in self.drops]
        if not flags:
            return ""
        directory, name = os.path.split(prefix)
        if not re.fullmatch(r"ckpt-\d+", name):
            name = "ckpt-0"
        output = os.path.join(f"{directory or '.'}-repaired", name)
        words = [*_EDIT.split(), prefix, f"--output={output}", *flags]
        return shlex.join(words)


def compare(have: Tree, want: Tree) -> Misfit | None:
    """Tells what keeps a checkpoint from being restored.

    Args:
        have: the checkpoint.
        want: the objects; see `of_objects`.

    Returns:
        None if all of the checkpoint has a place, and all objects a value.
    """
    found = _problems(have, want)
    if not found:
        return None
    renames = _renames(have, want, found)
    repaired = have.renamed(renames) if renames else have
    left = _problems(repaired, want)
    casts = dict(left.dtypes)
    drops: list[str] = []
    if not left.missing and not left.others:
        drops = _tops(left.left_over, repaired)
    rest = len(left) - len(casts) - (len(left.left_over) if drops else 0)
    return Misfit(
        tuple(sorted(found.missing)),
        tuple(sorted(found.left_over)),
        _differing(found, have),
        renames,
        _grouped_casts(casts, repaired),
        tuple(drops),
        not rest,
        tuple(_summary(found, have, want)),
    )


class _Problems(NamedTuple):
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


def _problems(have: Tree, want: Tree) -> _Problems:
    """Walks both graphs as a restore does."""
    matched, others = _matched(have, want)
    found = _Problems(set(), set(), {}, {}, {})
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


def _check(name: str, ours: Tensor, theirs: Tensor, found: _Problems) -> None:
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


# What would repair it.


def _renames(have: Tree, want: Tree, found: _Problems) -> dict[str, str]:
    """Finds renames, each of which is tried before it is believed."""
    renames: dict[str, str] = {}
    fewest = len(found)
    candidates = list(
        itertools.islice(_candidates(have, want, found), _MAX_TRIES)
    )
    for _ in range(_MAX_ROUNDS):
        best: dict[str, str] | None = None
        for candidate in candidates:
            number = _tried(have, want, renames, candidate)
            if number is not None and number < fewest:
                best, fewest = candidate, number
            if not fewest:
                break
        if best is None:
            break
        renames = {**renames, **best}
        if not fewest:
            break
    return _needed(have, want, renames, fewest)


def _tried(
    have: Tree,
    want: Tree,
    renames: Mapping[str, str],
    candidate: Mapping[str, str],
) -> int | None:
    """Counts what would not fit; None if it cannot be renamed like that."""
    new = {*renames.values()} & {*candidate.values()}
    if new or renames.keys() & candidate.keys():
        return None
    try:
        tried = have.renamed({**renames, **candidate})
    except UserError:
        return None
    return len(_problems(tried, want))


def _needed(
    have: Tree, want: Tree, renames: dict[str, str], number: int
) -> dict[str, str]:
    """Leaves out what is repaired without it, as by a later rename."""
    for old in list(renames):
        fewer = {name: new for name, new in renames.items() if name != old}
        rest = _tried(have, want, fewer, {})
        if rest is not None and rest <= number:
            renames = fewer
    return renames


def _candidates(
    have: Tree, want: Tree, found: _Problems
) -> Iterator[dict[str, str]]:
    """Yields renames that may repair something, the likeliest first."""
    bad = {*found.missing, *found.shapes, *found.dtypes, *found.others}
    targets = _inside(bad, want)
    mixed = {name for pair in found.others.values() for name in pair}
    sources = _inside({*found.left_over, *mixed, *(bad & set(have))}, have)
    pairs = []
    for target, source in itertools.product(targets, sources):
        if source != target and targets[target] == sources[source]:
            close = difflib.SequenceMatcher(None, source, target).ratio()
            pairs.append((target.count("/"), -close, source, target))
    pairs.sort()
    # What has not the same below it: two optimizers, or where something is
    # missing as well.
    tops = {name.partition("/")[0] for name in {*bad, *found.left_over, *mixed}}
    for one, two in itertools.combinations(sorted(tops & {*have.places}), 2):
        yield {one: two, two: one}
    for *_, source, target in pairs:
        yield {source: target}
        if sources.get(target) == targets.get(source, sources.get(target)):
            yield {source: target, target: source}
    for one, two in itertools.product(
        sorted(set(have.top()) - set(want.top())),
        sorted(set(want.top()) - set(have.top())),
    ):
        yield {one: two}


def _inside(names: Collection[str], tree: Tree) -> dict[str, _Kind]:
    """Finds the objects of which all tensors are among these."""
    return {
        place: _kind(tree, place)
        for place in tree.places
        if set(tree.below(place)) <= set(names)
    }


_Kind = tuple[tuple[str, tuple[int, ...]], ...]


def _kind(tree: Tree, top: str) -> _Kind:
    """Describes what is below a name, whatever it is called above."""
    own = [name for name in tree.below(top) if name not in tree.slots]
    return tuple((name[len(top) :], tree[name].shape) for name in own)


def _tops(names: Collection[str], tree: Tree) -> list[str]:
    """Finds the fewest names that stand for exactly these tensors."""
    left = set(names) & set(tree)
    found: list[str] = []
    for place in sorted(tree.places, key=lambda each: each.count("/")):
        inside = set(tree.below(place))
        if inside and inside <= left:
            found.append(place)
            left -= inside
    return [*found, *sorted(left)]


def _grouped_casts(casts: Mapping[str, str], tree: Tree) -> dict[str, str]:
    """Gives one dtype to all below a name, where they are all cast to it."""
    return {
        name: dtype
        for dtype in sorted(set(casts.values()))
        for name in _tops(
            [each for each in casts if casts[each] == dtype], tree
        )
    }


# What is said.


def _differing(found: _Problems, have: Tree) -> dict[str, str]:
    """Says of each tensor that has a place how it differs."""
    others = {
        name: f"{one} by one way, {two} by another"
        for name, (one, two) in found.others.items()
    }
    dtypes = {
        name: f"{have[name].dtype} in the checkpoint, {dtype} in the program"
        for name, dtype in found.dtypes.items()
        if name in have.keys
    }
    return {**found.shapes, **others, **dtypes}


def _summary(found: _Problems, have: Tree, want: Tree) -> Iterator[str]:
    """Yields the lines below the head, without the command."""
    room = _MAX_LINES - 3
    differing = _differing(found, have)
    sections = [
        ("missing", _told(found.missing, want)),
        ("left over", _told(found.left_over, have)),
        (
            "differs",
            [
                f"{name}: {differing[name]}"
                # What an optimizer keeps is as its variable is.
                for name in sorted(
                    differing, key=lambda n: (n in want.slots, n)
                )
            ],
        ),
    ]
    sections = [(what, told) for what, told in sections if told]
    for number, (what, told) in enumerate(sections):
        share = room // (len(sections) - number)
        shown = told if len(told) <= share else told[: share - 1]
        room -= len(shown)
        for each in shown:
            yield f"  {what:10} {each}"
        if len(told) > len(shown):
            yield f"  {what:10} and {len(told) - len(shown)} more"
            room -= 1


def _told(names: Collection[str], tree: Tree) -> list[str]:
    """Writes names, one for all below it where all of them are meant."""
    return [
        f"{top}: {tree[top].dtype}{list(tree[top].shape)}"
        if top in tree.keys
        else f"{top}/*: {len(tree.below(top))} tensors"
        for top in _tops(names, tree)
    ]
