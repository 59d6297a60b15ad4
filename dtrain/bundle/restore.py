"""Restores a checkpoint, or changes nothing and says why.

TensorFlow finds late that a checkpoint does not fit: it has written to half of
the variables by then, and names nothing that a person would know.
"""

from __future__ import annotations

import tensorflow as tf

from dtrain.bundle import fit, reader
from dtrain.bundle.literal import literal
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
) -> None:
    """Restores all variables, or none.

    Args:
        checkpoint: what is restored into; its variables exist.
        prefix: where the checkpoint is, on the disk of this machine.
        name: its path for people: `prefix` may be a copy.
        what: what it should fit, for the error.
        remedy: what can be done if it does not fit.

    Raises:
        UserError: something is missing, left over, or of another shape or
            dtype; no variable is changed then.
        StorageError: it is damaged.
        OSError: the disk cannot be read.
    """
    headline = f"{name} does not fit {what}: "
    try:
        tree = reader.read(prefix)
    except UserError as error:
        # It was whole a moment ago, so the disk is at fault.
        raise StorageError(str(error)) from error
    misfit = fit.compare(tree, fit.of_objects(checkpoint))
    if misfit:
        raise UserError(
            f"{headline}{misfit.counts()}; {remedy}".rstrip("; "),
            misfit.lines(name),
        )
    with files.os_errors(), literal(prefix) as plain:
        status = checkpoint.restore(plain)
    if "save_counter" not in tree.keys:
        # Written by `Checkpoint.write`: there is no counter to restore.
        status.expect_partial()
        return
    try:
        # Objects without variables have to be there, too.
        status.assert_consumed()
    except _MISFITS as error:
        # Or TensorFlow prints, at exit, a line for each value without a place.
        tf.get_logger().setLevel("ERROR")
        first = _first_line(error)
        raise UserError(f"{headline}{first}; {remedy}".rstrip("; ")) from error


def _first_line(error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    # TensorFlow goes on with its graph of objects.
    return first.removesuffix(": attributes {").rstrip(".:")
