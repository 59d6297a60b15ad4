"""Writes the tables of docs/speed.md as numbers, and draws them.

    python -m tests.benchmarks.figure [--write]

Prints each cell of each table as CSV. `--write` puts that into docs/speed.csv,
and into docs/speed.png how many times as fast as others dtrain trains and
reads. `python -m tests.benchmarks --write` ends with it.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests import runs
from tests.benchmarks import command, pages

PAGE = runs.ROOT / "docs/speed.md"
NUMBERS = PAGE.with_suffix(".csv")
PICTURE = PAGE.with_suffix(".png")
# Tables whose rows are of dtrain; their first two cells name one.
_OURS = ("train", "replicas")
_UNITS = {"batch": "batch "}
_PREFIX = "of "


class Bar(NamedTuple):
    """A comparison.

    Attributes:
        label: what is done, and beside whom.
        ratio: dtrain's speed over the other's.
    """

    label: str
    ratio: float


def numbers(tables: dict[str, list[list[str]]]) -> str:
    """Makes the CSV of tables: table, row, column, value."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(("table", "row", "column", "value"))
    for name, (head, *rows) in tables.items():
        for number, row in enumerate(rows, 1):
            for column, value in zip(head, row, strict=True):
                writer.writerow((name, number, column, value))
    return content.getvalue()


def bars(tables: dict[str, list[list[str]]]) -> dict[str, list[Bar]]:
    """Finds the comparisons with others, by table."""
    found: dict[str, list[Bar]] = {}
    for name in _OURS:
        head, *rows = tables[name]
        found[name] = [
            Bar(
                f"{row[0]} {head[0]}, {_UNITS.get(head[1], '')}{row[1]}: "
                + column.removeprefix(_PREFIX).replace("`", ""),
                float(cell),
            )
            for row in rows
            for column, cell in zip(head, row, strict=True)
            if column.startswith(_PREFIX) and cell and "replica" not in column
        ]
    _, *rows = tables["reading"]
    found["reading"] = [
        Bar(f"{row[0]}: {row[1].replace('`', '')}", float(row[3]))
        for row in rows
        if row[1] != "dtrain"
    ]
    return found


def draw(found: dict[str, list[Bar]]) -> bytes:
    """Draws the comparisons; returns a PNG."""
    num_bars = sum(map(len, found.values()))
    figure = Figure(figsize=(8.0, 0.16 * num_bars + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(found), sharex=True, height_ratios=list(map(len, found.values()))
    )
    for panel, (name, each) in zip(panels, found.items(), strict=True):
        panel.barh(
            [bar.label for bar in each],
            [bar.ratio - 1.0 for bar in each],
            left=1.0,
            color=_colors(each),
        )
        panel.axvline(1.0, color="black", linewidth=1.0)
        panel.tick_params(axis="y", labelsize=7)
        panel.invert_yaxis()
        panel.set_title(name, fontsize=9)
    panels[-1].set_xscale("log", base=2)
    panels[-1].set_xlabel("times as fast as the other (orange: slower)")
    panels[-1].xaxis.set_major_formatter("{x:g}")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _colors(each: Iterable[Bar]) -> list[str]:
    return ["tab:blue" if bar.ratio >= 1.0 else "tab:orange" for bar in each]


def main() -> None:
    """Prints the numbers, or writes both files."""
    is_written = "--write" in sys.argv
    command.only_own_flags(sys.argv[1:], {})
    tables = pages.tables(PAGE)
    if not is_written:
        print(numbers(tables), end="")
        return
    NUMBERS.write_text(numbers(tables))
    PICTURE.write_bytes(draw(bars(tables)))


if __name__ == "__main__":
    main()
