"""Reads checkpoints of any TensorFlow program without its code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from dtrain.bundle import fingerprint, index
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
    if not files.exists(f"{prefix}.index") and not index.is_v1(prefix):
        raise UserError(
            f"there is no checkpoint {prefix}; name it by its path without "
            ".index"
        )
    try:
        with literal(prefix) as plain:
            reader = tf.train.load_checkpoint(plain)
            dtypes = reader.get_variable_to_dtype_map()
            is_v1 = index.is_v1(prefix)
            for name in sorted(dtypes):
                if dtypes[name] == tf.variant:
                    # What no program reads but the iterator: its bytes count.
                    yield name, np.frombuffer(index.raw(prefix, name), np.uint8)
                    continue
                # The graph is read too: without it, it restores nothing.
                value = (
                    read(prefix, name, dtypes[name])
                    if is_v1
                    else reader.get_tensor(name)
                )
                if isinstance(value, bytes):
                    # One string has no array, and would be another one.
                    value = np.array(value, np.object_)
                if name != GRAPH_KEY:
                    yield name.removesuffix(VALUE), value
    except UserError:
        raise
    except DAMAGED as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{prefix} is no readable checkpoint: {first}"
        ) from error


def read(prefix: str, key: str, dtype: tf.DType) -> np.ndarray:
    """Reads a tensor of a checkpoint.

    Args:
        prefix: a local path, without `.index`.
        key: of the tensor.
        dtype: of the tensor.

    Raises:
        OpError: it is damaged, or there is no memory for it.
    """
    if not index.is_v1(prefix):
        return fingerprint.values_of(_restored(prefix, key, dtype))
    # TensorFlow puts parts together in what is of V2 alone.
    shape, parts = index.parts(prefix)[key]
    value = np.empty(shape, dtype.as_numpy_dtype)
    for part in parts:
        extents = ":".join(
            f"{side.start},{side.stop - side.start}" for side in part
        )
        spec = f"{' '.join(map(str, shape))} {extents}" if shape else ""
        value[part] = fingerprint.values_of(_restored(prefix, key, dtype, spec))
    return value


def _restored(
    prefix: str, key: str, dtype: tf.DType, part: str = ""
) -> tf.Tensor:
    # Not by the reader, which raises the same error for a file that is damaged
    # and for a memory that is full.
    with literal(prefix) as plain:
        [value] = tf.raw_ops.RestoreV2(
            prefix=plain,
            tensor_names=[key],
            shape_and_slices=[part],
            dtypes=[dtype],
        )
    return value


def digest(prefix: str) -> str:
    """Computes `fingerprint.digest` of a checkpoint.

    Args:
        prefix: the checkpoint's path without `.index`.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    return fingerprint.digest(variables(prefix))
