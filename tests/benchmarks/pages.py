"""Puts what a benchmark has found into a page of docs/."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence


def replace_table(
    page: pathlib.Path, benchmark: str, lines: Sequence[str]
) -> None:
    """Replaces the table of a benchmark, between two comments.

    Args:
        page: a Markdown file, that has the comments.
        benchmark: the module's name below `tests.benchmarks`.
        lines: of the table.
    """
    begin, end = f"<!-- by tests.benchmarks.{benchmark} -->\n", "<!-- end -->"
    before, found, rest = page.read_text().partition(begin)
    assert found, f"{page} has no place for {benchmark}"
    _, _, after = rest.partition(end)
    text = "".join(f"{line}\n" for line in lines)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def tables(page: pathlib.Path) -> dict[str, list[list[str]]]:
    """Reads the tables that benchmarks have put into a page.

    Args:
        page: a Markdown file.

    Returns:
        The rows of cells by the name of the benchmark, the head first.
    """
    found = {}
    for name, text in re.findall(
        r"<!-- by tests\.benchmarks\.(\w+) -->\n(.*?)<!-- end -->",
        page.read_text(),
        re.DOTALL,
    ):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines()
            if line.startswith("|") and line.strip("|- ")
        ]
        if rows:
            found[name] = rows
    return found
