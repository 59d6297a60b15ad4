"""Puts what a benchmark has found into a page of docs/."""

from __future__ import annotations

import pathlib
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
