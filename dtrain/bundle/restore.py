"""Restores a checkpoint, or changes nothing and says why.

What TensorFlow says of one that does not fit comes late: it has written to half
of the variables by then, and has no name that a person would know.
"""

from __future__ import annotations

import tensorflow as tf

from dtrain.bundle import fit, reader
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
        name: what it is called, which may be elsewhere.
        what: it should fit.
        remedy: what can be done about it if it does not.

    Raises:
        UserError: something is missing, left over, or of another shape or
            dtype; no variable is changed then.
        StorageError: it is damaged.
        OSError: the disk cannot be read.
    """
    told = f"{name} does not fit {what}: "
    try:
        tree = reader.read(prefix)
    except UserError as error:
        # It was found to be whole a moment ago.
        raise StorageError(str(error)) from error
    misfit = fit.compare(tree, fit.of_objects(checkpoint))
    if misfit:
        raise UserError(
            f"{told}{misfit.counts()}; {remedy}".rstrip("; "),
            misfit.lines(name),
        )
    with files.os_errors():
        status = checkpoint.restore(prefix)
    if "save_counter" not in tree.keys:
        # Written by `Checkpoint.write`: there is no counter to restore.
        status.expect_partial()
        return
    try:
        # Objects without variables have to be there, too.
        status.assert_consumed()
    except _MISFITS as error:
        # Or TensorFlow adds, at exit, a line for each value that has no place.
        tf.get_logger().setLevel("ERROR")
        first = _first_line(error)
        raise UserError(f"{told}{first}; {remedy}".rstrip("; ")) from error


def _first_line(error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    # Without the graph of objects that TensorFlow begins to show.
    return first.removesuffix(": attributes {").rstrip(".:")
