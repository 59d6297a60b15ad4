"""Figures of a tensor, and of the difference of two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

# Values that are converted to float64 at once.
_CHUNK = 1 << 20


class Summary(NamedTuple):
    """What a tensor holds.

    Attributes:
        min: the smallest finite value; None, as the next three, if there is
            none.
        max: the largest finite value.
        mean: of the finite values.
        std: their standard deviation, of the population.
        nan_share: how many of all are NaN or infinite, between 0 and 1.
        zero_share: how many of all are 0, between 0 and 1.
    """

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    nan_share: float
    zero_share: float


def is_numeric(array: np.ndarray) -> bool:
    """Tells whether a tensor holds real numbers, no strings or complex ones."""
    return array.dtype.kind in "biuf" or array.dtype.name.startswith(
        ("bfloat", "float", "int", "uint")
    )


def summarize(array: np.ndarray) -> Summary | None:
    """Computes the figures of a tensor; None for an empty one or no numbers.

    Args:
        array: of any dtype and shape.
    """
    if not is_numeric(array) or not array.size:
        return None
    num_finite = num_zero = 0
    low, high, total = np.inf, -np.inf, 0.0
    for part in _chunks(array, np.float64):
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
        for part in _chunks(array, np.float64)
    )
    return Summary(
        float(low),
        float(high),
        mean,
        float(np.sqrt(squares / num_finite)),
        1 - num_finite / array.size,
        num_zero / array.size,
    )


class Change(NamedTuple):
    """How two tensors of one shape differ.

    Attributes:
        num_changed: how many values have other bits.
        max_abs: the largest difference; inf where one of two is not finite.
        rms: the root of the mean square of all differences, 0 or not.
    """

    num_changed: int
    max_abs: float
    rms: float


def compare(a: np.ndarray, b: np.ndarray) -> Change | None:
    """Computes how two tensors differ; None if all bits are the same.

    Args:
        a: of any dtype.
        b: of the same shape and dtype.
    """
    if a.dtype == np.object_:
        num = int(np.count_nonzero(np.asarray(a != b)))
        return Change(num, np.inf, np.inf) if num else None
    num_changed, largest, squares = 0, 0.0, 0.0
    for x, y in zip(_chunks(a), _chunks(b), strict=True):
        # By their bits: -0.0 is not 0.0 here, and NaN equals itself.
        rows = [part.view(np.uint8).reshape(part.size, -1) for part in (x, y)]
        differs = np.any(rows[0] != rows[1], axis=-1)
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


def _chunks(array: np.ndarray, dtype: Any = None) -> Iterator[np.ndarray]:
    """Yields the values in their order, a part at a time, as a dtype."""
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        yield part if dtype is None else part.astype(dtype)
