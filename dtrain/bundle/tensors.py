"""Reads checkpoints of any TensorFlow 2 program without its code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from dtrain.bundle import fingerprint
from dtrain.bundle.fingerprint import GRAPH_KEY, VALUE
from dtrain.bundle.literal import literal
from dtrain.errors import UserError
from dtrain.storage import files

# What TensorFlow raises on a file that is cut or whose bytes have changed.
DAMAGED = (tf.errors.OpError, ValueError, RuntimeError, IndexError)


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
        with literal(prefix) as plain:
            reader = tf.train.load_checkpoint(plain)
            names = sorted(reader.get_variable_to_shape_map())
            for name in names:
                # The graph is read too: without it, it restores nothing.
                value = reader.get_tensor(name)
                if name != GRAPH_KEY:
                    yield name.removesuffix(VALUE), value
    except UserError:
        raise
    except DAMAGED as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{prefix} is no readable checkpoint: {first}"
        ) from error


def digest(prefix: str) -> str:
    """Computes `fingerprint.State.digest` of a checkpoint.

    Args:
        prefix: the checkpoint's path without `.index`.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    state = fingerprint.State()
    for name, value in variables(prefix):
        state.add(name, value)
    return state.digest
