"""Writes the presets into docs/presets.md, or says where the two differ.

python -m tests.presets_page --write
"""

from __future__ import annotations

import pathlib
import sys
import textwrap
from collections.abc import Iterator

from dtrain.config import presets

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "presets.md"
_BEGIN = "<!-- by python -m tests.presets_page --write -->\n"


def render(page: str) -> str:
    """Puts the presets behind what a page says of them all."""
    head, begin, _ = page.partition(_BEGIN)
    return f"{head}{begin}" + "\n".join(_lines())


def _lines() -> Iterator[str]:
    for name, preset in presets.PRESETS.items():
        settings = [
            f"`--{flag}={_shown(value)}`"
            for flag, value in preset.settings.items()
        ]
        text = (
            f"{preset.paper}. **For** {preset.purpose}. **Costs** "
            f"{preset.cost}. **Reaches** {preset.reaches}. **Sets** "
            f"{' '.join(settings)}"
        )
        if preset.decided:
            decided = ", ".join(f"`--{flag}`" for flag in preset.decided)
            text += f", and decides {decided}"
        yield f"\n## {name}\n"
        yield from textwrap.wrap(
            text, 80, break_long_words=False, break_on_hyphens=False
        )
    yield ""


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    return "true" if value is True else str(value)


if __name__ == "__main__":
    written = render(PAGE.read_text())
    if "--write" in sys.argv:
        PAGE.write_text(written)
    elif written != PAGE.read_text():
        sys.exit(f"{PAGE} is another one; add --write")
