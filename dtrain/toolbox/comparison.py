"""How two checkpoints differ, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from dtrain.bundle.tree import Tree
from dtrain.toolbox import numbers

Kind = Literal["renamed", "missing", "extra", "dtype", "shape", "changed"]


class Difference(NamedTuple):
    """One tensor that is not the same in B as it is in A.

    Attributes:
        name: of the tensor.
        kind: missing in B, extra in B, or what of it differs; renamed if B
            has it under another name, as after an edit that is not written.
        text: what it was in A and is in B, for people.
        change: how far the values are apart; None unless `kind` is changed.
    """

    name: str
    kind: Kind
    text: str
    change: numbers.Change | None = None

    def __str__(self) -> str:
        """Returns a line."""
        return f"{self.kind:8}{self.name}  {self.text}"


def differences(
    a: Tree, b: Tree, tolerance: float = 0.0
) -> Iterator[Difference]:
    """Compares two checkpoints; reads two tensors at a time.

    The states of iterators, which nothing can read, are passed over.

    Args:
        a: one.
        b: the other.
        tolerance: two values that differ by at most this count as the same;
            at least 0, and 0 compares bits.

    Yields:
        What differs, by name. Nothing if and only if all names, dtypes and
        shapes are the same and all values are within the tolerance.
    """
    # An edit that is not written yet reads from where its source does; two
    # files never share what they read from.
    new = {b[name].read: name for name in b if name not in a.keys}
    renamed = {name: new[a[name].read] for name in a if a[name].read in new}
    for name in sorted({*a, *b} - set(renamed.values())):
        if name in renamed:
            yield Difference(name, "renamed", f"-> {renamed[name]}")
        elif name not in b.keys:
            yield Difference(name, "missing", str(a[name]))
        elif name not in a.keys:
            yield Difference(name, "extra", str(b[name]))
        else:
            yield from _difference(a, b, name, tolerance)


def _difference(
    a: Tree, b: Tree, name: str, tolerance: float
) -> Iterator[Difference]:
    x, y = a[name], b[name]
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        kind = "shape" if x.dtype == y.dtype else "dtype"
        yield Difference(name, kind, f"{x} -> {y}")
    elif x.read is not y.read and x.dtype != "variant":
        change = numbers.compare(x.read(), y.read())
        if change and change.max_abs > tolerance:
            num_values = max(1, math.prod(x.shape))
            text = (
                f"{change.num_changed:,} of {num_values:,} values, by up to "
                f"{change.max_abs:.3g}, rms {change.rms:.3g}"
            )
            yield Difference(name, "changed", text, change)
