"""Lists checkpoints without TensorFlow, in an instant.

Only `gs://` imports it. No tensor is read: what is said of a checkpoint is what
its manifest and the sizes of its files say.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dtrain import wording
from dtrain.checkpoint import manifest, pins
from dtrain.storage import files, sealed

_FILE = re.compile(r"(.+)\.(index|json|data-\d{5}-of-\d{5})")
# What such a file is counted as that is all of a checkpoint.
_V1 = ""
# Where a run keeps checkpoints, below its directory.
_TIERS = ("checkpoints", "backup")


class Row(NamedTuple):
    """What is known of a checkpoint.

    Attributes:
        prefix: what it is called by.
        step: the steps that were done; None where that cannot be told.
        saved_at: seconds since 1970.
        num_bytes: of all its files.
        state: `whole` if its files have the right sizes, or what is wrong.
        metrics: of the step, by name.
        pins: names that it is kept by.
    """

    prefix: str
    step: int | None
    saved_at: float
    num_bytes: int
    state: str
    metrics: Mapping[str, float | None] = {}
    pins: tuple[str, ...] = ()


def find(directory: str) -> list[Row]:
    """Lists the checkpoints of a directory, of a run's too, oldest first.

    Args:
        directory: of checkpoints, or of a run; what was put aside in their
            `quarantine/` is listed as well.

    Raises:
        StorageError: it cannot be listed.
    """
    top = directory.rstrip("/")
    with files.storage_errors(directory):
        # A run may save to other disks, too; see `run/places`.
        tiers = [f"{top}/{tier}" for tier in _TIERS]
        directories = dict.fromkeys((top, *tiers, *(recorded(top) or ())))
        rows = [row for path in directories for row in _rows(path)]
        for path in directories:
            for name in files.names(f"{path}/quarantine"):
                rows += _quarantined_rows(f"{path}/quarantine/{name}")
    return rows


def recorded(run_dir: str) -> list[str] | None:
    """Reads which directories a run has saved to.

    Returns:
        Their paths; none if saved.json is damaged, and None if the run has not
        saved anything.

    Raises:
        OSError: the directory cannot be read.
    """
    data = files.read(f"{run_dir}/saved.json")
    if data is None:
        return None
    try:
        body = sealed.loads(data)
        paths = sealed.field(body, "directories", _are_paths)
    except sealed.DamagedError:
        return []
    return [
        path if files.is_remote(path) else os.path.join(run_dir, path)
        for path in paths
    ]


def _are_paths(value: Any) -> bool:
    return isinstance(value, list) and all(map(sealed.is_path, value))


def newest(directory: str) -> str | None:
    """Finds the newest checkpoint of a directory, or of a run.

    Returns:
        Its prefix; None if there is none.

    Raises:
        StorageError: it cannot be listed.
    """

    def order(row: Row) -> tuple[float, float]:
        return (-1, row.saved_at) if row.step is None else (row.step, 0)

    whole = [row for row in find(directory) if row.state == "whole"]
    # Of two of the same step the first, which is of the durable tier.
    return max(whole, key=order).prefix if whole else None


def _rows(directory: str) -> list[Row]:
    """Returns what looks like a checkpoint, by its step."""
    groups: dict[str, dict[str, int]] = {}
    names = set(files.names(directory))
    for name in names:
        match = _FILE.fullmatch(name)
        if f"{name}.meta" in names and f"{name}.index" not in names:
            # Before TensorFlow 0.12 a checkpoint was one file.
            num_bytes = files.size(f"{directory}/{name}")
            groups[name] = {_V1: num_bytes or 0}
        num_bytes = files.size(f"{directory}/{name}") if match else None
        # A run that goes on may have removed it meanwhile.
        if match and num_bytes is not None:
            groups.setdefault(match[1], {})[match[2]] = num_bytes
    try:
        pinned = pins.read(directory)
    except sealed.DamagedError:
        pinned = {}
    rows = [
        _row(directory, name, parts, pinned)
        for name, parts in groups.items()
        if set(parts) != {"json"} or re.fullmatch(r"ckpt-\d+", name)
    ]
    return sorted(rows, key=lambda row: (row.step or 0, row.prefix))


def _row(
    directory: str,
    name: str,
    parts: Mapping[str, int],
    pinned: Mapping[str, int],
) -> Row:
    """Makes a row of one checkpoint.

    `parts` are the bytes of each of its files, by what follows its name; and
    `pinned` the pinned steps of the directory, by the name of the pin.
    """
    prefix = f"{directory}/{name}"
    number = re.search(r"-(\d+)$", name)
    step = int(number[1]) if number else None
    num_bytes = sum(size for part, size in parts.items() if part != "json")
    if "json" not in parts:
        index = files.stat(f"{prefix}.index")
        changed_at = index.changed_secs if index else 0.0
        return Row(prefix, step, changed_at, num_bytes, _state_of_stock(parts))
    try:
        expected = manifest.decode(files.read(f"{prefix}.json") or b"")
    except sealed.DamagedError:
        return Row(prefix, step, 0.0, num_bytes, "damaged: its manifest")
    wrong = [
        suffix
        for suffix, wanted in expected.sizes.items()
        if parts.get(suffix) != wanted
    ]
    if expected.step != step:
        wrong.append("step")
    return Row(
        prefix,
        step,
        expected.saved_at,
        num_bytes,
        f"damaged: its {', '.join(wrong)}" if wrong else "whole",
        expected.metrics,
        tuple(name for name, kept in sorted(pinned.items()) if kept == step),
    )


def _state_of_stock(parts: Mapping[str, int]) -> str:
    """Tells whether what another program wrote has all its files."""
    if _V1 in parts:
        return "whole"
    if "index" not in parts:
        return "incomplete: no index"
    data = [part for part in parts if part.startswith("data-")]
    promised = int(data[0].rpartition("-")[2]) if data else 1
    if len(data) != promised:
        return f"incomplete: {len(data)} of {promised} data files"
    return "whole"


def _quarantined_rows(directory: str) -> list[Row]:
    text = files.read(f"{directory}/reason.txt") or b""
    reason = text.decode(errors="replace").strip() or "for no reason"
    rows = _rows(directory)
    return [row._replace(state=f"quarantined: {reason}") for row in rows]


def lines(
    rows: Sequence[Row], metric: str = "", now_secs: float | None = None
) -> list[str]:
    """Writes a table, a line for each checkpoint.

    Args:
        rows: the checkpoints.
        metric: also shown; empty shows the first of each.
        now_secs: since 1970; None is this moment.
    """
    now = time.time() if now_secs is None else now_secs
    table = [("checkpoint", "step", "age", "size", "metric", "pinned", "state")]
    for row in rows:
        table.append(
            (
                row.prefix,
                "-" if row.step is None else str(row.step),
                age(now - row.saved_at) if row.saved_at else "-",
                size(row.num_bytes),
                _metric(row.metrics, metric),
                ", ".join(row.pins) or "-",
                row.state,
            )
        )
    return columns(table)


def _metric(metrics: Mapping[str, float | None], name: str) -> str:
    for metric, value in metrics.items():
        if name in ("", metric) and value is not None:
            return f"{metric} {value:.4g}"
    return "-"


def columns(table: Sequence[Sequence[str]], right: str = "") -> list[str]:
    """Lays a table out in columns of the width of what is in them.

    Args:
        table: rows of the same length, the first of which is the head.
        right: names of the columns that are flush right.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    flush = [
        str.rjust if head in right.split() else str.ljust for head in table[0]
    ]
    return [
        "  ".join(
            put(cell, width)
            for put, cell, width in zip(flush, row, widths, strict=True)
        ).rstrip()
        for row in table
    ]


def age(secs: float) -> str:
    """Says how long ago something was, in two figures."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if secs >= 2 * length:
            return f"{secs / length:.0f} {unit}"
    return f"{max(secs, 0):.0f} s"


def size(num_bytes: float) -> str:
    """Says how large something is, in three figures."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(num_bytes, 1)) // 3), len(units) - 1)
    value = num_bytes / 1000**power
    return f"{wording.three_figures(value)} {units[power]}"
