"""Gives the tensors of one program the places they have in another.

A restore finds a variable by the way that leads to it, which TensorFlow 1,
Keras 2, Keras 3 and a file of tensors each have in their own. Here it is found
by the name that its owner gives it; and in a file of Keras' weights, which has
numbers alone, by the name of its layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dtrain.bundle import tree as tree_lib
from dtrain.bundle.graph import KERAS_2_LAYER
from dtrain.bundle.tree import Tree
from dtrain.errors import UserError

# TensorFlow makes one where there is none, and numbers saves by it.
_OPTIONAL = ("save_counter",)
# Of Keras' .weights.h5, as in layers/dense/vars/0.
_NUMBERED = re.compile(r"(?:(.*)/)?vars/(\d{1,9})", re.DOTALL)
# Layers whose variables of one shape are in this order in such a file.
_IN_ORDER = (
    ("kernel", "bias"),
    ("gamma", "beta"),
    ("gamma", "beta", "moving_mean", "moving_variance"),
)
# Of an optimizer of Keras 2, what Keras 3 calls it, and what it has no place
# for: settings, which the program has by its own flags.
_SLOTS = {"m": "momentums", "v": "velocities", "iter": "iterations"}
# What holds one in Keras' files.
_OPTIMIZERS = ("optimizer", "optimizer_weights")
_SETTINGS = ("beta_1", "beta_2", "decay", "epsilon", "momentum", "rho")


class _Layer(NamedTuple):
    """A layer of the source, whose variables need a place.

    Attributes:
        path: of the layer, in the source.
        label: what its program calls it.
        variables: their names, in the order of the layer where `is_numbered`.
        is_numbered: whether their own names are numbers.
    """

    path: str
    label: str
    variables: tuple[str, ...]
    is_numbered: bool


def place(
    source: Tree,
    target: Tree,
    names: Mapping[str, str],
    labels: Mapping[str, str] | None = None,
    *,
    is_partial: bool = False,
) -> Tree:
    """Returns a tree whose tensors are those of another, by their names.

    Args:
        source: whose tensors are taken.
        target: whose names, shapes and dtypes are kept.
        names: name in the target by that in the source, where they are not
            the same; each stands for itself and all below it.
        labels: names of layers by the paths of their variables in the source,
            as a file of Keras' weights has them.
        is_partial: leaves out what the target has no place for, and keeps
            what the source does not have; else both are errors.

    Raises:
        UserError: a name, a shape or a dtype does not fit.
    """
    for old in names:
        if not source.below(old):
            raise UserError(f"map ({old}): {tree_lib.unknown(source, old)}")
    found = _by_layers(source, target, names, labels or {})
    changes = _new_names(source, target, names, found)
    fitting = {new: old for new, old in changes.items() if new in target.keys}
    missing = [name for name in target if name not in (*fitting, *_OPTIONAL)]
    extra = [
        old
        for new, old in changes.items()
        if new not in fitting and old not in (*_OPTIONAL, *_settings(source))
    ]
    if not fitting or ((missing or extra) and not is_partial):
        raise UserError(_misfit(missing, extra, is_partial=is_partial))
    for new, old in fitting.items():
        have, want = source[old], target[new]
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            raise UserError(
                f"{old} is {have}, and {new} is {want}; name another with --map"
            )
    return target.with_tensors(
        {new: source[old] for new, old in fitting.items()}
    )


def _new_names(
    source: Tree,
    target: Tree,
    names: Mapping[str, str],
    found: Mapping[str, str],
) -> dict[str, str]:
    # Names in the source by those in the target.
    changes: dict[str, str] = {}
    for name in source:
        new = found.get(name) or _new_name(name, source, target, names)
        if new in changes:
            raise UserError(
                f"map: {name} and {changes[new]} would both be {new}"
            )
        changes[new] = name
    return changes


def _new_name(
    name: str, source: Tree, target: Tree, names: Mapping[str, str]
) -> str:
    new = _renamed(name, names)
    if new in target.keys:
        return new
    return _in_keras_3(name, source, target, names)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    # The longest name that is mapped counts.
    old = max(
        (old for old in names if tree_lib.is_below(name, old)),
        key=len,
        default="",
    )
    return names[old] + name[len(old) :] if old else name


def _in_keras_3(
    name: str, source: Tree, target: Tree, names: Mapping[str, str]
) -> str:
    """Returns what Keras 3 calls what Keras 2 has a number or a letter for."""
    optimizer = source.part(name)
    if optimizer in source.optimizers:
        slot, slash, variable = name[len(optimizer) + 1 :].partition("/")
        if variable:
            variable = _in_keras_3(variable, source, target, names)
        above = _renamed(optimizer, names)
        return f"{above}/{_SLOTS.get(slot, slot)}{slash}{variable}"
    path = ""
    for top in reversed(list(tree_lib.tops(name))):
        last = top.rpartition("/")[2]
        if top in names:
            path = names[top]
            continue
        place = source.places.get(top)
        layer = place and _numbered_layer(place.edge, target, path)
        path = layer or (f"{path}/{last}" if path else last)
    return path


def _numbered_layer(edge: str, target: Tree, model: str) -> str | None:
    """Finds the layer that Keras 2 gives a number among those with weights."""
    match = KERAS_2_LAYER.fullmatch(edge)
    if not match or not match[1]:
        return None
    layers = sorted(
        (int(place.edge), name)
        for name, place in target.places.items()
        if place.is_layer
        and place.edge.isdigit()
        and name.rpartition("/")[0] == model
    )
    number = int(match[2])
    return layers[number][1] if number < len(layers) else None


def _settings(source: Tree) -> list[str]:
    return [
        f"{optimizer}/{setting}"
        for optimizer in source.optimizers
        for setting in _SETTINGS
    ]


def _by_layers(
    source: Tree,
    target: Tree,
    names: Mapping[str, str],
    labels: Mapping[str, str],
) -> dict[str, str]:
    """Finds the places of variables by the names of their layers.

    Those of a name that is mapped are looked for below what it is mapped to,
    and all others below whichever network of the target has a place for all.

    Raises:
        UserError: several have.
    """
    found: dict[str, str] = {}
    rest: list[_Layer] = []
    for layer in _layers(source, labels):
        if all(
            _new_name(name, source, target, names) in target.keys
            for name in layer.variables
        ):
            continue
        tops = [old for old in names if tree_lib.is_below(layer.path, old)]
        if tops:
            top = names[max(tops, key=len)]
            found.update(_places([layer], target, top) or {})
        elif layer.path:
            rest.append(layer)
    fitting = {
        top: places
        for top in target.top()
        if (places := _places(rest, target, top))
    }
    if len(fitting) > 1:
        above = rest[0].path.partition("/")[0]
        raise UserError(
            f"the file fits {' and '.join(fitting)}; say which by a --map, as "
            f"in `{above}: {next(iter(fitting))}`"
        )
    for places in fitting.values():
        found.update(places)
    return found


def _layers(source: Tree, labels: Mapping[str, str]) -> list[_Layer]:
    """Lists the layers of a source: what holds variables, but no optimizer."""
    numbered: dict[str, dict[int, str]] = {}
    others: dict[str, list[str]] = {}
    optimizers = (*source.optimizers, *_OPTIMIZERS)
    for name in source:
        if any(tree_lib.is_below(name, top) for top in optimizers):
            continue
        match = _NUMBERED.fullmatch(name)
        if match:
            numbered.setdefault(match[1] or "", {})[int(match[2])] = name
        else:
            others.setdefault(name.rpartition("/")[0], []).append(name)
    layers = []
    for path, variables in numbered.items():
        label = labels.get(f"{path}/vars", path.rpartition("/")[2])
        ordered = tuple(variables[number] for number in sorted(variables))
        layers.append(_Layer(path, label, ordered, is_numbered=True))
    for path, named in others.items():
        label = path.rpartition("/")[2]
        layers.append(_Layer(path, label, tuple(named), is_numbered=False))
    return layers


def _places(
    layers: Sequence[_Layer], target: Tree, top: str
) -> dict[str, str] | None:
    """Finds the place below a name of each variable; None if one has none."""
    there = _layers_of(target, top)
    places: dict[str, str] = {}
    for layer in layers:
        numbered = _numbered_layer(layer.label, target, top)
        fitting = [
            pairs
            for path, variables in there.items()
            if path == numbered
            or (not numbered and path.rpartition("/")[2] == layer.label)
            if (pairs := _paired(layer, variables, target))
        ]
        if len(fitting) != 1 or places.keys() & fitting[0].keys():
            return None
        places.update(fitting[0])
    return places


def _paired(
    layer: _Layer, variables: Sequence[str], target: Tree
) -> dict[str, str] | None:
    """Pairs the variables of two layers; None if they are not the same."""
    by_leaf = {name.rpartition("/")[2]: name for name in variables}
    if layer.is_numbered:
        if len(layer.variables) != len(variables):
            return None
        # What was made first need not be first in a file: there what is
        # trained comes before what is not.
        ordered = [
            leaves for leaves in _IN_ORDER if set(leaves) == set(by_leaf)
        ]
        shapes = [target[name].shape for name in variables]
        if not ordered and len(set(shapes)) < len(shapes):
            return None
        into = [by_leaf[leaf] for leaf in ordered[0]] if ordered else variables
        return dict(zip(layer.variables, into, strict=True))
    # TensorFlow 1 counts what an operation returns: kernel:0.
    leaves = {
        name: name.rpartition("/")[2].removesuffix(":0")
        for name in layer.variables
    }
    if set(leaves.values()) != set(by_leaf):
        return None
    return {name: by_leaf[leaf] for name, leaf in leaves.items()}


def _layers_of(tree: Tree, top: str) -> dict[str, list[str]]:
    """Lists the variables of each layer below a name, by the layer's name."""
    layers: dict[str, list[str]] = {}
    names = {place.node: name for name, place in tree.places.items()}
    for path, place in tree.places.items():
        if not tree_lib.is_below(path, top) or path in tree.optimizers:
            continue
        variables = [
            names[child.node_id]
            for child in tree.graph.nodes[place.node].children
            if names.get(child.node_id) in tree.keys
        ]
        if variables:
            layers[path] = variables
    return layers


def _misfit(missing: list[str], extra: list[str], *, is_partial: bool) -> str:
    problems = []
    if missing:
        problems.append(f"the file has no {_some(missing)}")
    if extra:
        problems.append(f"the checkpoint has no place for {_some(extra)}")
    partial = "" if is_partial else ", or use --partial"
    return f"{'; '.join(problems)}; name them with --map{partial}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
