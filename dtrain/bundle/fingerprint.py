"""What tensors were when they were written: dtype, shape and checksum."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

# The graph of the objects in a checkpoint, beside their values.
GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
# What TensorFlow puts behind the name of a variable.
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# The dtype of what only its owner reads, as an iterator of tf.data.
VARIANT = "variant"


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a tensor must be.

    Attributes:
        dtype: TensorFlow's name of it, as in `float32`.
        shape: its dimensions.
        sha256: of its bytes, see `checksum`.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def digest(variables: Iterable[tuple[str, np.ndarray]]) -> str:
    """Computes one SHA-256 over all variables of a state.

    Two states have the same one if and only if their variables have the same
    names, dtypes, shapes and bytes.

    Args:
        variables: their names, without what TensorFlow puts behind them, and
            values, sorted by name.
    """
    total = hashlib.sha256()
    for name, value in variables:
        array = np.asarray(value)
        parts = list(_bytes(array))
        size = sum(map(len, parts))
        head = f"{len(name)}:{name}:{array.dtype.name}:{array.shape}:{size}:"
        total.update(head.encode())
        for part in parts:
            total.update(part)
    return total.hexdigest()


def values_of(tensor: tf.Tensor) -> np.ndarray:
    """Returns the values of a tensor, not copied where that can be.

    Args:
        tensor: of numbers or strings; in the memory of the host.
    """
    if tensor.shape.rank:
        return np.asarray(tensor)
    # NumPy makes no array of a bfloat16 scalar of TensorFlow's.
    return np.array(tensor.numpy(), tensor.dtype.as_numpy_dtype)


def of(value: np.ndarray, dtype: str = "") -> Fingerprint:
    """Computes the fingerprint of a tensor.

    Args:
        value: numbers of any dtype, or strings (dtype object).
        dtype: TensorFlow's name of it, where the value does not tell; that of a
            variant is the bytes that it has in a file.
    """
    array = np.asarray(value)
    # TensorFlow has NumPy's names, but for strings.
    kind = "string" if array.dtype == np.object_ else array.dtype.name
    return Fingerprint(dtype or kind, array.shape, checksum(array))


def checksum(array: np.ndarray) -> str:
    """Computes the SHA-256, 64 hexadecimal digits, of a tensor's bytes.

    Args:
        array: in C order; a string counts with its length.
    """
    total = hashlib.sha256()
    for part in _bytes(array):
        total.update(part)
    return total.hexdigest()


def _bytes(array: np.ndarray) -> Iterator[bytes | memoryview]:
    """Yields the bytes in their order; those of a string after its length."""
    if array.dtype == np.object_:
        for text in array.flat:
            yield b"%d:%b" % (len(text), text)
    else:
        # A view of the bytes: a copy would double the memory of a save.
        plain = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        yield memoryview(plain)  # type: ignore[arg-type]
