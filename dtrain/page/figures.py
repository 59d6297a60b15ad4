"""The figures of a run, each with the protocol that it was measured by.

Figures of unlike protocols are different things under one name: they are never
on one axis, nor in one column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dtrain.config.figures import FIGURES
from dtrain.quality import figure_log
from dtrain.record import reading
from dtrain.storage import files


class Kind(NamedTuple):
    """A figure that can be compared with others of its kind.

    Attributes:
        name: as `frechet_distance`.
        protocol: how it was measured.
    """

    name: str
    protocol: figure_log.Protocol

    @property
    def words(self) -> str:
        """What it is, and how it was measured."""
        known = FIGURES.get(self.name)
        title = f"{known.title}; " if known else ""
        return f"{title}{self.protocol}"

    @property
    def best(self) -> str:
        """`min`, `max`, or empty where it is not known which is the best."""
        known = FIGURES.get(self.name)
        return known.best if known else ""


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
    path = figure_log.path(run_dir)
    with files.storage_errors(path):
        lines = figure_log.read(run_dir)
    by_step: dict[Kind, dict[int, Figure]] = {}
    for line in lines:
        for name, value in line.figures.items():
            error = f"{name}_error"
            if name.removesuffix("_error") in line.figures.keys() - {name}:
                # It stands beside the figure that it is of.
                continue
            by_step.setdefault(Kind(name, line.protocol), {})[line.step] = (
                Figure(
                    line.step,
                    _number(value),
                    _number(line.figures.get(error)),
                    _number(line.floor.get(name)),
                )
            )
    # The last may be on its way to the disk.
    num_lines = reading.content(path).count(b"\n")
    notes = []
    if num_lines > len(lines):
        notes.append(
            f"{path}: {num_lines - len(lines):,} of {num_lines:,} lines are "
            "damaged, and left out"
        )
    return {
        kind: [steps[step] for step in sorted(steps)]
        for kind, steps in by_step.items()
    }, notes


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def is_measured(name: str) -> bool:
    """Tells whether a name is that of a figure, or of the error of one.

    Args:
        name: as metrics.jsonl has it.
    """
    return name.removesuffix("_error") in FIGURES


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
