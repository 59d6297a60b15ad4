"""Whether a checkpoint fits the objects it is to be restored into.

TensorFlow restores as it goes: when it finds a variable that does not fit, it
has written to half of the others; and names that it finds no object for it
passes over, unless it is asked. Here both graphs are walked first, as a restore
would walk them, and what does not fit is named with the edit that repairs it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dtrain.bundle import fingerprint, objects
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
    found = objects.walk(checkpoint)
    tensors = {key: _tensor(owner) for key, owner in found.owners.items()}
    return Tree(found.graph, tensors)


def _tensor(owner: Any) -> Tensor:
    """Describes the value of an object; of a table only that there is one.

    Likewise of a variable that may be of any shape.
    """
    variable = objects.unwrapped(owner)
    dtype = getattr(variable, "dtype", None)
    shape = getattr(variable, "shape", None)
    if dtype is None or shape is None:
        return Tensor("variant", (), lambda: np.zeros(()))

    def read() -> np.ndarray:
        return fingerprint.values_of(tf.convert_to_tensor(variable))

    if not tf.TensorShape(shape).is_fully_defined():
        return Tensor("variant", (), read)
    return Tensor(tf.as_dtype(dtype).name, tuple(shape), read)


class Misfit(NamedTuple):
    """Why a checkpoint does not fit.

    Attributes:
        missing: names, as the program has them, that are not in it.
        left_over: names, as in the checkpoint, that have no place.
        differing: how a tensor differs that both have, in shape, dtype or the
            variable that it is, by the program's name.
        renames: new names by old ones, which repair it or a part of it.
        casts: dtypes by names, after the renaming.
        drops: names that the program has nothing for and that can be dropped.
        is_repaired: whether these three repair all of it.
        summary: lines that say what is missing, left over and differing; a
            name stands for all below it.
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
            f"{len(names)} {problem}"
            for names, problem in (
                (self.missing, "missing"),
                (self.left_over, "left over"),
                (self.differing, "differing"),
            )
            if names
        )

    def lines(self, prefix: str) -> list[str]:
        """Says all of it in at most 24 lines.

        Args:
            prefix: path of the checkpoint.
        """
        lines = list(self.summary)
        command = self.command(prefix)
        if command:
            what = "it" if self.is_repaired else "a part of it"
            lines += [f"this would repair {what}:", f"  {command}"]
        return lines

    def command(self, prefix: str) -> str:
        """Returns the edit that repairs it; empty if none is known.

        Args:
            prefix: path of the checkpoint.
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
    """Tells why a checkpoint cannot be restored; None if it can.

    Args:
        have: the checkpoint.
        want: the objects of the program; see `of_objects`.
    """
    problems = find_problems(have, want)
    if not problems:
        return None
    renames = find_renames(have, want, problems)
    repaired = have.renamed(renames) if renames else have
    rest = find_problems(repaired, want)
    drops: list[str] = []
    if not rest.missing and not rest.others:
        drops = tops(rest.left_over, repaired)
    # One cast for all below a name, where they all need the same.
    casts = {
        top: dtype
        for dtype in sorted(set(rest.dtypes.values()))
        for top in tops(
            [name for name in rest.dtypes if rest.dtypes[name] == dtype],
            repaired,
        )
    }
    num_repaired = len(rest.dtypes) + (len(rest.left_over) if drops else 0)
    differing = _differing(problems, have)
    return Misfit(
        tuple(sorted(problems.missing)),
        tuple(sorted(problems.left_over)),
        differing,
        renames,
        casts,
        tuple(drops),
        len(rest) == num_repaired,
        tuple(_summary(problems, differing, have, want)),
    )


def _differing(problems: Problems, have: Tree) -> dict[str, str]:
    """Says of each tensor that both have how it differs."""
    others = {
        name: f"{one} by one way, {two} by another"
        for name, (one, two) in problems.others.items()
    }
    dtypes = {
        name: f"{have[name].dtype} in the checkpoint, {dtype} in the program"
        for name, dtype in problems.dtypes.items()
        if name in have.keys
    }
    return {**problems.shapes, **others, **dtypes}


def _summary(
    problems: Problems, differing: Mapping[str, str], have: Tree, want: Tree
) -> Iterator[str]:
    """Yields the lines below the head, without the command."""
    room = _MAX_LINES - 3
    # Slots last: they differ as their variables do.
    names = sorted(differing, key=lambda name: (name in want.slots, name))
    sections = {
        "missing": _lines(problems.missing, want),
        "left over": _lines(problems.left_over, have),
        "differs": [f"{name}: {differing[name]}" for name in names],
    }
    sections = {title: lines for title, lines in sections.items() if lines}
    for number, (title, lines) in enumerate(sections.items()):
        share = room // (len(sections) - number)
        shown = lines if len(lines) <= share else lines[: share - 1]
        room -= len(shown)
        for line in shown:
            yield f"  {title:10} {line}"
        if len(lines) > len(shown):
            yield f"  {title:10} and {len(lines) - len(shown)} more"
            room -= 1


def _lines(names: Collection[str], tree: Tree) -> list[str]:
    """Writes names, one for all below it where all of them are meant."""
    return [
        f"{top}: {tree[top]}"
        if top in tree.keys
        else f"{top}/*: {len(tree.below(top))} tensors"
        for top in tops(names, tree)
    ]
