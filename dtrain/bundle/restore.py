"""Restores a checkpoint, or changes nothing and says why.

TensorFlow finds late that a checkpoint does not fit: it has written to half of
the variables by then, and names nothing that a person would know.
"""

from __future__ import annotations

import warnings
from typing import Any

import tensorflow as tf

from dtrain.bundle import fit, keras_state, objects, reader
from dtrain.bundle.fit import Misfit
from dtrain.bundle.literal import literal
from dtrain.bundle.tree import Tree, is_below
from dtrain.errors import StorageError, UserError
from dtrain.storage import files

# What TensorFlow raises where names or shapes are not those of the variables.
_MISFITS = (AssertionError, ValueError, tf.errors.InvalidArgumentError)


def restore(
    checkpoint: tf.train.Checkpoint,
    prefix: str,
    name: str,
    *,
    what: str = "the program",
    remedy: str = "",
    is_stock: bool = False,
) -> None:
    """Restores all variables, or none.

    Args:
        checkpoint: what is restored into; its variables exist.
        prefix: where the checkpoint is, on the disk of this machine.
        name: its path for people: `prefix` may be a copy.
        what: what it should fit, for the error.
        remedy: what can be done if it does not fit.
        is_stock: whether it may lack what TensorFlow does not find and
            `untracked` holds, which then stays as it is.

    Raises:
        UserError: something is missing, left over, or of another shape or
            dtype; no variable is changed then.
        StorageError: it is damaged.
        OSError: the disk cannot be read.
    """
    headline = f"{name} does not fit {what}: "
    tree = _read(prefix)
    misfit = _misfit(tree, checkpoint)
    is_partial = is_stock and _lacks_untracked(misfit)
    if misfit and not is_partial:
        raise UserError(
            f"{headline}{misfit.counts()}; {remedy}".rstrip("; "),
            misfit.lines(name),
        )
    status = _restored(checkpoint, prefix, headline)
    if is_partial:
        warnings.warn(
            f"{name} was saved by TensorFlow, which finds no vocabularies, nor "
            "all seeds and layers: what is in untracked stays as it was made",
            stacklevel=2,
        )
    if is_partial or "save_counter" not in tree.keys:
        # Written by `Checkpoint.write`: there is no counter to restore.
        status.expect_partial()
    else:
        _check(status, headline, remedy)


def _read(prefix: str) -> Tree:
    try:
        return reader.read(prefix)
    except UserError as error:
        # It was whole a moment ago, so the disk is at fault.
        raise StorageError(str(error)) from error


def _restored(
    checkpoint: tf.train.Checkpoint, prefix: str, headline: str
) -> Any:
    try:
        with files.os_errors(), literal(prefix) as plain:
            status = checkpoint.restore(plain)
    except ValueError as error:
        # Of what an object reads by itself, as a vocabulary.
        raise UserError(f"{headline}{_first_line(error)}") from error
    keras_state.settle(checkpoint)
    return status


def _check(status: Any, headline: str, remedy: str) -> None:
    """Refuses what TensorFlow has not restored as a whole.

    Raises:
        UserError: it has not.
    """
    try:
        # Objects without variables have to be there, too.
        status.assert_consumed()
    except _MISFITS as error:
        # Or TensorFlow prints, at exit, a line for each value without a place.
        tf.get_logger().setLevel("ERROR")
        first = _first_line(error)
        raise UserError(f"{headline}{first}; {remedy}".rstrip("; ")) from error


def _misfit(tree: Tree, checkpoint: tf.train.Checkpoint) -> Misfit | None:
    """Tells why a checkpoint does not fit, once what can be built is built."""
    want = fit.of_objects(checkpoint)
    misfit = fit.compare(tree, want)
    if misfit:
        owners, _ = objects.view_of(checkpoint).breadth_first_traversal()
        used = [
            owners[node]
            for name, node in want.optimizers.items()
            if any(is_below(left, name) for left in misfit.left_over)
        ]
        if keras_state.build_compiled(checkpoint, used):
            misfit = fit.compare(tree, fit.of_objects(checkpoint))
    return misfit


def _lacks_untracked(misfit: Misfit | None) -> bool:
    """Tells whether `untracked`, and nothing else, is missing."""
    return (
        misfit is not None
        and not misfit.left_over
        and not misfit.differing
        and all(is_below(name, "untracked") for name in misfit.missing)
    )


def _first_line(error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    # TensorFlow goes on with its graph of objects.
    return first.removesuffix(": attributes {").rstrip(".:")
