"""Reads what a run has written down of itself, while it trains or later.

What cannot be read is left out and told of: a file of a run that goes on may be
in the middle of a line. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import array
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dtrain import errors
from dtrain.record import goodput
from dtrain.storage import files

if TYPE_CHECKING:
    from dtrain.record.plotting import Floats

# A step beyond it is none that a float64 holds.
_MOST_STEPS = 2**53
# A file with more names than this was not written by a trainer.
_MOST_NAMES = 200


class Curve(NamedTuple):
    """Values of one name, by the step.

    Attributes:
        steps: float64 [n], whole numbers, ascending.
        values: float64 [n]; NaN where a run wrote that it was not finite, or
            that there was none.
    """

    steps: Floats
    values: Floats

    def finite(self) -> Curve:
        """Returns the part of it that is finite."""
        import numpy as np

        is_finite = np.isfinite(self.values)
        return Curve(self.steps[is_finite], self.values[is_finite])


class Metrics(NamedTuple):
    """What metrics.jsonl holds.

    Attributes:
        curves: by name, in the order of their first line.
        num_steps: the newest step; 0 if there is no line.
        notes: what is left out, in lines.
    """

    curves: Mapping[str, Curve]
    num_steps: int
    notes: Sequence[str]


def content(path: str) -> bytes:
    """Returns all of a file; nothing if there is none.

    Raises:
        StorageError: the disk or the store failed.
    """
    with files.storage_errors(path):
        return files.read(path) or b""


def attempts(run_dir: str) -> tuple[list[goodput.Attempt], list[str]]:
    """Reads the ledgers of a run.

    Args:
        run_dir: on a disk or gs://.

    Returns:
        The attempts, and a line for each ledger that is left out.

    Raises:
        UserError: a newer version of dtrain wrote one.
        StorageError: the disk or the store failed.
    """
    with files.storage_errors(run_dir):
        names = files.names(f"{run_dir}/ledger")
    found, notes = [], []
    for name in names:
        path = f"{run_dir}/ledger/{name}"
        if not name.endswith(".json"):
            continue
        try:
            found.append(goodput.loads(content(path)))
        except goodput.FutureError as error:
            raise errors.UserError(
                f"{path}: {error}; use the version of dtrain that wrote it"
            ) from error
        except goodput.DamagedError as error:
            notes.append(f"{path} is left out: {error}")
    return found, notes


def _rows(data: bytes, damaged: list[int]) -> Iterator[dict[str, Any]]:
    """Yields the objects with a step; counts the lines that are none."""
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        row: Any = None
        try:
            row = json.loads(line)
            step = row["step"]
            is_row = type(step) is int and 0 <= step <= _MOST_STEPS
        except (ValueError, TypeError, KeyError, RecursionError):
            is_row = False
        if is_row:
            yield row
        # The last may be on its way to the disk.
        elif number < len(lines) or line.endswith(b"\n"):
            damaged.append(number)


def _told(path: str, damaged: Sequence[int]) -> list[str]:
    if not damaged:
        return []
    if len(damaged) == 1:
        return [f"{path}: line {damaged[0]:,} is damaged, and left out"]
    return [
        f"{path}: {len(damaged):,} lines are damaged, and left out; the "
        f"first is line {damaged[0]:,}"
    ]


def metrics(run_dir: str) -> Metrics:
    """Reads the metrics of a run.

    Args:
        run_dir: on a disk or gs://.

    Raises:
        StorageError: the disk or the store failed.
    """
    path, damaged = f"{run_dir}/metrics.jsonl", []
    columns: dict[str, tuple[array.array[float], array.array[float]]] = {}
    newest, surplus = 0, set[str]()
    for row in _rows(content(path), damaged):
        step = row.pop("step")
        newest = max(newest, step)
        for name, value in row.items():
            if name not in columns:
                if len(columns) >= _MOST_NAMES:
                    surplus.add(name)
                    continue
                columns[name] = array.array("d"), array.array("d")
            number = _as_number(value)
            if number is not None:
                columns[name][0].append(step)
                columns[name][1].append(number)
    notes = _told(path, damaged)
    if surplus:
        notes.append(
            f"{path} has {len(columns) + len(surplus):,} names; "
            f"{len(surplus):,} of them are left out"
        )
    curves = {
        name: _sorted(*column) for name, column in columns.items() if column[0]
    }
    return Metrics(curves, newest, notes)


def _as_number(value: Any) -> float | None:
    """Returns a value of JSON as a number; NaN for null and what is infinite.

    None is of what is no number at all.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _sorted(steps: Sequence[float], values: Sequence[float]) -> Curve:
    # Here, for a help page does not wait for it.
    import numpy as np

    curve = Curve(np.array(steps), np.array(values))
    if (np.diff(curve.steps) >= 0).all():
        return curve
    order = np.argsort(curve.steps, kind="stable")
    return Curve(curve.steps[order], curve.values[order])
