"""The tables of docs/speed.md, as numbers and drawn."""

from __future__ import annotations

import csv
import io
import pathlib

from PIL import Image

from tests.benchmarks import figure, pages


def test_all_of_the_page_is_in_its_numbers() -> None:
    """Who writes a table by hand, or one alone, writes the numbers anew."""
    tables = pages.tables(figure.PAGE)
    assert figure.numbers(tables) == figure.NUMBERS.read_text()
    assert {"train", "reading", "checkpoints", "restart"} <= tables.keys()


def test_a_table_is_read_as_it_was_written(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n<!-- by tests.benchmarks.one -->\n<!-- end -->\n"
    )
    lines = ["| what | of it |", "|---|---|", "| a, b |  |", "| `c` | 1.5 |"]
    pages.replace_table(page, "one", lines)
    tables = pages.tables(page)
    assert tables == {"one": [["what", "of it"], ["a, b", ""], ["`c`", "1.5"]]}
    assert list(csv.reader(io.StringIO(figure.numbers(tables)))) == [
        ["table", "row", "column", "value"],
        ["one", "1", "what", "a, b"],
        ["one", "1", "of it", ""],
        ["one", "2", "what", "`c`"],
        ["one", "2", "of it", "1.5"],
    ]


def test_comparisons_of_the_page_are_drawn() -> None:
    bars = figure.bars(pages.tables(figure.PAGE))
    labels = [bar.label for each in bars.values() for bar in each]
    assert len(labels) == len(set(labels)) > 20
    assert "28 pixels, batch 64: by hand" in labels
    picture = Image.open(io.BytesIO(figure.draw(bars)))
    assert picture.width == 800
