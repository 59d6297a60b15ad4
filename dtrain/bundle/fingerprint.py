"""What a tensor was when it was written: dtype, shape and checksum."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf


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


def values_of(tensor: tf.Tensor) -> np.ndarray:
    """Returns the values of a tensor, not copied where that can be.

    Args:
        tensor: of numbers or strings; in the memory of the host.
    """
    if tensor.shape.rank:
        return np.asarray(tensor)
    # NumPy makes no array of a bfloat16 scalar of TensorFlow's.
    return np.array(tensor.numpy(), tensor.dtype.as_numpy_dtype)


def of(value: np.ndarray) -> Fingerprint:
    """Computes the fingerprint of a tensor.

    Args:
        value: numbers of any dtype, or strings (dtype object).
    """
    array = np.asarray(value)
    # TensorFlow has NumPy's names, but for strings.
    kind = "string" if array.dtype == np.object_ else array.dtype.name
    return Fingerprint(kind, array.shape, checksum(array))


def checksum(array: np.ndarray) -> str:
    """Computes the SHA-256 of a tensor's bytes; strings have their lengths.

    Args:
        array: in C order.

    Returns:
        64 hexadecimal digits.
    """
    total = hashlib.sha256()
    if array.dtype == np.object_:
        for text in array.flat:
            total.update(b"%d:" % len(text))
            total.update(text)
    else:
        # A view of the bytes: a copy would double the memory of a save.
        plain = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        total.update(memoryview(plain))  # type: ignore[arg-type]
    return total.hexdigest()
