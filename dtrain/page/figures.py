"""The figures of a run, each with the protocol that it was measured by.

Figures of unlike protocols are different things under one name: they are never
on one axis, nor in one column.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dtrain.record import reading

# Of these the largest is the best, and of the others below the smallest; of
# any other it is not known.
_LARGEST = (
    *("precision", "recall", "density", "coverage", "inception_score"),
    *("modes_covered", "conditional_accuracy"),
)
_SMALLEST = ("frechet_distance", "kernel_distance", "reverse_kl", "copy_score")

# What a person asks for first of a protocol.
_FIRST = ("extractor", "digest", "num_generated", "num_real", "weights")


class Kind(NamedTuple):
    """A figure that can be compared with others of its kind.

    Attributes:
        name: as `frechet_distance`.
        protocol: how it was measured, as canonical JSON.
    """

    name: str
    protocol: str

    @property
    def words(self) -> str:
        """The protocol for a person."""
        values = json.loads(self.protocol)
        if not isinstance(values, dict):
            return str(values)
        ordered = sorted(values, key=lambda name: [*_FIRST, name].index(name))
        return ", ".join(
            f"{name.replace('_', ' ')} {_short(values[name])}"
            for name in ordered
        )

    @property
    def best(self) -> str:
        """`min`, `max`, or empty where it is not known which is the best."""
        if self.name in _LARGEST:
            return "max"
        return "min" if self.name in _SMALLEST else ""


class Figure(NamedTuple):
    """A value of a kind at a step.

    Attributes:
        step: the steps that were done.
        value: NaN if it was not finite.
        error: the standard error of the value; NaN if it is not known.
        floor: what real images have against real ones; NaN if not known.
    """

    step: int
    value: float
    error: float
    floor: float


def read(run_dir: str) -> tuple[dict[Kind, list[Figure]], list[str]]:
    """Reads figures.jsonl.

    Args:
        run_dir: on a disk or gs://.

    Returns:
        The figures of each kind by ascending step, of one step the newest
        line; and lines on what is left out.

    Raises:
        StorageError: the disk or the store failed.
    """
    path = f"{run_dir}/figures.jsonl"
    rows, notes = reading.rows(path)
    by_step: dict[Kind, dict[int, Figure]] = {}
    num_odd = 0
    for row in rows:
        values, floors = row.get("figures"), row.get("floor")
        if not isinstance(values, dict) or "protocol" not in row:
            num_odd += 1
            continue
        protocol = json.dumps(row["protocol"], sort_keys=True)
        for name, value in _of_row(values):
            floor = floors.get(name) if isinstance(floors, dict) else None
            by_step.setdefault(Kind(name, protocol), {})[row["step"]] = Figure(
                row["step"],
                value,
                _number(values.get(f"{name}_error")),
                _number(floor),
            )
    if num_odd:
        notes.append(
            f"{path}: lines without figures are left out ({num_odd:,})"
        )
    return {
        kind: [steps[step] for step in sorted(steps)]
        for kind, steps in by_step.items()
    }, notes


def _of_row(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns the figures of a line, without the errors of others."""
    return [
        (name, number)
        for name, value in values.items()
        if (number := reading.as_number(value)) is not None
        and name.removesuffix("_error") not in values.keys() - {name}
    ]


def _number(value: Any) -> float:
    number = reading.as_number(value)
    return math.nan if number is None else number


def _short(value: Any) -> str:
    """Writes a value of a protocol; of a digest the beginning."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}\N{HORIZONTAL ELLIPSIS}"


def title(name: str) -> str:
    """Writes the name of a figure or a metric for a person."""
    return name.replace("_", " ").replace("images per sec", "images/s")


def best(kind: Kind, measured: Sequence[Figure]) -> Figure | None:
    """Returns the best value; the newest where it is not known which is.

    Args:
        kind: of them.
        measured: by ascending step.

    Returns:
        None if none is finite.
    """
    finite = [each for each in measured if math.isfinite(each.value)]
    if not finite:
        return None
    if not kind.best:
        return finite[-1]
    sign = 1 if kind.best == "min" else -1
    return min(finite, key=lambda each: sign * each.value)
