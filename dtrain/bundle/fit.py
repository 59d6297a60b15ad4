"""Whether a checkpoint fits the objects it is to be restored into.

TensorFlow restores as it goes: it has written to half of the variables when it
finds that one does not fit, and says of a name that leads nowhere nothing at
all unless it is asked. Here both graphs are walked first, in the way a restore
would, and what does not fit is told with what would repair it.
"""

from __future__ import annotations

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
from dtrain.bundle.problems import Problems, find_problems, tops
from dtrain.bundle.repair import find_renames
from dtrain.bundle.tree import Tensor, Tree

_EDIT = "python -m dtrain.checkpoint_tool edit"
# With the head, and without a screen to scroll.
_MAX_LINES = 25


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
    found = find_problems(have, want)
    if not found:
        return None
    renames = find_renames(have, want, found)
    repaired = have.renamed(renames) if renames else have
    left = find_problems(repaired, want)
    casts = dict(left.dtypes)
    drops: list[str] = []
    if not left.missing and not left.others:
        drops = tops(left.left_over, repaired)
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


def _grouped_casts(casts: Mapping[str, str], tree: Tree) -> dict[str, str]:
    """Gives one dtype to all below a name, where they are all cast to it."""
    return {
        name: dtype
        for dtype in sorted(set(casts.values()))
        for name in tops([each for each in casts if casts[each] == dtype], tree)
    }


# What is said.


def _differing(found: Problems, have: Tree) -> dict[str, str]:
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


def _summary(found: Problems, have: Tree, want: Tree) -> Iterator[str]:
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
        for top in tops(names, tree)
    ]
