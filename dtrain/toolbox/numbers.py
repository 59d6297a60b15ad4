"""What can be said of a tensor, and of two of them, in some numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# As many are converted to float64 at once.
_CHUNK = 1 << 20


class Summary(NamedTuple):
    """What a tensor holds.

    Attributes:
        min: the smallest that is a number; None if there is none.
        max: the largest.
        mean: of those that are finite.
        std: their standard deviation, of the population.
        nan_share: of all, between 0 and 1; of infinities as well.
        zero_share: of all, between 0 and 1.
    """

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    nan_share: float
    zero_share: float


def is_numeric(array: np.ndarray) -> bool:
    """Tells whether a tensor has numbers: strings and complex ones have not."""
    return array.dtype.kind in "biuf" or array.dtype.name.startswith(
        ("bfloat", "float", "int", "uint")
    )


def summarize(array: np.ndarray) -> Summary | None:
    """Computes what is told of a tensor.

    Args:
        array: of any dtype and shape.

    Returns:
        None for what has no numbers, or is empty.
    """
    if not is_numeric(array) or not array.size:
        return None
    num_finite = num_zero = 0
    low, high, total = np.inf, -np.inf, 0.0
    for part in _wide_chunks(array):
        finite = part[np.isfinite(part)]
        num_zero += int(np.count_nonzero(part == 0))
        num_finite += finite.size
        if finite.size:
            low, high = min(low, finite.min()), max(high, finite.max())
            total += float(finite.sum())
    if not num_finite:
        return Summary(None, None, None, None, 1.0, 0.0)
    mean = total / num_finite
    squares = sum(
        float(np.square(part[np.isfinite(part)] - mean).sum())
        for part in _wide_chunks(array)
    )
    return Summary(
        float(low),
        float(high),
        mean,
        float(np.sqrt(squares / num_finite)),
        1 - num_finite / array.size,
        num_zero / array.size,
    )


def _wide_chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for part in _chunks(array):
        yield part.astype(np.float64)


class Change(NamedTuple):
    """How two tensors of one shape differ.

    Attributes:
        num_changed: how many of their values do, by their bits.
        max_abs: the largest difference; inf where one of two is not finite.
        rms: the root of the mean square of all differences.
    """

    num_changed: int
    max_abs: float
    rms: float


def compare(a: np.ndarray, b: np.ndarray) -> Change | None:
    """Computes how two tensors differ.

    Args:
        a: of any dtype.
        b: of the same shape and dtype.

    Returns:
        None if all bits are the same.
    """
    if a.dtype == np.object_:
        num = int(np.count_nonzero(np.asarray(a != b)))
        return Change(num, np.inf, np.inf) if num else None
    num_changed, largest, squares = 0, 0.0, 0.0
    for x, y in zip(_chunks(a), _chunks(b), strict=True):
        # -0.0 is not 0.0 here, and NaN is itself.
        differs = np.any(_bits(x) != _bits(y), axis=-1)
        if not differs.any():
            continue
        num_changed += int(np.count_nonzero(differs))
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.abs(x[differs].astype(wide) - y[differs].astype(wide))
        gap = np.where(np.isnan(gap), np.inf, gap)
        largest = max(largest, float(gap.max()))
        squares += float(np.square(gap).sum())
    if not num_changed:
        return None
    return Change(num_changed, largest, float(np.sqrt(squares / a.size)))


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns the values of a part as rows of bytes."""
    return array.view(np.uint8).reshape(array.size, array.itemsize)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the values in their order, a part at a time."""
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]
