"""Reads checkpoints of any TensorFlow 2 program without its code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from dtrain.errors import UserError
from dtrain.storage import files

_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
# What TensorFlow raises on a file that is cut or whose bytes have changed.
DAMAGED = (tf.errors.OpError, ValueError, RuntimeError, IndexError)
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


def variables(prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the variables of a checkpoint, one after the other.

    Args:
        prefix: the checkpoint's path without `.index`.

    Yields:
        Name, as in `generator/layer/kernel`, and value, sorted by name.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if not files.exists(f"{prefix}.index"):
        raise UserError(
            f"there is no checkpoint {prefix}; name it by its path without "
            ".index"
        )
    try:
        reader = tf.train.load_checkpoint(prefix)
        names = sorted(reader.get_variable_to_shape_map())
        for name in names:
            # The graph is read too: a checkpoint without it restores nothing.
            value = reader.get_tensor(name)
            if name != _GRAPH_KEY:
                yield name.removesuffix(_SUFFIX), value
    except DAMAGED as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{prefix} is no readable checkpoint: {first}"
        ) from error


def digest(prefix: str) -> str:
    """Computes one SHA-256 over all variables of a checkpoint.

    Two checkpoints have the same one if and only if their variables have the
    same names, dtypes, shapes and bytes.

    Args:
        prefix: the checkpoint's path without `.index`.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    total = hashlib.sha256()
    for name, value in variables(prefix):
        array = np.asarray(value)
        data = _bytes(array)
        kind, shape = array.dtype.name, array.shape
        head = f"{len(name)}:{name}:{kind}:{shape}:{len(data)}:"
        total.update(head.encode())
        total.update(data)
    return total.hexdigest()


def _bytes(array: np.ndarray) -> bytes:
    """Returns the values in their order; strings each after its length."""
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(b"%d:%b" % (len(text), text) for text in array.flat)
