"""HTML of values: whatever comes from a file goes through `text`."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from dtrain import errors

NUM_COLORS = 12


def text(value: object) -> str:
    """Returns a value as text of a page, that no browser takes for more."""
    return html.escape(errors.printable(str(value)))


def number(value: float | None) -> str:
    """Writes a number in a few digits; empty if it is not finite."""
    if value is None or not math.isfinite(value):
        return ""
    if value == int(value) and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def swatch(index: int) -> str:
    """Returns a square of the colour of a run or of a curve."""
    return (
        '<span class="swatch" aria-hidden="true" '
        f'style="--c:var(--c{index % NUM_COLORS})"></span>'
    )


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = ""
) -> str:
    """Returns a table, which scrolls by itself where it is too wide.

    Args:
        heads: of the columns, as HTML.
        rows: of as many cells, as HTML; the first of each is its head.
        caption: as HTML.
    """
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td>{cell}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    return scrolling(
        f"<table>{title}<thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def scrolling(content: str, label: str = "table") -> str:
    """Lets a table scroll, by the keyboard, too."""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}">'
        f"{content}</div>"
    )


def section(title: str, content: str, name: str = "") -> str:
    """Returns a part of a page under a heading; nothing if it is empty."""
    if not content:
        return ""
    named = f' id="{name}"' if name else ""
    return f"<section{named}><h2>{title}</h2>{content}</section>\n"
