"""What is in a checkpoint, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dtrain.bundle.tree import Tree
from dtrain.checkpoint.listing import columns, size
from dtrain.toolbox import numbers


class Row(NamedTuple):
    """What is told of a tensor.

    Attributes:
        name: of the tensor.
        part: the network or the optimizer that it is counted to.
        key: TensorFlow's.
        dtype: TensorFlow's name of it.
        shape: its dimensions.
        num_values: their product.
        num_bytes: of its values; of strings those of their lengths alone.
        summary: of its values; None if it has no numbers, or they were not
            read.
    """

    name: str
    part: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    num_values: int
    num_bytes: int
    summary: numbers.Summary | None


def rows(
    tree: Tree, names: Iterable[str], *, read: bool = True
) -> Iterator[Row]:
    """Looks at tensors, one after the other.

    Args:
        tree: of the checkpoint.
        names: of the tensors.
        read: whether values are read; without, it takes an instant.

    Yields:
        A row for each.
    """
    for name in names:
        tensor = tree[name]
        # What an iterator keeps is not for reading.
        value = tensor.read() if read and tensor.dtype != "variant" else None
        yield Row(
            name,
            tree.part(name),
            tree.keys[name],
            tensor.dtype,
            tensor.shape,
            math.prod(tensor.shape),
            tensor.num_bytes,
            None if value is None else numbers.summarize(value),
        )


def to_json(row: Row) -> dict[str, Any]:
    """Returns a row as JSON's own types; what is not finite is None."""
    summary = row.summary._asdict() if row.summary else {}
    return {
        **row._asdict(),
        "shape": list(row.shape),
        "summary": {
            name: value if value is None or math.isfinite(value) else None
            for name, value in summary.items()
        },
    }


def totals(found: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Counts tensors, values and bytes of each network and optimizer."""
    sums: dict[str, dict[str, int]] = {}
    for row in found:
        one = sums.setdefault(row.part, {"tensors": 0, "values": 0, "bytes": 0})
        one["tensors"] += 1
        one["values"] += row.num_values
        one["bytes"] += row.num_bytes
    return sums


def lines(found: list[Row]) -> list[str]:
    """Writes a tree, a line for each tensor below a line for each part.

    Args:
        found: at least one row.
    """
    table: list[tuple[str, ...]] = [
        ("name", "dtype", "shape", "bytes", *_FIELDS)
    ]
    for part, sums in totals(found).items():
        of_values = f"{sums['values']:,} values"
        table.append(
            (part, "", of_values, size(sums["bytes"]), *[""] * len(_FIELDS))
        )
        for row in found:
            if row.part == part and row.name != part:
                table.append(_cells(row, f"  {row.name[len(part) + 1 :]}"))
            elif row.part == part:
                table[-1] = _cells(row, row.name)
    total = size(sum(row.num_bytes for row in found))
    count = f"{sum(row.num_values for row in found):,} values"
    table.append(("total", "", count, total, *[""] * len(_FIELDS)))
    return columns(table, right="bytes " + " ".join(_FIELDS))


_FIELDS = ("min", "max", "mean", "std", "nan", "zeros")


def _cells(row: Row, name: str) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    told = ["-"] * len(_FIELDS)
    if row.summary:
        told = [_figure(value) for value in row.summary[:4]]
        told += [f"{share:.0%}" for share in row.summary[4:]]
    return (name, row.dtype, shape, size(row.num_bytes), *told)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
