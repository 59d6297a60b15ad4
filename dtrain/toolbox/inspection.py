"""What is in a checkpoint, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dtrain.bundle.tree import Tree
from dtrain.checkpoint.listing import columns, size
from dtrain.toolbox import numbers


class Row(NamedTuple):
    """What is shown of a tensor.

    Attributes:
        name: of the tensor.
        part: name of the network or the optimizer that it belongs to.
        key: TensorFlow's, under which the file has it.
        dtype: TensorFlow's name of it.
        shape: its dimensions.
        num_values: their product.
        num_bytes: of its values; see `Tensor.num_bytes`.
        summary: of its values; None if they are no numbers, or not read.
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
    """Returns a row as JSON's own types; NaN and infinities are None."""
    summary = row.summary._asdict() if row.summary else {}
    return {
        **row._asdict(),
        "shape": list(row.shape),
        "summary": {
            name: value if value is None or math.isfinite(value) else None
            for name, value in summary.items()
        },
    }


def totals(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Counts tensors, values and bytes of each network and optimizer."""
    sums: dict[str, dict[str, int]] = {}
    for row in rows:
        part = sums.setdefault(
            row.part, {"tensors": 0, "values": 0, "bytes": 0}
        )
        part["tensors"] += 1
        part["values"] += row.num_values
        part["bytes"] += row.num_bytes
    return sums


def lines(rows: list[Row]) -> list[str]:
    """Writes a table: a line for each part, below it one for each tensor.

    Args:
        rows: at least one.
    """
    no_figures = [""] * len(_FIELDS)
    table: list[tuple[str, ...]] = [
        ("name", "dtype", "shape", "bytes", *_FIELDS)
    ]
    for part, sums in totals(rows).items():
        count = f"{sums['values']:,} values"
        table.append((part, "", count, size(sums["bytes"]), *no_figures))
        for row in rows:
            if row.part == part and row.name != part:
                table.append(_cells(row, f"  {row.name[len(part) + 1 :]}"))
            elif row.part == part:
                table[-1] = _cells(row, row.name)
    total = size(sum(row.num_bytes for row in rows))
    count = f"{sum(row.num_values for row in rows):,} values"
    table.append(("total", "", count, total, *no_figures))
    return columns(table, right="bytes " + " ".join(_FIELDS))


_FIELDS = ("min", "max", "mean", "std", "nan", "zeros")


def _cells(row: Row, name: str) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    figures = ["-"] * len(_FIELDS)
    if row.summary:
        figures = [_figure(value) for value in row.summary[:4]]
        figures += [f"{share:.0%}" for share in row.summary[4:]]
    return (name, row.dtype, shape, size(row.num_bytes), *figures)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
