"""Edits of a checkpoint: functions that make another tree of a tree.

An edit computes no values. It makes tensors that compute theirs from the old
ones when they are read, which is when the result is written.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.bundle import tree as tree_lib
from dtrain.bundle.tree import Tensor, Tree
from dtrain.errors import UserError

Edit = Callable[[Tree], Tree]


def matching(tree: Tree, pattern: str) -> list[str]:
    """Lists the tensors that a pattern stands for; at least one.

    Args:
        tree: of the checkpoint.
        pattern: a name, which stands for itself and all below it; or a
            pattern as of files of such names, with `*`, `?` or `[...]`, whose
            `*` stands for slashes too.

    Raises:
        UserError: it stands for none.
    """
    names = tree.below(pattern) or [
        name
        for name in tree
        if any(fnmatch.fnmatchcase(top, pattern) for top in tree_lib.tops(name))
    ]
    if not names:
        raise UserError(f"{pattern}: {tree_lib.unknown(tree, pattern)}")
    return names


def rename(changes: Mapping[str, str]) -> Edit:
    """Renames, all at once: two names can be swapped.

    Args:
        changes: new name by old one; all that is below a name goes with it.
    """
    return lambda tree: tree.renamed(changes)


def rename_all(pattern: str, replacement: str) -> Edit:
    """Renames by a regular expression.

    Args:
        pattern: looked for in the full names of tensors, as by `re.sub`.
        replacement: what each match becomes; may refer to groups.

    Raises:
        UserError: (by the edit) no name matches, or it is no expression.
    """

    def edit(tree: Tree) -> Tree:
        try:
            new = {
                name: re.sub(pattern, replacement, name)
                for name in tree
                if name not in tree.slots
            }
        except (re.error, IndexError) as error:
            raise UserError(
                f"rename_all ({pattern}={replacement}) is no regular "
                f"expression: {error}"
            ) from error
        changes = _renamed_objects(tree, new)
        if not changes:
            raise UserError(
                f"rename_all ({pattern}): no name changes; names are as in "
                f"{next(iter(tree), 'an empty checkpoint')}"
            )
        return tree.renamed(changes)

    return edit


def _renamed_objects(tree: Tree, new: Mapping[str, str]) -> dict[str, str]:
    """Finds the objects whose renaming gives tensors their new names.

    The highest that does: below it are the layers of a Keras model, which have
    a number and cannot be renamed.
    """
    changes: dict[str, str] = {}
    for top in sorted(tree.places, key=lambda name: name.count("/")):
        inside = [name for name in new if tree_lib.is_below(name, top)]
        if not inside or any(tree_lib.is_below(top, old) for old in changes):
            continue
        renamed = new[inside[0]].removesuffix(inside[0][len(top) :])
        follows = all(
            new[name] == renamed + name[len(top) :] for name in inside
        )
        if follows and renamed != top:
            changes[top] = renamed
    return changes


def drop(pattern: str) -> Edit:
    """Leaves out the tensors of a pattern; see `matching`."""
    return lambda tree: tree.without(matching(tree, pattern))


def keep(patterns: Sequence[str]) -> Edit:
    """Leaves out the tensors of none of the patterns; see `matching`."""

    def edit(tree: Tree) -> Tree:
        kept = {
            name for pattern in patterns for name in matching(tree, pattern)
        }
        return tree.without([name for name in tree if name not in kept])

    return edit


def cast(pattern: str, dtype: str) -> Edit:
    """Converts tensors to another dtype.

    Args:
        pattern: see `matching`. If it stands for a single tensor, that one is
            converted whatever numbers it holds; of several, only those with
            fractions: steps and masks stay what they are.
        dtype: TensorFlow's name of the new dtype, as in `bfloat16`.
    """

    def edit(tree: Tree) -> Tree:
        try:
            target = tf.as_dtype(dtype)
        except TypeError as error:
            raise UserError(
                f"cast ({dtype}) is no dtype; try float32, bfloat16 or float16"
            ) from error
        if not _is_number(dtype):
            raise UserError(f"cast ({dtype}) must be a dtype of numbers")
        names = matching(tree, pattern)
        if len(names) > 1:
            names = [name for name in names if _is_floating(tree[name])]
        for name in names:
            if not _is_number(tree[name].dtype):
                raise UserError(f"cast ({name}): it holds {tree[name].dtype}")
        return tree.with_tensors(
            {
                name: _computed(
                    tree[name], target.name, lambda value: _cast(value, target)
                )
                for name in names
            }
        )

    return edit


def _is_floating(tensor: Tensor) -> bool:
    return tf.as_dtype(tensor.dtype).is_floating


def _is_number(dtype: str) -> bool:
    return dtype not in ("string", "variant", "resource")


def _cast(value: np.ndarray, dtype: tf.DType) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(dtype.as_numpy_dtype)


def _computed(
    tensor: Tensor, dtype: str, change: Callable[[np.ndarray], np.ndarray]
) -> Tensor:
    """Makes a tensor whose value is computed when it is read."""
    return Tensor(dtype, tensor.shape, lambda: change(tensor.read()))


def scale(pattern: str, factor: float) -> Edit:
    """Multiplies tensors by a number, in their own dtype.

    Args:
        pattern: see `matching`; all its tensors have to have fractions.
        factor: a finite number.

    Raises:
        UserError: it is not finite.
    """
    if not math.isfinite(factor):
        raise UserError(
            f"scale ({pattern}={factor}) must be a finite number, or nothing "
            "goes on from the result"
        )

    def scaled(value: np.ndarray) -> np.ndarray:
        return (value * np.asarray(factor, value.dtype)).astype(value.dtype)

    def edit(tree: Tree) -> Tree:
        changes = {}
        for name in matching(tree, pattern):
            tensor = tree[name]
            if not _is_floating(tensor):
                raise UserError(
                    f"scale ({name}): it holds {tensor.dtype}, and only "
                    "fractions can be scaled; use set"
                )
            changes[name] = _computed(tensor, tensor.dtype, scaled)
        return tree.with_tensors(changes)

    return edit


def fill(pattern: str, value: Any) -> Edit:
    """Fills tensors with a single value.

    Args:
        pattern: see `matching`.
        value: a number or a text that the dtype of each tensor can hold.
    """

    def edit(tree: Tree) -> Tree:
        changes = {}
        for name in matching(tree, pattern):
            tensor = tree[name]
            one = _as_array(f"fill ({name})", value, tensor.dtype)
            if one.shape:
                raise UserError(f"fill ({name}={value}) must be a single value")
            changes[name] = Tensor(
                tensor.dtype,
                tensor.shape,
                functools.partial(np.full, tensor.shape, one, one.dtype),
            )
        return tree.with_tensors(changes)

    return edit


def put(name: str, value: Any) -> Edit:
    """Sets a tensor, whose dtype and shape stay.

    Args:
        name: of one tensor.
        value: a number, a text, or lists of them in the tensor's shape.
    """

    def edit(tree: Tree) -> Tree:
        if name not in tree.keys:
            raise UserError(f"set ({name}): {tree_lib.unknown(tree, name)}")
        tensor = tree[name]
        array = _as_array(f"set ({name})", value, tensor.dtype)
        if array.shape != tensor.shape:
            raise UserError(
                f"set ({name}): a value of the shape {list(array.shape)} for "
                f"one of {list(tensor.shape)}; use fill for a single value"
            )
        changed = Tensor(tensor.dtype, tensor.shape, lambda: array)
        return tree.with_tensors({name: changed})

    return edit


def _as_array(option: str, value: Any, dtype: str) -> np.ndarray:
    """Makes an array of what a user wrote, which has to be kept exactly.

    Raises:
        UserError: the dtype cannot hold it.
    """
    kind = tf.as_dtype(dtype).as_numpy_dtype
    try:
        if dtype == "string":
            return np.asarray(tf.constant(value, tf.string).numpy(), np.object_)
        array = np.asarray(value)
        converted = array.astype(kind)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{option}: {value!r} is no {dtype}") from error
    is_kept = tf.as_dtype(dtype).is_floating or np.array_equal(
        converted.astype(array.dtype), array
    )
    if array.dtype.kind not in "biufc" or not is_kept:
        raise UserError(f"{option}: {value!r} is no {dtype}")
    # An infinity may be a mask.
    if np.isnan(array).any():
        raise UserError(
            f"{option}: {value!r} is no number, and nothing goes on from one"
        )
    return converted


def copy(target: str, source: Tree, name: str) -> Edit:
    """Takes values from another checkpoint; the dtypes have to be the same.

    Args:
        target: name of what is replaced: a tensor, or all below a name.
        source: the other checkpoint, open until the edited one is written.
        name: what it is called in the other checkpoint.
    """

    def edit(tree: Tree) -> Tree:
        names = tree.below(target)
        if not names:
            raise UserError(
                f"copy ({target}): {tree_lib.unknown(tree, target)}"
            )
        changes = {}
        for replaced in names:
            other = name + replaced[len(target) :]
            if other not in source.keys:
                raise UserError(
                    f"copy ({replaced}): the other checkpoint holds no {other}"
                )
            changes[replaced] = source[other]
            have, want = source[other], tree[replaced]
            if (have.dtype, have.shape) != (want.dtype, want.shape):
                raise UserError(
                    f"copy ({replaced}): it is {want}, and {other} is {have}"
                )
        return tree.with_tensors(changes)

    return edit


def zero_slots(optimizer: str) -> Edit:
    """Makes an optimizer forget its moments, and count from 0.

    Args:
        optimizer: its name, or a pattern; `*` means all optimizers.
    """

    def edit(tree: Tree) -> Tree:
        counters = [
            f"{name}/iterations" for name in _optimizers(tree, optimizer)
        ]
        for name in (*_slots(tree, optimizer), *counters):
            if name in tree.keys:
                tree = fill(name, 0)(tree)
        return tree

    return edit


def drop_slots(optimizer: str) -> Edit:
    """Leaves out what an optimizer keeps for each variable.

    Args:
        optimizer: its name, or a pattern; `*` means all optimizers.
    """
    return lambda tree: tree.without(_slots(tree, optimizer))


def _optimizers(tree: Tree, name: str) -> list[str]:
    optimizers = [
        known for known in tree.optimizers if fnmatch.fnmatchcase(known, name)
    ]
    if not optimizers:
        raise UserError(
            f"{name} is no optimizer of the checkpoint; there: "
            f"{', '.join(tree.optimizers) or 'none'}"
        )
    return optimizers


def _slots(tree: Tree, optimizer: str) -> list[str]:
    return [
        name
        for top in _optimizers(tree, optimizer)
        for name in tree.below(top)
        if name in tree.slots
    ]


def set_step(step: int) -> Edit:
    """Sets all that counts the steps of a run, as `step` and `save_counter`.

    Args:
        step: at least 0.
    """

    def edit(tree: Tree) -> Tree:
        if step < 0:
            raise UserError(f"set_step ({step}) must be at least 0")
        # TensorFlow's counts the saves, and some programs have no other.
        counters = (*tree_lib.STEPS, "save_counter")
        names = [name for name in counters if name in tree.keys]
        if not names:
            raise UserError(
                "set_step: the checkpoint holds none of "
                f"{', '.join(counters)}; use set with the name it has"
            )
        for name in names:
            tree = put(name, step)(tree)
        return tree

    return edit
