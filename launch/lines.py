"""Prints the lines of a launcher, wherever they go."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TextIO


def print_what_cannot_be_shown() -> None:
    """Escapes what a worker prints and the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(line: str, stream: TextIO) -> None:
    """Prints a line in one piece, if anybody listens.

    Else, as behind `| head` or on a full disk, it is lost: a run must not end
    for that, nor a worker wait for ever until somebody reads its pipe.

    Args:
        line: without its end.
        stream: where to.
    """
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{line}\n")
        stream.flush()
