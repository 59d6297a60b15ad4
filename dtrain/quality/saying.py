"""Lines of progress, not too many of them."""

from __future__ import annotations

import time
from collections.abc import Callable

_EVERY_SECS = 5.0


class Slowly:
    """Shows a line every few seconds, and leaves out the others."""

    def __init__(self, show: Callable[[str], object]) -> None:
        """Begins to wait.

        Args:
            show: called with a line.
        """
        self._show, self._shown = show, time.monotonic()

    def now(self, line: str) -> None:
        """Shows a line that is none of progress."""
        self._show(line)

    def __call__(self, line: str) -> None:
        """Shows a line, if it is time to."""
        if time.monotonic() - self._shown >= _EVERY_SECS:
            self._shown = time.monotonic()
            self._show(line)
