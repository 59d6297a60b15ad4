"""Edits of a checkpoint, each of which makes a tree of a tree.

Values are not computed before they are written: a tensor that is edited reads
the one that it comes from when it is read.
"""

from __future__ import annotations

import fnmatch
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
    """Finds the tensors that a pattern means.

    Args:
        tree: of the checkpoint.
        pattern: a name, which stands for all below it; or one with `*`, `?`
            or `[...]`, as of files, where `*` goes over slashes too.

    Returns:
        Their names; at least one.

    Raises:
        UserError: it means nothing.
    """
    found = tree.below(pattern)
    if not found:
        found = [name for name in tree if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise UserError(f"{pattern}: {tree_lib.unknown(tree, pattern)}")
    return found


def rename(changes: Mapping[str, str]) -> Edit:
    """Renames, all at once: two names can be swapped.

    Args:
        changes: new name by old one; all that is below a name goes with it.
    """
    return lambda tree: tree.renamed(changes)


def rename_all(pattern: str, replacement: str) -> Edit:
    """Renames by a regular expression.

    Args:
        pattern: is looked for in the full names of tensors.
        replacement: what it becomes, as in `re.sub`.

    Raises:
        UserError: (in the edit) it finds nothing, or is no expression.
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
        changes = _of_places(tree, new)
        if not changes:
            raise UserError(
                f"rename_all ({pattern}): no name changes; names are as in "
                f"{next(iter(tree), 'an empty checkpoint')}"
            )
        return tree.renamed(changes)

    return edit


def _of_places(tree: Tree, new: Mapping[str, str]) -> dict[str, str]:
    """Finds the objects whose renaming gives tensors their new names.

    The layers of a Keras model are found by their number, so that what is
    renamed is as far up as can be.
    """
    changes: dict[str, str] = {}
    for place in sorted(tree.places, key=lambda each: each.count("/")):
        inside = [name for name in new if tree_lib.is_below(name, place)]
        if not inside or any(
            tree_lib.is_below(place, each) for each in changes
        ):
            continue
        rest = inside[0][len(place) :]
        renamed = new[inside[0]].removesuffix(rest)
        follows = all(
            new[name] == renamed + name[len(place) :] for name in inside
        )
        if follows and renamed != place:
            changes[place] = renamed
    return changes


def drop(pattern: str) -> Edit:
    """Leaves out what a pattern means; see `matching`."""
    return lambda tree: tree.without(matching(tree, pattern))


def keep(patterns: Sequence[str]) -> Edit:
    """Leaves out what none of the patterns means; see `matching`."""

    def edit(tree: Tree) -> Tree:
        kept = {name for each in patterns for name in matching(tree, each)}
        return tree.without([name for name in tree if name not in kept])

    return edit


def cast(pattern: str, dtype: str) -> Edit:
    """Converts to another dtype: of a pattern's tensors those with fractions.

    Args:
        pattern: see `matching`. A pattern that means one tensor converts it
            whatever it holds; of several, steps and masks stay what they are.
        dtype: TensorFlow's name of it.
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
                name: Tensor(
                    target.name,
                    tree[name].shape,
                    _after(tree[name], lambda value: _cast(value, target)),
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


def _after(
    tensor: Tensor, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[], np.ndarray]:
    return lambda: change(tensor.read())


def scale(pattern: str, factor: float) -> Edit:
    """Multiplies, in the tensor's own dtype.

    Args:
        pattern: see `matching`.
        factor: any number.
    """

    def edit(tree: Tree) -> Tree:
        changes = {}
        for name in matching(tree, pattern):
            tensor = tree[name]
            if not _is_floating(tensor):
                raise UserError(
                    f"scale ({name}): it holds {tensor.dtype}, and only "
                    "fractions can be scaled; use set"
                )

            def scaled(value: np.ndarray) -> np.ndarray:
                return (value * np.asarray(factor, value.dtype)).astype(
                    value.dtype
                )

            changes[name] = Tensor(
                tensor.dtype, tensor.shape, _after(tensor, scaled)
            )
        return tree.with_tensors(changes)

    return edit


def fill(pattern: str, value: Any) -> Edit:
    """Gives all values of each tensor the same value.

    Args:
        pattern: see `matching`.
        value: of the tensor's dtype.
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
                lambda one=one, shape=tensor.shape: np.full(
                    shape, one, one.dtype
                ),
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
        made = Tensor(tensor.dtype, tensor.shape, lambda: array)
        return tree.with_tensors({name: made})

    return edit


def _as_array(what: str, value: Any, dtype: str) -> np.ndarray:
    """Makes an array of what a user wrote, which has to be kept exactly.

    Raises:
        UserError: it is not of that dtype.
    """
    kind = tf.as_dtype(dtype).as_numpy_dtype
    try:
        if dtype == "string":
            return np.asarray(tf.constant(value, tf.string).numpy(), np.object_)
        array = np.asarray(value)
        made = array.astype(kind)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{what}: {value!r} is no {dtype}") from error
    is_kept = tf.as_dtype(dtype).is_floating or np.array_equal(
        made.astype(array.dtype), array
    )
    if array.dtype.kind not in "biufc" or not is_kept:
        raise UserError(f"{what}: {value!r} is no {dtype}")
    return made


def copy(target: str, source: Tree, name: str) -> Edit:
    """Takes values from another checkpoint; the dtypes have to be the same.

    Args:
        target: name of a tensor, or of all below it.
        source: the other checkpoint, open until the edited one is written.
        name: of what is taken there.
    """

    def edit(tree: Tree) -> Tree:
        names = tree.below(target)
        if not names:
            raise UserError(
                f"copy ({target}): {tree_lib.unknown(tree, target)}"
            )
        changes = {}
        for each in names:
            other = name + each[len(target) :]
            if other not in source.keys:
                raise UserError(
                    f"copy ({each}): the other checkpoint holds no {other}"
                )
            changes[each] = source[other]
            have, want = source[other], tree[each]
            if (have.dtype, have.shape) != (want.dtype, want.shape):
                raise UserError(
                    f"copy ({each}): it is {want.dtype}{list(want.shape)}, and "
                    f"{other} is {have.dtype}{list(have.shape)}"
                )
        return tree.with_tensors(changes)

    return edit


def zero_slots(optimizer: str) -> Edit:
    """Makes an optimizer forget its moments, and count from 0.

    Args:
        optimizer: its name; `*` is each.
    """

    def edit(tree: Tree) -> Tree:
        names = _slots(tree, optimizer)
        names += [
            f"{each}/iterations"
            for each in _optimizers(tree, optimizer)
            if f"{each}/iterations" in tree.keys
        ]
        return _zeroed(tree, names)

    return edit


def _zeroed(tree: Tree, names: Sequence[str]) -> Tree:
    for name in names:
        tree = fill(name, 0)(tree)
    return tree


def drop_slots(optimizer: str) -> Edit:
    """Leaves out what an optimizer keeps for each variable.

    Args:
        optimizer: its name; `*` is each.
    """
    return lambda tree: tree.without(_slots(tree, optimizer))


def _optimizers(tree: Tree, name: str) -> list[str]:
    """Finds optimizers.

    Raises:
        UserError: there is none of that name.
    """
    found = [
        each for each in tree.optimizers if fnmatch.fnmatchcase(each, name)
    ]
    if not found:
        raise UserError(
            f"{name} is no optimizer of the checkpoint; there: "
            f"{', '.join(tree.optimizers) or 'none'}"
        )
    return found


def _slots(tree: Tree, optimizer: str) -> list[str]:
    return [
        name
        for each in _optimizers(tree, optimizer)
        for name in tree.below(each)
        if name in tree.slots
    ]


def set_step(step: int) -> Edit:
    """Sets what counts the steps: `step` and TensorFlow's `save_counter`.

    Args:
        step: at least 0.
    """

    def edit(tree: Tree) -> Tree:
        if step < 0:
            raise UserError(f"set_step ({step}) must be at least 0")
        names = [name for name in tree_lib.STEPS if name in tree.keys]
        if not names:
            raise UserError(
                "set_step: the checkpoint holds none of "
                f"{', '.join(tree_lib.STEPS)}; use set with the name it has"
            )
        for name in names:
            tree = put(name, step)(tree)
        return tree

    return edit
